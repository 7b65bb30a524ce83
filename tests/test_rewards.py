"""Rewards: the objective against a plain version, what is sampled, whole runs, rewards of users."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configurator import UserError
from miniglm.checkpoint import load_checkpoint
from miniglm.objectives import Batch
from miniglm.rewards import REWARDS, TEMPERATURE, advantages, find_reward, total
from tests.runs import (
    assert_resumes_exactly,
    log,
    train_here,
    words,
)
from train import start, steps

LORA = {"lora_rank": 4, "lora_alpha": 8, "num_samples": 4}
LONG = "def reward(question, answer, reference, ended):\n    return len(answer) / 10\n"


@pytest.fixture(scope="module")
def sft(toys):
    """toys, with sft, a model that answers."""
    common = {"dataset": toys / "questions", "init_from": toys / "base", "max_iters": 60}
    train_here(out_dir=toys / "sft", **common, batch_size=16, learning_rate=3e-3)
    return toys


def run_rewards(sft, out_dir, **settings):
    common = {"dataset": sft / "questions", "init_from": sft / "sft", "reward": "chrf"}
    return train_here(out_dir=out_dir, **(common | LORA | settings))


# --- the loss ----------------------------------------------------------------------------------


def test_a_step_has_the_loss_and_gradient_of_a_plain_version(sft, tmp_path):
    """With an adapter that is not zero: advantages in each question, the mean over all tokens, and
    the KL to the model without the adapter."""
    out = run_rewards(sft, tmp_path / "out", max_iters=4, learning_rate=2e-2)
    argv = words(out_dir=out, resume=True, max_iters=5)
    run, state = start(argv)
    run.objective.begin(state.model, out, 4)
    batches, counts, tokens = next(steps(run, state))
    assert len({batch.arrays[0].shape[1] for batch in batches}) > 1
    batch = joined(batches)
    sums = run.objective.sums(state.model, batch)
    loss = sums["loss"] / counts["loss"] + 0.1 * sums["kl"] / counts["kl"]
    trained = {n: p for n, p in state.model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(loss, trained.values())

    idx, targets, _, given, measured = batch.arrays
    base, answered = load_checkpoint(sft / "sft", "best").model, targets != -100
    wanted = np.zeros(16)
    for row in set(batch.rows):
        own = measured[batch.rows == row, 0].double().numpy()
        wanted[batch.rows == row] = advantages(own[None])[0]
    assert given.tolist() == pytest.approx(wanted, abs=1e-3) and np.abs(wanted).max() > 0.5
    logits = [model.head(model(idx)) / TEMPERATURE for model in (state.model, base)]
    log_p, reference = (
        z.log_softmax(-1).gather(2, targets.clamp_min(0)[..., None])[..., 0] for z in logits
    )
    d = (reference - log_p)[answered]
    kl = d.detach().exp() - d.detach() - 1
    surrogate = -(log_p * given[:, None])[answered] + 0.1 * (d.exp() - d - 1)
    assert sums["kl"].item() == pytest.approx(kl.sum().item(), rel=1e-3) and kl.mean() > 1e-4
    plain = torch.autograd.grad(surrogate.sum() / answered.sum(), trained.values())
    largest = max(g.abs().max() for g in plain)
    assert largest > 1e-3
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max() < 1e-4 * largest
    assert counts["loss"] == answered.sum() and counts["reward"] == 16
    assert 0 < tokens <= idx.numel()
    each = [run.objective.sums(state.model, batch) for batch in batches]
    for name, value in sums.items():
        assert sum(own[name] for own in each).item() == pytest.approx(value.item(), abs=1e-4)
    parts, _ = start([*argv, "--batch_size=2", "--gradient_accumulation_steps=2"])
    parts.objective.begin(state.model, out, 4)
    accumulated, _ = parts.objective.batches(16, 4)
    assert len(accumulated) == 2 * len(batches)
    answers = [by_row(own) for own in (batch, joined([*map(run.objective.to_device, accumulated)]))]
    assert answers[0] == answers[1]
    second = parts.objective.parts(16)[1][1]
    assert parts.objective.show_rows(16, 4, 0, 4) == run.data.show_rows(second)


def by_row(batch: Batch) -> list[tuple]:
    """Each sample's row, trained ids and reward, in one order."""
    _, targets, _, _, measured = batch.arrays
    ids = [tuple(row[row != -100].tolist()) for row in targets]
    return sorted(zip(batch.rows.tolist(), ids, measured[:, 0].tolist(), strict=True))


def joined(batches: list[Batch]) -> Batch:
    """The rows of micro-batches as one, on the device."""
    T = max(batch.arrays[0].shape[1] for batch in batches)
    idx, targets, _, *more = zip(*(batch.arrays for batch in batches), strict=True)
    idx = torch.cat([F.pad(rows, (0, T - rows.shape[1])) for rows in idx])
    targets = torch.cat([F.pad(rows, (0, T - rows.shape[1]), value=-100) for rows in targets])
    places = (targets != -100).flatten().nonzero().flatten()
    more = [torch.cat(values) for values in more]
    rows = np.concatenate([batch.rows for batch in batches])
    return Batch("loss", rows, (idx, targets, places, *more))


def test_advantages_worked_by_hand():
    found = advantages(np.array([[0.0, 1.0], [0.3, 0.3]]))
    assert found == pytest.approx(np.array([[-(0.5**0.5), 0.5**0.5], [0, 0]]), abs=1e-3)


def test_what_is_rewarded_is_what_was_sampled(sft, tmp_path):
    run, state = start(
        words(
            **{"dataset": sft / "questions", "init_from": sft / "sft"},
            **LORA,
            reward="rouge_l",
            out_dir=tmp_path / "out",
            device="cpu",
            block_size=32,
            batch_size=3,
            dtype="float32",
        )
    )
    run.objective.begin(state.model, tmp_path / "out", 0)
    batches, _ = run.objective.batches(0, 0)
    again, _ = run.objective.batches(0, 0)
    later, _ = run.objective.batches(3, 1)
    for batch, other in zip(batches, again, strict=True):
        assert (batch.arrays[0] == other.arrays[0]).all()
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows) == sorted(np.repeat(run.objective.parts(0)[0], 4))
    assert not set(rows) <= {row for batch in later for row in batch.rows}
    batch = joined([run.objective.to_device(batch) for batch in batches])
    widths = [batch.arrays[0].shape[1] for batch in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1]  # of rows alike in length
    assert run.objective.show_rows(0, 0, 0, 3) == run.data.show_rows(run.objective.parts(0)[1][0])
    run.objective.multiple = 5  # as 64 on a GPU
    padded, _ = run.objective.batches(0, 0)
    assert {b.arrays[0].shape[1] for b in padded} <= {*range(0, 32, 5), 32}
    for batch_a, batch_b in zip(batches, padded, strict=True):
        assert (batch_a.arrays[1] != -100).sum() == (batch_b.arrays[1] != -100).sum()
    conversations, tokenizer = run.data.conversations("train"), run.data.tokenizer
    idx, targets, _, _, measured = batch.arrays
    texts = set()
    for place, row in enumerate(batch.rows.tolist()):
        ids = targets[place][targets[place] != -100].tolist()
        messages = conversations[row]
        prompt = tokenizer.render_prompt(messages[:-1])
        assert idx[place][: len(prompt)].tolist() == prompt
        n = len(tokenizer.render(messages)[0]) - len(prompt)
        most = min(run.data.meta["max_tokens"] - len(prompt), 2 * n + 16)
        assert run.objective.question("train", row)[1] == most >= len(ids)
        assert targets[place].tolist().index(ids[0]) == len(prompt) - 1
        reward, _, length, ended = measured[place].tolist()
        answer = tokenizer.decode([id for id in ids if id != tokenizer.end]).strip()
        assert (length, ended) == (len(ids), ids[-1] == tokenizer.end)
        question, reference = messages[0]["content"], messages[1]["content"]
        assert reward == pytest.approx(REWARDS["rouge_l"](question, answer, reference, True))
        texts.add(answer)
    assert len(texts) > 4


# --- runs --------------------------------------------------------------------------------------


def test_a_users_reward_rises_in_training_and_validation(sft, tmp_path):
    (tmp_path / "long.py").write_text(LONG, encoding="utf-8")
    settings = {"reward": tmp_path / "long.py", "beta": 0, "batch_size": 8, "learning_rate": 2e-2}
    first, *_, last = log(run_rewards(sft, tmp_path / "out", max_iters=30, **settings))
    assert last["reward"] > 1.3 * first["reward"] and "kl" not in last
    assert last["val_reward"] == -last["val_loss"] > 0 and last["length"] > first["length"]


def test_rewards_resume_exactly(sft, tmp_path):
    common = {"dataset": sft / "questions", "init_from": sft / "sft", "reward": "chrf", **LORA}
    whole, _ = assert_resumes_exactly(tmp_path, **common)
    assert {"reward", "spread", "kl", "length", "ended"} <= log(whole)[0].keys()


def test_a_dry_run_samples_too(sft, tmp_path, capsys):
    run_rewards(sft, tmp_path / "out", dry_run=True)
    assert "tokens per second" in capsys.readouterr().out and not (tmp_path / "out").exists()


# --- rewards -----------------------------------------------------------------------------------


def test_rewards_worked_by_hand():
    def rewards(answer: str, ended: bool = True) -> list[float]:
        return [f("谁？", answer, "刘备到荆州。", ended) for f in REWARDS.values()]

    assert rewards("刘备到荆州。") == pytest.approx([1, 1, 1, 1])
    chrf, bleu, rouge, form = rewards("刘备到荆州", ended=False)
    assert (rouge, form) == (pytest.approx(10 / 11), 0) and 0.5 < chrf < 0.9
    assert bleu == pytest.approx(math.exp(-1 / 5))  # all n-grams are right, one of 6 is missing
    assert REWARDS["bleu"]("谁？", "孔明", "孔明", True) == pytest.approx(1)  # too short for four
    assert REWARDS["bleu"]("谁？", "孔明孔明", "孔明", True) < 0.6
    assert rewards("")[1:] == [0, 0, 0] and rewards("刘备刘备刘备刘备")[3] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return float('nan')",
            "gave nan for the answer '荆州。' to '谁？'; it must be a number within",
        ),
        ("return 'good'", "my.py gave good for"),
        ("return None", "my.py gave None for"),
        ("return 10**400", "my.py gave 1000000000"),
        ("raise SystemExit(3)", "my.py failed for"),
        ("return 1 / 0", "my.py failed for the answer '荆州。' to '谁？': ZeroDivisionError: div"),
    ],
)
def test_a_reward_that_fails_is_one_line(tmp_path, body, message):
    file = tmp_path / "my.py"
    file.write_text(f"def reward(question, answer, reference, ended):\n    {body}\n", "utf-8")
    with pytest.raises(UserError, match=message) as error:
        total([("my.py", find_reward(str(file)))], "谁？", "荆州。", "徐州。", True)
    assert "\n" not in str(error.value)


def test_rewards_that_cannot_be_had_are_one_line(sft, tmp_path):
    file = tmp_path / "my.py"
    for text, message in (("x = 1", "has no function reward"), ("x = ", "SyntaxError")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            find_reward(str(file))
    for settings, message in (
        ({"reward": "chrv"}, "no such file or reward; did you mean 'chrf'"),
        ({"reward": "none.py"}, "no such file or reward"),
        ({"lora_rank": 0}, "pass --lora_rank=, or --beta=0"),
        ({"dataset": sft / "text"}, "reward= takes one data set of questions"),
        ({"shard": True}, "shard=True does not go with marks or rewards"),
        ({"init_from": "scratch"}, "changes a trained model"),
    ):
        with pytest.raises(UserError, match=message):
            run_rewards(sft, tmp_path / "out", **settings)
