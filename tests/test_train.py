"""Laws of training: what may change its course, what may not, and what it says and writes."""

import math

import pytest
import torch

import train
from data_utils import write_pretrain
from tests.runs import (
    assert_same_run,
    checkpoint_file,
    contents,
    log,
    novel,
    pointer,
    saved,
    toy_tokenizer,
    train_here,
    weights,
    write_toys,
)
from train import Settings, learning_rate, make_optimizer


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A directory with the datasets text and questions, and novel, a model of the text."""
    folder = tmp_path_factory.mktemp("toys")
    write_toys(folder)
    train_here(dataset=folder / "text", out_dir=folder / "novel", max_iters=30)
    return folder


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


# --- the course of a run -----------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["text", "questions"])
def test_accumulated_micro_batches_equal_the_full_batch(toys, tmp_path, dataset):
    # rows of very different numbers of trained tokens: a mean of means would be another gradient
    common = {"dataset": toys / dataset, "max_iters": 3, "learning_rate": 1e-4, "warmup_iters": 0}
    once = train_here(out_dir=tmp_path / "once", batch_size=8, **common)
    four = train_here(
        out_dir=tmp_path / "four", batch_size=2, gradient_accumulation_steps=4, **common
    )
    other = train_here(out_dir=tmp_path / "other", batch_size=8, seed=1, **common)
    assert largest_difference(weights(once), weights(four)) < 1e-6
    assert largest_difference(weights(once), weights(other)) > 1e-4
    for a, b in zip(log(once), log(four), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["tokens"] == b["tokens"]


def test_evaluation_does_not_disturb_the_training(toys, tmp_path):
    for interval in (5, 10):
        out = tmp_path / str(interval)
        train_here(dataset=toys / "text", out_dir=out, eval_interval=interval, dropout=0.2)
    assert largest_difference(weights(tmp_path / "5"), weights(tmp_path / "10")) == 0
    columns = [
        [(r["iter"], r["train_loss"], r["grad_norm"]) for r in log(tmp_path / name)]
        for name in ("5", "10")
    ]
    assert columns[0] == columns[1]


def test_the_loss_falls_far_below_a_uniform_guess(toys, tmp_path):
    out = train_here(
        dataset=toys / "text", out_dir=tmp_path / "out", max_iters=150, learning_rate=1e-2
    )
    losses = [record["val_loss"] for record in log(out) if "val_loss" in record]
    uniform = math.log(toy_tokenizer().n_vocab)
    # a sentence is one of 8 people, 4 deeds and 5 places: 160 kinds of some 5 tokens each
    assert losses[-1] < 0.4 * uniform
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(toys, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        train_here(dataset=toys / "text", out_dir=tmp_path / name, seed=seed, dropout=0.1)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert largest_difference(weights(tmp_path / "a"), weights(tmp_path / "c")) > 0


def test_dropout_takes_part_in_training_and_not_in_evaluation(toys, tmp_path):
    # at a learning rate of 0 the model stays what it is
    common = {"dataset": toys / "text", "max_iters": 3, "eval_interval": 1, "learning_rate": 0}
    dry = log(train_here(out_dir=tmp_path / "dry", **common))
    wet = log(train_here(out_dir=tmp_path / "wet", dropout=0.5, **common))
    assert {r["val_loss"] for r in wet} == {r["val_loss"] for r in dry}
    assert all(a["grad_norm"] != b["grad_norm"] for a, b in zip(dry, wet, strict=True))


def test_best_is_the_lowest_validation_loss_and_patience_ends_the_run(tmp_path, capsys):
    # three sentences learnt by heart: the validation loss falls, then rises
    texts = {"train": [novel(0, 12)], "val": [novel(1, 40)]}
    write_pretrain(tmp_path / "small", toy_tokenizer(), texts, ["a test"])
    common = {"max_iters": 400, "learning_rate": 1e-2, "eval_interval": 10, "patience": 3}
    out = train_here(dataset=tmp_path / "small", out_dir=tmp_path / "out", **common)
    losses = {r["iter"]: r["val_loss"] for r in log(out) if "val_loss" in r}
    best = min(losses, key=losses.get)
    last = max(losses)
    assert pointer(out, "best") == f"step-{best:06d}"
    assert pointer(out, "latest") == f"step-{last:06d}"
    assert last == best + 3 * 10 < 400
    assert {path.name for path in out.glob("*step-*")} == {
        pointer(out, "best"),
        pointer(out, "latest"),
    }
    assert saved(out)["progress"]["best_val_loss"] == losses[best]
    assert "out of patience" in capsys.readouterr().out

    before = contents(out)
    train_here(out_dir=out, resume=True)
    assert contents(out) == before
    assert f"finished at step {last}, nothing to do" in capsys.readouterr().out

    train_here(out_dir=out, resume=True, patience=5)
    assert saved(out)["progress"]["iter"] == last + 20


def test_a_finished_run_resumed_does_nothing(toys, tmp_path, capsys):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", max_iters=4)
    before = contents(out)
    train_here(out_dir=out, resume=True)
    assert contents(out) == before
    assert "finished at step 4, nothing to do" in capsys.readouterr().out


# --- learning rate and optimizer ---------------------------------------------------------------


def test_the_learning_rate_rises_and_falls_on_straight_lines():
    config = Settings(learning_rate=1.0, min_lr=0.2, warmup_iters=4, max_iters=12)
    rates = [learning_rate(step, config) for step in range(14)]
    rise, fall = [0.25, 0.5, 0.75, 1.0], [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2]
    assert rates == pytest.approx(rise + fall)


def test_without_lr_decay_iters_the_decay_ends_with_the_run():
    for steps in (10, 40):
        follows = Settings(learning_rate=1.0, warmup_iters=0, max_iters=steps)
        assert learning_rate(steps // 2, follows) == pytest.approx(0.5)
        assert learning_rate(steps, follows) == 0
    apart = Settings(learning_rate=1.0, warmup_iters=0, max_iters=40, lr_decay_iters=10)
    assert learning_rate(5, apart) == pytest.approx(0.5)
    assert learning_rate(30, apart) == 0


def test_a_warm_up_longer_than_the_run_only_rises():
    config = Settings(learning_rate=1.0, warmup_iters=100, max_iters=10)
    rates = [learning_rate(step, config) for step in range(10)]
    assert rates == pytest.approx([0.01 * (step + 1) for step in range(10)])


def test_the_first_step_moves_each_weight_by_the_logged_learning_rate(toys, tmp_path):
    # Adam's first step is lr x sign(gradient), wherever the gradient is far above its epsilon
    common = {"dataset": toys / "text", "warmup_iters": 2, "weight_decay": 0, "learning_rate": 1e-2}
    zero = train_here(out_dir=tmp_path / "zero", max_iters=1, **common | {"learning_rate": 0})
    one = train_here(out_dir=tmp_path / "one", max_iters=1, **common)
    assert log(one)[0]["lr"] == pytest.approx(5e-3)
    moved = weights(one)["blocks.0.attn.c_proj.weight"] - weights(zero)["blocks.0.attn.c_proj.weight"]
    assert moved.abs().median().item() == pytest.approx(5e-3, rel=1e-3)


def test_only_matrices_decay(toys, tmp_path):
    common = {"dataset": toys / "text", "max_iters": 1, "warmup_iters": 0, "bias": True}
    plain = weights(train_here(out_dir=tmp_path / "plain", weight_decay=0, **common))
    decayed = weights(train_here(out_dir=tmp_path / "decayed", weight_decay=5, **common))
    assert any(name.endswith("bias") for name in plain)
    for name, value in plain.items():
        assert torch.equal(value, decayed[name]) == (value.dim() < 2), name
    # a decayed weight lost lr x weight_decay of itself
    padding = 320  # a row of the embedding that no text has: its gradient is 0
    text = {"train": [novel(0, 400)], "val": [novel(1, 40)]}
    write_pretrain(tmp_path / "odd", toy_tokenizer(315), text, ["a test"])
    common = common | {"dataset": tmp_path / "odd"}
    plain = weights(train_here(out_dir=tmp_path / "p", weight_decay=0, **common))["wte.weight"]
    decayed = weights(train_here(out_dir=tmp_path / "d", weight_decay=5, **common))["wte.weight"]
    assert len(plain) == padding
    assert torch.allclose(decayed[315:], plain[315:] * (1 - 1e-3 * 5), atol=0, rtol=1e-6)


def test_every_parameter_is_optimized_once():
    model = train.GPT(train.ModelConfig(n_layer=1, n_head=2, n_embd=8, n_vocab=10, bias=True))
    optimizer = make_optimizer(model, Settings(), "cpu")
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(optimized) == len({id(p) for p in optimized})
    assert {id(p) for p in optimized} == {id(p) for p in model.parameters()}


def test_gradients_are_clipped_to_their_norm(toys, tmp_path):
    # Adam's step does not see the scale of all gradients, but its saved first moment does
    common = {"dataset": toys / "text", "max_iters": 1, "warmup_iters": 0}
    norms = {}
    for clip in (0, 0.1):
        out = train_here(out_dir=tmp_path / str(clip), grad_clip=clip, **common)
        moments = torch.load_moments(out) if False else first_moments(out)
        norms[clip] = math.sqrt(sum(m.double().square().sum().item() for m in moments)) / (1 - 0.9)
        assert log(out)[0]["grad_norm"] > 0.5  # logged as it was before
    assert norms[0] == pytest.approx(log(tmp_path / "0")[0]["grad_norm"], rel=1e-4)
    assert norms[0.1] == pytest.approx(0.1, rel=1e-3)


def first_moments(out):
    tensors = train_state(out)
    return [value for name, value in tensors.items() if name.endswith(":exp_avg")]


def train_state(out):
    from safetensors.torch import load_file

    return load_file(checkpoint_file(out, "optimizer.safetensors"))


# --- what it writes ----------------------------------------------------------------------------
