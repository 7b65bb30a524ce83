"""The LSTM against its equations, and from training to answers. What it shares with the GPT, the
laws of the cache and of generation, is in test_model.py and test_sample.py."""

import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

import evaluations
import sample
from configurator import ROOT, UserError, configure
from lstm_model import LSTM, SETTINGS
from miniglm.checkpoint import load_checkpoint
from miniglm.preflight import architecture
from model import GPT, Architecture, ModelConfig
from tests.helpers import random_ids, tiny_model
from tests.runs import assert_same_run, log, read_json, train_here, weights, words
from train import Settings

TOYS_BASE = {"model": "lstm", "n_head": 8}  # n_head: its default, in place of the toy runs' own
SHAPES = {
    "tied": {},
    "untied": {"n_layer": 1, "tie_weights": False, "norm": "layernorm", "bias": True},
}


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


# --- settings ----------------------------------------------------------------------------------


def test_a_setting_that_only_the_gpt_reads_is_refused():
    given = {"n_head": 4, "n_kv_head": 8, "n_hidden": 64, "position": "learned", "mlp": "gelu"}
    given |= {"rope_theta": 500.0, "qk_norm": False, "init": "gpt2"}
    assert given.keys() | SETTINGS == {field.name for field in fields(Architecture)}
    for name, value in given.items():
        with pytest.raises(UserError, match=f"^{name}={value!r} means nothing to model='lstm'"):
            tiny_model(model="lstm", **{name: value})


def test_a_width_need_not_suit_the_gpts_heads():
    assert tiny_model(model="lstm", n_embd=31)(random_ids(1, 3)).shape == (1, 3, 31)


def test_a_checkpoint_of_the_other_model_is_refused(toys, tmp_path):
    common = {"dataset": toys / "text", "out_dir": tmp_path / "out", "init_from": toys / "base"}
    with pytest.raises(UserError, match=r"model=gpt, but the model in .* has model=lstm"):
        train_here(model="gpt", n_head=8, **common)


# --- from training to answers ------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tie_weights": False, "dtype": "bfloat16"}])
def test_it_learns_and_a_run_in_two_parts_equals_one_in_one(toys, tmp_path, options):
    common = options | {"dataset": toys / "text", "dropout": 0.1, "lr_decay_iters": 120} | TOYS_BASE
    common |= {"eval_interval": 40, "learning_rate": 1e-2}
    whole = train_here(out_dir=tmp_path / "whole", max_iters=120, **common)
    parts = train_here(out_dir=tmp_path / "parts", max_iters=40, **common)
    train_here(out_dir=parts, resume=True, max_iters=120)
    assert_same_run(whole, parts)
    losses = [record["val_loss"] for record in log(whole) if "val_loss" in record]
    assert losses[-1] < 2.3 < 5 < log(whole)[0]["train_loss"]  # a uniform guess is 5.8
    model = load_checkpoint(whole).model
    assert isinstance(model, LSTM)
    assert sum(value.numel() for value in weights(whole).values()) == model.n_params()


def test_it_continues_texts_is_fine_tuned_answers_and_is_evaluated(toys, tmp_path, capsys):
    out = tmp_path / "sft"
    train_here(dataset=toys / "questions", init_from=toys / "base", out_dir=out, **TOYS_BASE)
    assert load_checkpoint(out).answers and isinstance(load_checkpoint(out).model, LSTM)
    flags = {"max_new_tokens": 40, "device": "cpu"}
    capsys.readouterr()
    sample.main(words(out_dir=toys / "base", start="刘备", **flags))
    assert capsys.readouterr().out.startswith("刘备")
    sample.main(words(out_dir=out, start="刘备到1？", num_samples=2, temperature=1, **flags))
    assert capsys.readouterr().out.count("答：") == 2
    for folder in (toys / "base", out):
        evaluations.main(words(out_dir=folder, **flags))
        val_loss = min(record.get("val_loss", math.inf) for record in log(folder))
        perplexity = read_json(folder / "evaluation.json")["perplexity"]
        assert perplexity == pytest.approx(math.exp(val_loss), rel=1e-3)


def test_the_configs_that_are_compared_have_equally_many_parameters():
    def n_params(config: str, model: type) -> int:
        settings = configure(Settings, [str(ROOT / "config" / config)])
        return model(ModelConfig(**architecture(vars(settings)), n_vocab=4096)).n_params()

    lstm, gpt = n_params("lstm_sanguo.py", LSTM), n_params("pretrain_sanguo.py", GPT)
    assert lstm == pytest.approx(gpt, rel=0.01)
