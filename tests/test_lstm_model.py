"""The LSTM against its equations, and from training to answers. What it shares with the GPT, the
laws of the cache and of generation, is in test_model.py and test_sample.py."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import evaluations
import sample
from configurator import ROOT, UserError, configure
from lstm_model import LSTM
from miniglm.checkpoint import load_checkpoint
from model import GPT, ModelConfig
from tests.helpers import random_ids, save_run, tiny_model, tiny_tokenizer, write_novel
from tests.runs import (
    assert_same_run,
    checkpoint_file,
    log,
    read_json,
    saved,
    train_here,
    weights,
    words,
    write_toys,
)
from train import Settings, architecture

HERE = {"model": "lstm", "n_head": 8}  # n_head: its default, in place of the toy runs' own
SHAPES = {
    "tied": {},
    "untied": {"n_layer": 1, "tie_weights": False, "norm": "layernorm", "bias": True},
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A directory with the datasets text and questions, and base, an LSTM of the text."""
    folder = tmp_path_factory.mktemp("toys")
    write_toys(folder)
    train_here(dataset=folder / "text", out_dir=folder / "base", **HERE)
    return folder


# --- against the equations ---------------------------------------------------------------------


def norm(w: dict, name: str, x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    if config.norm == "layernorm":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + config.norm_eps).sqrt()
    return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)


def slow_logits(w: dict, config: ModelConfig, ids: list[int]) -> torch.Tensor:
    """One row of ids -> (T, n_vocab), token by token (Hochreiter and Schmidhuber, 1997; with the
    forget gate of Gers et al., 2000)."""
    h = [torch.zeros(config.n_embd, dtype=torch.float64) for _ in range(config.n_layer)]
    c, logits = [state.clone() for state in h], []
    for id in ids:
        x = norm(w, "norm_in", w["wte.weight"][id], config)
        for n in range(config.n_layer):
            gates = w[f"lstm.weight_ih_l{n}"] @ x + w[f"lstm.bias_ih_l{n}"]
            gates = gates + w[f"lstm.weight_hh_l{n}"] @ h[n] + w[f"lstm.bias_hh_l{n}"]
            i, f, g, o = gates.chunk(4)
            c[n] = f.sigmoid() * c[n] + i.sigmoid() * g.tanh()
            x = h[n] = o.sigmoid() * c[n].tanh()
        head = w["wte.weight" if config.tie_weights else "lm_head.weight"]
        logits.append(head[: config.n_vocab] @ norm(w, "norm", x, config))
    return torch.stack(logits)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_equal_the_equations_in_float64(options):
    model = tiny_model(model="lstm", **options)
    w = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    idx, targets = random_ids(3, 12), random_ids(3, 12, seed=1)
    wanted = torch.stack([slow_logits(w, model.config, row.tolist()) for row in idx])
    got = model.head(model(idx))
    assert wanted.std() > 0.5
    assert (got - wanted).abs().max() < 1e-5
    F.cross_entropy(wanted.flatten(0, 1), targets.flatten()).backward()
    F.cross_entropy(got.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert w[name].grad.abs().max() > 1e-3, name
        assert (parameter.grad - w[name].grad).abs().max() < 1e-5, name


def test_parameters_and_flops_are_those_counted_by_hand():
    # 64 x 8 embedding; a layer: input and state to four gates, two biases; two norms
    layer = 4 * 8 * (8 + 8) + 2 * 4 * 8
    shape = {"model": "lstm", "n_layer": 2, "n_embd": 8, "n_vocab": 33}
    model, untied = (LSTM(ModelConfig(**shape, tie_weights=tied)) for tied in (True, False))
    assert model.n_params() == 64 * 8 + 2 * layer + 2 * 8
    assert untied.n_params() == model.n_params() + 64 * 8
    flops = 6 * (2 * 4 * 8 * 16 + 64 * 8)
    assert model.flops_per_token(10) == untied.flops_per_token(99) == flops


def test_a_new_model_keeps_its_state_and_the_size_of_what_it_reads():
    model = LSTM(ModelConfig(model="lstm", n_layer=2, n_embd=256, n_vocab=500))
    for n in range(2):
        for name in ("weight_ih", "weight_hh"):
            std = getattr(model.lstm, f"{name}_l{n}").std().item()
            assert std == pytest.approx(1 / 16, rel=0.05)
        biases = getattr(model.lstm, f"bias_ih_l{n}") + getattr(model.lstm, f"bias_hh_l{n}")
        assert biases.view(4, 256).unique(dim=1).flatten().tolist() == [0, 1, 0, 0]
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.norm.weight == 1).all()


@pytest.mark.parametrize("site", ["embedding and output", "between layers"])
def test_each_dropout_acts_in_training_only(site):
    model, idx = tiny_model(model="lstm", dropout=0.5), random_ids(1, 8)
    assert model.drop.p == model.lstm.dropout == 0.5
    if site == "between layers":
        model.drop.p = 0.0
    else:
        model.lstm.dropout = 0.0
    assert torch.equal(model(idx), tiny_model(model="lstm")(idx))
    model.train()
    assert not torch.allclose(model(idx), model(idx), atol=1e-3)


@torch.no_grad()
def test_the_padding_of_a_row_changes_no_state():
    model = tiny_model(model="lstm").double()
    idx, lengths = random_ids(3, 9), [9, 1, 5]
    cache = model.new_cache(3)
    hidden = model(idx, cache, lengths)
    for row, length in enumerate(lengths):
        alone = model.new_cache(1)
        wanted = model(idx[row : row + 1, :length], alone)[0]
        assert (hidden[row, :length] - wanted).abs().max() < 1e-12
        assert (cache.h[:, row] - alone.h[:, 0]).abs().max() < 1e-12
        assert (cache.c[:, row] - alone.c[:, 0]).abs().max() < 1e-12


# --- settings ----------------------------------------------------------------------------------


GPTS_OWN = {
    "n_head": 4,
    "n_kv_head": 8,
    "n_hidden": 64,
    "position": "learned",
    "rope_theta": 500.0,
    "mlp": "gelu",
    "qk_norm": False,
    "init": "gpt2",
}


@pytest.mark.parametrize("name, value", GPTS_OWN.items())
def test_a_setting_that_only_the_gpt_reads_is_refused(name, value):
    with pytest.raises(UserError, match=f"^{name}={value!r} means nothing to model='lstm'"):
        ModelConfig(model="lstm", n_vocab=50, **{name: value})


@pytest.mark.parametrize("option", [{"n_layer": 0}, {"n_embd": 0}, {"dropout": 1.0}])
def test_an_impossible_shape_is_named(option):
    [name] = option
    with pytest.raises(UserError, match=f"^{name}="):
        ModelConfig(model="lstm", n_vocab=50, **option)


def test_a_width_need_not_suit_the_gpts_heads():
    assert tiny_model(model="lstm", n_embd=31)(random_ids(1, 3)).shape == (1, 3, 31)


def remove_the_field(out_dir: Path) -> None:
    """run.json as it was before an architecture had a `model`."""
    file = checkpoint_file(out_dir, "run.json")
    run = read_json(file)
    del run["architecture"]["model"], run["settings"]["model"]
    file.write_text(json.dumps(run), encoding="utf-8")


def test_a_checkpoint_from_before_the_lstm_is_a_gpt_and_goes_on_in_the_same_bits(
    toys, tmp_path, capsys
):
    common = {"dataset": toys / "text", "lr_decay_iters": 8, "eval_interval": 4}
    whole = train_here(out_dir=tmp_path / "whole", max_iters=8, **common)
    parts = train_here(out_dir=tmp_path / "parts", max_iters=4, **common)
    remove_the_field(parts)
    assert load_checkpoint(parts).model.config.model == "gpt"
    capsys.readouterr()
    train_here(out_dir=parts, resume=True, max_iters=8)
    assert "model was" not in capsys.readouterr().out
    assert_same_run(whole, parts)
    with pytest.raises(UserError, match="model"):
        train_here(out_dir=parts, resume=True, model="lstm", max_iters=9)


def test_a_checkpoint_of_the_other_model_is_refused(toys, tmp_path):
    common = {"dataset": toys / "text", "out_dir": tmp_path / "out", "init_from": toys / "base"}
    with pytest.raises(UserError, match=r"model=gpt, but the model in .* has model=lstm"):
        train_here(model="gpt", n_head=8, **common)


# --- from training to answers ------------------------------------------------------------------


def test_the_loss_falls_far_below_a_uniform_guess(toys, tmp_path):
    common = {"dataset": toys / "text", "max_iters": 120, "learning_rate": 1e-2}
    records = log(train_here(out_dir=tmp_path / "out", **common, **HERE))
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert losses[-1] < 2.3 < 5 < records[0]["train_loss"]  # a uniform guess is 5.8


@pytest.mark.parametrize("options", [{}, {"tie_weights": False, "dtype": "bfloat16"}])
def test_a_run_in_three_parts_equals_one_in_one(toys, tmp_path, options):
    common = options | {"dataset": toys / "text", "dropout": 0.1, "lr_decay_iters": 12} | HERE
    common |= {"gradient_accumulation_steps": 2, "eval_interval": 3}
    whole = train_here(out_dir=tmp_path / "whole", max_iters=12, **common)
    parts = train_here(out_dir=tmp_path / "parts", max_iters=3, **common)
    train_here(out_dir=parts, resume=True, max_iters=6)
    train_here(out_dir=parts, resume=True, max_iters=12)
    assert_same_run(whole, parts)
    assert saved(whole)["architecture"]["model"] == "lstm"


def test_what_is_loaded_is_what_was_saved(tmp_path):
    tokenizer = tiny_tokenizer()
    data = write_novel(tmp_path / "data", tokenizer)
    for tied in (True, False):
        model = tiny_model(model="lstm", n_vocab=tokenizer.n_vocab, tie_weights=tied)
        out = save_run(tmp_path / f"out-{tied}", model, tokenizer, data, "pretrain")
        assert sum(value.numel() for value in weights(out).values()) == model.n_params()
        loaded = load_checkpoint(out).model
        assert isinstance(loaded, LSTM) and loaded.config == model.config
        assert torch.equal(loaded(random_ids(2, 9)), model(random_ids(2, 9)))


def test_dry_run_prints_parameters_memory_and_time(toys, tmp_path, capsys):
    train_here(dataset=toys / "text", out_dir=tmp_path / "out", dry_run=True, **HERE)
    printed = capsys.readouterr().out
    n_params = load_checkpoint(toys / "base").model.n_params()
    assert f"parameters  {n_params:,}\n" in printed
    assert all(word in printed for word in ("memory ", "speed ", "time "))
    assert not (tmp_path / "out").exists()


def test_it_continues_texts_is_fine_tuned_answers_and_is_evaluated(toys, tmp_path, capsys):
    out = tmp_path / "sft"
    train_here(dataset=toys / "questions", init_from=toys / "base", out_dir=out, **HERE)
    assert load_checkpoint(out).answers and isinstance(load_checkpoint(out).model, LSTM)
    capsys.readouterr()
    sample.main(words(out_dir=toys / "base", start="刘备", max_new_tokens=60, device="cpu"))
    assert capsys.readouterr().out.startswith("刘备")
    file = tmp_path / "questions.txt"
    file.write_text("刘备到1？\n关羽？\n", encoding="utf-8")
    flags = {"max_new_tokens": 40, "device": "cpu"}
    sample.main(words(out_dir=out, start=f"FILE:{file}", num_samples=2, temperature=1, **flags))
    assert capsys.readouterr().out.count("答：") == 4
    for folder in (toys / "base", out):
        evaluations.main(words(out_dir=folder, **flags))
        val_loss = [r["val_loss"] for r in log(folder) if "val_loss" in r]
        report = read_json(folder / "evaluation.json")
        assert torch.tensor(report["perplexity"]).log().item() == pytest.approx(
            min(val_loss), rel=1e-3
        )
    assert report["n"] == 12 and 0 <= report["rouge_l"] <= 1


def test_the_configs_that_are_compared_have_equally_many_parameters():
    def n_params(config: str, model: type) -> int:
        settings = configure(Settings, [str(ROOT / "config" / config)])
        return model(ModelConfig(**architecture(settings), n_vocab=4096)).n_params()

    lstm, gpt = n_params("lstm_sanguo.py", LSTM), n_params("pretrain_sanguo.py", GPT)
    assert lstm == pytest.approx(gpt, rel=0.01)
