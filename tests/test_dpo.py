"""Preferences: the loss against trl's and a plain version, pairs of answers, and whole runs."""

import math
import random
import shutil
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configurator import UserError
from data.custom import prepare_dpo
from data_utils import IGNORE, Dataset
from miniglm.checkpoint import load_checkpoint
from miniglm.lora import adapter_weights, add_adapters
from miniglm.losses import dpo, reference_log_prob, sequence_log_prob
from miniglm.objectives import Batch, Preferences
from miniglm.prep import writer as data_writer
from miniglm.prep.forms import BadRecord, preference
from miniglm.prep.writer import Skipped, fit_pair, write_splits
from tests.data.test_finance_dpo import pairs_of
from tests.helpers import dialogue, tiny_model, tiny_tokenizer, write_lines
from tests.runs import (
    assert_accumulation_is_exact,
    assert_resumes_exactly,
    log,
    toy_tokenizer,
    train_here,
    words,
)
from tests.runs import preferences as preferences_of
from tests.test_losses import plain_losses, ragged_batch
from train import Settings, start

# --- the loss ----------------------------------------------------------------------------------


def plain_log_prob(model: torch.nn.Module, *batch) -> torch.Tensor:
    return -torch.stack([losses.sum() for losses in plain_losses(model, *batch)])


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_loss_and_gradients_equal_a_plain_version_in_float64(beta, lora_rank):
    rows = [7, 12, 3, 5, 12, 1]
    idx, targets, _ = ragged_batch(rows)
    model, base = tiny_model(n_kv_head=2).double(), tiny_model(n_kv_head=2).double()
    if lora_rank:
        add_adapters(model, lora_rank, 4.0, ["blocks"])
        with torch.no_grad():
            for weight in adapter_weights(model).values():
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    else:
        base = tiny_model(seed=1, n_kv_head=2).double()
    with torch.no_grad():
        reference = plain_log_prob(base, idx, targets)
    given = [] if lora_rank else [reference.view(-1, 2)]
    objective = Preferences(Settings(dtype="float32", beta=beta), None, "cpu")
    arrays = tuple(tensor.numpy() for tensor in (idx, targets, *given))
    batch = objective.to_device(Batch("loss", np.arange(len(rows) // 2), arrays))
    sums = objective.sums(model, batch)
    (sums["loss"] + 0.3 * sums["loss_sft"]).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    log_p = plain_log_prob(model, idx, targets)
    loss = dpo(log_p.view(-1, 2), reference.view(-1, 2), beta).sum()
    (loss - 0.3 * log_p[::2].sum()).backward()
    assert sums["loss"].item() == pytest.approx(loss.item(), rel=1e-10)
    assert sums["loss_sft"].item() == pytest.approx(-log_p[::2].sum().item(), rel=1e-10)
    largest = max(p.grad.abs().max() for p in trained.values())
    assert largest > 1e-2
    for name, parameter in trained.items():
        assert (ours[name] - parameter.grad).abs().max() < 1e-10 * largest, name


def test_loss_and_gradient_equal_trls_on_the_same_log_probabilities():
    pytest.importorskip("trl")
    from accelerate import Accelerator
    from trl import DPOTrainer

    lengths = torch.tensor([5, 9, 3, 1, 7, 7])
    generator = torch.Generator().manual_seed(0)
    inside = torch.arange(9) < lengths[:, None]  # (rows, T)
    log_p = torch.where(inside, -torch.rand(len(lengths), 9, generator=generator), 0.0)
    log_p.requires_grad_()
    reference = -5 * torch.rand(len(lengths) // 2, 2, generator=generator)
    # ours has pairs side by side, trl's all chosen ones first
    order = torch.cat([torch.arange(0, len(lengths), 2), torch.arange(1, len(lengths), 2)])
    outputs = SimpleNamespace(log_probs=log_p[order], entropy=log_p, mean_logits=log_p)
    outputs.is_top1 = inside
    settings = {"model": SimpleNamespace(training=True), "accelerator": Accelerator(cpu=True)}
    settings |= {
        "beta": 0.4,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
    }
    settings |= {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}
    settings |= {"precompute_ref_logps": True, "aux_loss_enabled": False, "_tp_size": 1}
    settings |= {"_total_train_tokens": 0, "_metrics": {"train": defaultdict(list)}}
    trainer = SimpleNamespace(**settings)
    mask = F.pad(inside[order].long(), (1, 0))
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask}
    for side, name in enumerate(("chosen", "rejected")):
        inputs[f"ref_{name}_logps"] = reference[:, side]
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    [wanted] = torch.autograd.grad(theirs, log_p)

    losses = dpo(log_p.sum(dim=1).view(-1, 2), reference, 0.4)
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    [got] = torch.autograd.grad(losses.mean(), log_p)
    assert (got - wanted)[inside].abs().max() < 1e-6 < wanted.abs().max()


def test_the_loss_worked_by_hand():
    # the policy has doubled the odds: d = log 2, so sigmoid(d) = 2/3
    policy = torch.tensor([[math.log(0.2), math.log(0.1)]])
    reference = torch.tensor([[math.log(0.1), math.log(0.1)]])
    assert dpo(policy, reference, 1.0).item() == pytest.approx(math.log(3 / 2), rel=1e-6)
    assert dpo(reference, reference, 0.1).item() == pytest.approx(math.log(2))


def test_the_reference_is_the_model_without_adapters_and_without_dropout():
    model, batch = tiny_model(dropout=0.3), ragged_batch([7, 12])
    wanted = plain_log_prob(tiny_model(), *batch).detach()
    add_adapters(model, 3, 4.0, ["blocks"])
    torch.nn.init.normal_(model.blocks[0].attn.c_attn.lora_B)
    model.train()
    assert torch.allclose(reference_log_prob(model, *batch), wanted, rtol=1e-5)
    assert model.training and model.drop.training
    assert not torch.allclose(sequence_log_prob(model.eval(), *batch), wanted, rtol=1e-2)


# --- the data ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write(folder, tokenizer, train, val, max_tokens=128):
    meta = write_splits(
        "dpo", folder, tokenizer, {"train": train, "val": val}, ["test"], max_tokens
    )
    return Dataset(str(folder)), meta


def test_a_pair_is_two_rows_with_the_last_answer_trained(tmp_path, tokenizer):
    prompt = dialogue("谁弄权？", "宦官曹节等弄权。", "帝御何殿？")
    pairs = [(prompt, "温德殿。", "大殿。"), (dialogue("谁？"), "窦武。", "陈蕃。")]
    data, meta = write(
        tmp_path / "data", tokenizer, pairs, [(dialogue("谁弄权？"), "曹。", "张。")]
    )
    assert (data.kind, data.n_rows("train", 128), data.n_rows("val", 128)) == ("dpo", 2, 1)
    assert meta["question_end"] == "？"
    idx, targets = data.batch(np.array([1, 0]), 128)
    wanted = [[*pairs[n][0], *dialogue("", text)[1:]] for n in (1, 0) for text in pairs[n][1:]]
    rendered = [tokenizer.render(messages)[0] for messages in wanted]
    assert idx.shape == targets.shape == (4, len(rendered[2]) - 1)
    for row, (messages, ids) in enumerate(zip(wanted, rendered, strict=True)):
        n, first = len(ids) - 1, len(tokenizer.render_prompt(messages[:-1])) - 1
        assert idx[row, :n].tolist() == ids[:-1]
        answer = [*tokenizer.encode(messages[-1]["content"]), tokenizer.end]
        ignored = [IGNORE] * (len(targets[row]) - n)
        assert targets[row].tolist() == [*[IGNORE] * first, *answer, *ignored]
    assert data.input_tokens(np.array([0, 1]), 128) == sum(len(ids) - 1 for ids in rendered)


def test_both_answers_of_a_long_pair_keep_the_same_prompt(tokenizer):
    prompt = dialogue("谁弄权？", "宦官曹节等弄权。", "帝御何殿？")
    short, long = "温德殿。", "温德殿。帝惊倒，左右急救入宫，百官俱奔避。" * 2

    def size(prompt: list[dict], answer: str) -> int:
        return len(tokenizer.render([*prompt, *dialogue("", answer)[1:]])[0])

    whole, last = size(prompt, long), size(prompt[-1:], long)
    for chosen, rejected in ((short, long), (long, short)):
        for limit, kept, cut in ((whole, prompt, ""), (last, prompt[-1:], "cut: oldest turns")):
            both, how, rendered = fit_pair(tokenizer, (prompt, chosen, rejected), limit)
            assert both == [[*kept, *dialogue("", text)[1:]] for text in (chosen, rejected)]
            assert (how, rendered) == (cut, [tokenizer.render(messages) for messages in both])
        both, how, _ = fit_pair(tokenizer, (prompt, chosen, rejected), last - 1)
        shortened = both[0 if chosen == long else 1][-1]["content"]
        assert how == "cut: answer"
        assert long.startswith(shortened) and shortened.endswith("。") and shortened != long
    with pytest.raises(Skipped, match="too long"):
        fit_pair(tokenizer, (prompt, short, long), 12)
    # both are cut at the same sentence
    pair = prompt[-1:], short + "一" * 99, short + "二" * 99
    limit = size(prompt[-1:], short)
    with pytest.raises(Skipped, match="equal answers"):
        fit_pair(tokenizer, pair, limit)


def test_pairs_stay_whole_in_blocks_and_repeated_ones_are_counted(tmp_path, tokenizer, monkeypatch):
    draw = random.Random(0)
    numbers = [draw.randrange(40) for _ in range(90)]
    pairs = [(dialogue(f"第{n}回？"), "窦武。" * (1 + n % 3), f"陈蕃{n % 7}。") for n in numbers]
    splits = [*pairs[:60], (dialogue("谁？"), "窦武。", "窦武。")], pairs[60:]
    plain, meta = write(tmp_path / "plain", tokenizer, *splits)
    train, val = meta["splits"]["train"], meta["splits"]["val"]
    assert (train["pairs"], train["skipped: equal answers"]) == (len({*numbers[:60]}), 1)
    assert train["skipped: duplicate"] == 60 - train["pairs"]
    assert (val["pairs"], val["skipped: duplicate"]) == (len({*numbers[60:]} - {*numbers[:60]}), 28)
    monkeypatch.setattr(data_writer, "BLOCK", 100)
    data, again = write(tmp_path / "out", tokenizer, *splits)
    assert again["splits"]["train"] == train
    for split in ("train", "val"):
        assert data.conversations(split) == plain.conversations(split)
    rows = np.arange(data.n_rows("train", 64))
    for ours, wanted in zip(data.batch(rows, 64), plain.batch(rows, 64), strict=True):
        assert (ours == wanted).all()


Q, A, B = dialogue("谁弄权？"), "曹节。", "张让。"
TURNS = {"conversations": [{"from": "human", "value": "谁弄权？"}]}
TURNS |= {"chosen": {"from": "gpt", "value": A}, "rejected": {"from": "gpt", "value": B}}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"question": "谁弄权？", "chosen": A, "rejected": B}, (Q, A, B)),
        ({"prompt": Q, "chosen": dialogue("", A)[1:], "rejected": dialogue("", B)[1:]}, (Q, A, B)),
        ({"chosen": [*Q, *dialogue("", A)[1:]], "rejected": [*Q, *dialogue("", B)[1:]]}, (Q, A, B)),
        (TURNS, (Q, A, B)),
        ({"instruction": "谁弄权？", "input": "", "output": [A, "甲", B]}, (Q, A, B)),
        ({"prompt": "谁弄权？", "rejected": B}, (Q, None, B)),
        ({"prompt": "谁弄权？", "completion": B, "label": False}, (Q, None, B)),
        ({"messages": [*Q, *dialogue("", A)[1:]], "label": True}, (Q, A, None)),
        (
            {"system": "s", "prompt": Q, "chosen": A},
            ([{"role": "system", "content": "s"}, *Q], A, None),
        ),
        ({"prompt": "谁？"}, "missing field"),
        ({"chosen": A, "rejected": B}, "no question"),
        ({"chosen": dialogue("谁？", A), "rejected": dialogue("何？", B)}, "two prompts"),
        ({"prompt": "谁？", "chosen": A, "rejected": ""}, "empty answer"),
        ({"prompt": "谁弄权？", "chosen": A, "rejected": 3}, (Q, A, "3")),
        ({"prompt": "谁？", "chosen": A, "rejected": [3]}, "wrong type"),
        ("谁？", "wrong type"),
    ],
)
def test_preferences_of_each_form_or_what_is_wrong_with_them(value, wanted):
    try:
        assert preference(value) == wanted
    except BadRecord as error:
        assert error.reason == wanted


def test_marks_from_the_page_become_pairs_and_those_left_over_are_counted(tmp_path, capsys):
    toy_tokenizer().save(tmp_path / "tokenizer.json")
    marks = [{"prompt": f"刘备到{n}？", "chosen": f"荆州{n}。"} for n in range(20)]
    marks += [{"prompt": f"刘备到{n}？", "rejected": f"徐州{n}。"} for n in (*range(20), 7)]
    write_lines(tmp_path / "marks.jsonl", [*marks, "{"])
    argv = [f"--{name}={tmp_path}" for name in ("tokenizer", "out")]
    prepare_dpo.main([*argv, f"--input={tmp_path}/marks.jsonl", "--val=0.3"])
    data = Dataset(str(tmp_path))
    pairs = pairs_of(data, "train") | pairs_of(data, "val")
    assert pairs == {f"刘备到{n}？": (f"荆州{n}。", f"徐州{n}。") for n in range(20)}
    assert (data.meta["records"], data.meta["skipped"]) == (41, {"broken JSON": 1})
    assert data.meta["not_taken"] == {"without a counterpart": 1}
    assert "41 good records; of these not taken: 1 without a cou" in capsys.readouterr().out
    prepare_dpo.main([*argv, f"--input={tmp_path}/marks.jsonl", "--val=1e-9"])
    assert Dataset(str(tmp_path)).meta["splits"]["val"]["pairs"] == 1


# --- runs --------------------------------------------------------------------------------------

LORA = {"lora_rank": 4, "lora_alpha": 8}
each_way = pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])


@pytest.fixture(scope="module")
def sft(toys):
    """toys, and sft and sft_lora, models that answer."""
    common = {"dataset": toys / "questions", "init_from": toys / "base", "max_iters": 40}
    train_here(out_dir=toys / "sft", dropout=0.1, **common)
    train_here(out_dir=toys / "sft_lora", **common, **LORA, learning_rate=1e-2)
    return toys


@pytest.mark.parametrize("lora", [{}, LORA])
def test_the_loss_of_the_model_that_is_its_own_reference_is_log_2(sft, tmp_path, lora):
    given = {"dtype": "bfloat16", "learning_rate": 0, "max_iters": 4, **lora}
    *_, record = records = log(run_dpo(sft, tmp_path / "out", **given))
    losses = [record["val_loss"], *(r["train_loss"] for r in records)]
    assert losses == pytest.approx([math.log(2)] * 5, abs=1e-6)
    assert record["margin"] == record["val_margin"] == 0


def run_dpo(sft, out_dir, **settings):
    common = {"dataset": sft / "pairs", "init_from": sft / "sft", "learning_rate": 3e-3}
    return train_here(out_dir=out_dir, **(common | settings))


@pytest.mark.parametrize(("base", "lora"), [("sft", {}), ("sft_lora", LORA)])
def test_a_run_starts_at_log_2_and_learns_the_preference(sft, tmp_path, base, lora):
    # at first each pair's log-probabilities are those of its reference
    rate = 1e-2 if lora else 3e-3
    out = run_dpo(sft, tmp_path / "out", init_from=sft / base, learning_rate=rate, **lora)
    first, last = log(out)[0], log(out)[-1]
    assert first["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert last["val_loss"] < 0.6 and last["val_accuracy"] > 0.9 and last["val_margin"] > 0.2
    assert load_checkpoint(out).answers


@each_way
def test_the_log_says_what_a_slow_loop_says_of_the_held_out_pairs(sft, tmp_path, lora):
    options = {"beta": 0.3, "dpo_sft_weight": 0.5, "max_iters": 10}
    out = run_dpo(sft, tmp_path / "out", batch_size=3, **options, **lora)
    data = Dataset(str(sft / "pairs"))
    models = load_checkpoint(out, "latest").model, load_checkpoint(sft / "sft").model
    rows = []
    for _, (idx, targets) in data.row_batches("val", 1):
        batch = torch.tensor(idx), torch.tensor(targets)
        with torch.no_grad():
            policy, base = (plain_log_prob(model, *batch).double() for model in models)
        rows.append((*policy, *(0.3 * (policy - base)), (targets[0] != IGNORE).sum()))
    chosen, rejected, reward, other, lengths = np.array(rows).T
    wanted = {
        "loss": np.log1p(np.exp(other - reward)).mean(),
        "loss_sft": -chosen.sum() / lengths.sum(),
        "logp_chosen": chosen.mean(),
        "logp_rejected": rejected.mean(),
        "rewards_chosen": reward.mean(),
        "rewards_rejected": other.mean(),
        "margin": (reward - other).mean(),
        "accuracy": (reward > other).mean(),
    }
    for name, value in wanted.items():
        assert log(out)[-1][f"val_{name}"] == pytest.approx(value, rel=1e-3), name


def test_accumulated_micro_batches_of_pairs_equal_the_full_batch(sft, tmp_path):
    names = ("train_loss", "train_loss_sft", "grad_norm", "logp_chosen")
    settings = {"dataset": sft / "pairs", "init_from": sft / "sft", "dpo_sft_weight": 0.5}
    assert_accumulation_is_exact(tmp_path, names, **settings)


@each_way
def test_a_run_in_three_parts_equals_one_in_one(sft, tmp_path, lora):
    settings = {"dataset": sft / "pairs", "init_from": sft / "sft", "dpo_sft_weight": 0.1} | lora
    assert_resumes_exactly(tmp_path, dropout=0.1, gradient_accumulation_steps=2, **settings)


def test_the_reference_is_computed_once_and_a_run_that_lost_it_stops(sft, tmp_path, capsys):
    out = run_dpo(sft, tmp_path / "out", max_iters=2)
    assert "reading pairs with the model as it is" in capsys.readouterr().out
    written = (out / "reference.safetensors").read_bytes()
    train_here(out_dir=out, resume=True, max_iters=4)
    assert "reading pairs" not in capsys.readouterr().out
    assert (out / "reference.safetensors").read_bytes() == written
    adapted = run_dpo(sft, tmp_path / "adapted", max_iters=2, **LORA)
    assert not (adapted / "reference.safetensors").exists()
    (out / "reference.safetensors").unlink()
    with pytest.raises(UserError, match=r"has lost its reference\.safetensors"):
        train_here(out_dir=out, resume=True, max_iters=6)


def test_held_out_pairs_that_were_prepared_anew_stop_a_run(sft, tmp_path):
    data = shutil.copytree(sft / "pairs", tmp_path / "pairs")
    out = run_dpo(sft, tmp_path / "out", dataset=data, max_iters=1)
    pairs = {"train": preferences_of(3, 60), "val": preferences_of(5, 9)}
    write_splits("dpo", data, toy_tokenizer(), pairs, ["a test"], max_tokens=32)
    with pytest.raises(UserError, match=r"pairs/val\.bin is not what this run began with"):
        train_here(out_dir=out, resume=True, max_iters=2)


def test_the_reference_of_another_model_is_not_taken(sft, tmp_path):
    # what a run that was killed before its first checkpoint leaves behind
    out = run_dpo(sft, tmp_path / "out", max_iters=1)
    left = tmp_path / "left"
    left.mkdir()
    shutil.copy(out / "reference.safetensors", left)
    run_dpo(sft, left, max_iters=1, init_from=sft / "sft_lora")
    assert log(left)[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (left / "reference.safetensors").read_bytes() != (
        out / "reference.safetensors"
    ).read_bytes()


def test_dropout_is_off_unless_it_is_asked_for(sft, tmp_path):
    given = {"init_from": sft / "sft", "out_dir": tmp_path / "out", "device": "cpu"}
    for dataset, asked, dropout in (
        ("pairs", {}, 0),
        ("pairs", {"dropout": 0.2}, 0.2),
        ("questions", {}, 0.1),
    ):
        run, _ = start(words(dataset=sft / dataset, **given, **asked))
        assert run.config.dropout == dropout


def test_errors_of_preferences_are_one_line(sft, tmp_path):
    for settings, message in (
        ({"init_from": "scratch"}, "changes a trained model"),
        ({"lora_rank": 2, "lora_targets": "lm_head", "dropout": 0.1}, "needs dropout=0"),
    ):
        with pytest.raises(UserError, match=message):
            run_dpo(sft, tmp_path / "out", **settings)
