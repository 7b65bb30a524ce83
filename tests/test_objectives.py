"""Objectives: what a step reads, what is mixed with what weight, and the seam for a new one."""

import math
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data_utils import IGNORE, Dataset
from miniglm.checkpoint import load_checkpoint
from miniglm.losses import split_sums
from miniglm.objectives import NextToken
from miniglm.stages import OBJECTIVES
from tests.runs import (
    TINY,
    assert_accumulation_is_exact,
    assert_same_run,
    checkpoint_file,
    log,
    train_here,
    weights,
    words,
)
from train import start, steps


class Smoothed(NextToken):
    """A new objective: label smoothing, for which train.py has no line."""

    def sums(self, model, batch):
        idx, targets, *_ = batch.arrays
        logits = model.head(model(idx)).flatten(0, 1)
        loss = F.cross_entropy(
            logits, targets.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=0.3
        )
        guessed = (logits.argmax(dim=1) == targets.flatten()).sum()
        return {"loss": loss, "accuracy": guessed.float()}

    def counts(self, batches):
        count = super().counts(batches)["loss"]
        return {"loss": count, "accuracy": count}

    def describe(self, record):
        return f"accuracy {record['accuracy']:.2f}, {super().describe(record)}"


def test_train_runs_a_new_objective_without_being_changed(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(OBJECTIVES, "pretrain", Smoothed)
    common = {"dataset": toys / "text", "dropout": 0.1, "lr_decay_iters": 20}
    whole = train_here(out_dir=tmp_path / "whole", **common)
    assert "accuracy 0." in capsys.readouterr().out
    first, last = log(whole)[0], log(whole)[-1]
    assert first["accuracy"] < last["accuracy"] and last["train_loss"] < first["train_loss"]
    parts = train_here(out_dir=tmp_path / "parts", max_iters=10, **common)
    train_here(out_dir=parts, resume=True, max_iters=20)
    assert_same_run(whole, parts)


class Sampled(NextToken):
    """An objective whose rows depend on the weights; it notes those that it sees."""

    needs_newest_weights = True
    seen: ClassVar[list[float]] = []

    def begin(self, model, out_dir, step):
        self.model = model

    def batches(self, start, step):
        self.seen.append(self.model.wte.weight.detach().sum().item())
        return super().batches(start, step)


def test_rows_that_need_the_newest_weights_are_made_after_the_step_before(
    toys, tmp_path, monkeypatch
):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "plain", max_iters=4)
    monkeypatch.setitem(OBJECTIVES, "pretrain", Sampled)
    sampled = train_here(dataset=toys / "text", out_dir=tmp_path / "sampled", max_iters=4)
    assert len(set(Sampled.seen)) == len(Sampled.seen) == 4
    for name, weight in weights(out).items():
        assert torch.equal(weight, weights(sampled)[name])


# --- texts beside questions --------------------------------------------------------------------


def mixed(toys, questions: int = 3, texts: int = 1) -> str:
    return f"{toys}/questions:{questions},{toys}/text:{texts}"


def test_each_kind_is_a_term_divided_by_its_own_count(toys, tmp_path):
    settings = TINY | {"dataset": mixed(toys), "init_from": toys / "base", "mix_weight": 0.25}
    settings |= {"batch_size": 16, "dropout": 0.0, "out_dir": tmp_path / "out"}
    run, state = start(words(**settings))
    batches, counts, tokens = next(steps(run, state))
    assert [batch.term for batch in batches] == ["loss", "loss_text"]
    assert {b.term: int((b.arrays[1] != IGNORE).sum()) for b in batches} == counts
    assert counts["loss_text"] == 32 * len(batches[1].rows)
    sums = {b.term: run.objective.sums(state.model, b)[b.term] for b in batches}
    wanted = sums["loss"] / counts["loss"] + 0.25 * sums["loss_text"] / counts["loss_text"]
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(wanted, parameters)])
    one_step = {"max_iters": 1, "grad_clip": 0, "optimizer": "adamw"}
    out = train_here(**settings | one_step)
    names = [name for name, _ in state.model.named_parameters()]
    tensors = load_file(checkpoint_file(out, "optimizer.safetensors"))
    found = torch.cat([tensors[f"{name}:exp_avg"].flatten() for name in names]) / 0.1
    assert torch.allclose(found, wanted, atol=1e-6) and wanted.abs().max() > 1e-2
    [record] = log(out)
    assert record["train_loss"] == pytest.approx((sums["loss"] / counts["loss"]).item(), rel=1e-5)
    text_loss = (sums["loss_text"] / counts["loss_text"]).item()
    assert record["train_loss_text"] == pytest.approx(text_loss, rel=1e-5)
    assert record["tokens"] == tokens


def test_a_window_means_over_the_steps_that_had_a_term(toys, tmp_path):
    common = {"dataset": mixed(toys, 8), "init_from": toys / "base", "max_iters": 10}
    each = log(train_here(out_dir=tmp_path / "each", **common))
    [window] = log(train_here(out_dir=tmp_path / "window", log_interval=10, **common))
    had = [record["train_loss_text"] for record in each if "train_loss_text" in record]
    assert len(had) < 10 and window["train_loss_text"] == pytest.approx(sum(had) / len(had))


def test_accumulated_micro_batches_of_both_kinds_equal_the_full_batch(toys, tmp_path):
    names = ("train_loss", "train_loss_text", "grad_norm")
    assert_accumulation_is_exact(tmp_path, names, dataset=mixed(toys))


def test_each_question_comes_once_an_epoch_whatever_lies_beside_it(toys, tmp_path):
    settings = TINY | {"dataset": mixed(toys), "batch_size": 16, "out_dir": tmp_path / "out"}
    run, _ = start(words(**settings))
    questions = Dataset(str(toys / "questions"))
    n = questions.n_rows("train", 32)
    found, step = [], 0
    while len(found) < 2 * n:
        batches, _ = run.objective.batches(16 * step, step)
        found += [row for batch in batches if batch.term == "loss" for row in batch.rows.tolist()]
        step += 1
    assert sorted(found[:n]) == sorted(found[n : 2 * n]) == [*range(n)] != found[:n]


def test_the_log_says_how_texts_and_questions_are_kept(toys, tmp_path):
    out = train_here(dataset=mixed(toys), out_dir=tmp_path / "out")
    checkpoint = load_checkpoint(out, "latest")
    last = log(out)[-1]
    for name, key in (("text", "val_bits_per_byte_text"), ("questions", "val_bits_per_byte")):
        data = Dataset(str(toys / name))
        nats, count, n_bytes = split_sums(checkpoint.model, data, "val", 7)
        assert last[key] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert last["val_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert checkpoint.answers


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_have_few_lengths(toys, device):
    """Each new length costs memory or a compilation for as long as a process runs."""
    config = SimpleNamespace(**TINY | {"block_size": 40, "rows_per_step": 4, "seed": 1})
    config.mix_weight, config.short_block, config.shard, config.batch_size = 1, None, False, 4
    objective = NextToken(config, Dataset(toys / "questions"), device)
    batches = [batch for step in range(20) for batch in objective.batches(4 * step, step)[0]]
    lengths = {batch.arrays[0].shape[1] for batch in batches}
    assert lengths <= ({16, 32, 40} if device == "cpu" else {40})


def test_rows_of_one_kind_are_padded_to_the_longest_dataset(toys):
    run, _ = start(words(**TINY | {"dataset": mixed(toys), "out_dir": toys / "none"}))
    rows = run.data.by_kind(run.data.step_rows(1, 0, 40, 32))
    assert [*rows] == ["sft", "pretrain"] and sum(map(len, rows.values())) == 40
    for own in rows.values():
        idx, targets = run.data.batch(own, 32)
        for row in range(len(own)):
            alone, wanted = run.data.batch(own[row : row + 1], 32)
            T = alone.shape[1]
            assert (idx[row, :T] == alone[0]).all() and (targets[row, :T] == wanted[0]).all()
            assert (targets[row, T:] == np.full(idx.shape[1] - T, IGNORE)).all()
