"""Laws of training: what may change its course, what may not, and what it says and writes."""

import dataclasses
import math
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configurator import ROOT, UserError
from data_utils import Dataset
from lstm_model import LSTM
from miniglm.optim import learning_rate, make_optimizers
from miniglm.prep.writer import write_pretrain
from model import GPT, ModelConfig
from tests.runs import (
    TINY,
    assert_same_run,
    checkpoint_file,
    contents,
    course,
    log,
    novel,
    pointer,
    saved,
    toy_tokenizer,
    train_here,
    weights,
    words,
)
from train import Settings, start, steps, train_step


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def validation_losses(out_dir: Path) -> dict[int, float]:
    return {record["iter"]: record["val_loss"] for record in log(out_dir) if "val_loss" in record}


# --- the course of a run -----------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["text", "questions"])
def test_accumulated_micro_batches_equal_the_full_batch(toys, tmp_path, dataset):
    # the answers' lengths differ, so a mean of the micro-batches' means would be another loss
    common = {"dataset": toys / dataset, "max_iters": 3, "learning_rate": 1e-4, "warmup_iters": 0}
    once = train_here(out_dir=tmp_path / "once", batch_size=8, **common)
    parts = {"batch_size": 2, "gradient_accumulation_steps": 4}
    four = train_here(out_dir=tmp_path / "four", **parts, **common)
    assert largest_difference(weights(once), weights(four)) < 1e-6
    for a, b in zip(log(once), log(four), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_evaluation_does_not_disturb_the_training(toys, tmp_path):
    common = {"dataset": toys / "text", "dropout": 0.2}
    often = train_here(out_dir=tmp_path / "often", eval_interval=5, **common)
    rarely = train_here(out_dir=tmp_path / "rarely", eval_interval=10, **common)
    assert largest_difference(weights(often), weights(rarely)) == 0
    assert [r["grad_norm"] for r in log(often)] == [r["grad_norm"] for r in log(rarely)]
    assert sorted(validation_losses(often)) == [5, 10, 15, 20]


def test_the_loss_falls_far_below_a_uniform_guess(toys, tmp_path):
    common = {"dataset": toys / "text", "max_iters": 120, "learning_rate": 1e-2}
    losses = validation_losses(train_here(out_dir=tmp_path / "out", **common))
    # a sentence is one of 8 people, 4 deeds and 5 places: 5 nats for some 5 tokens
    assert losses[120] < 0.4 * math.log(toy_tokenizer().n_vocab)
    assert losses[120] < losses[60] < losses[10]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(toys, tmp_path):
    common = {"dataset": toys / "text", "dropout": 0.1}
    one, two = (train_here(out_dir=tmp_path / n, seed=7, **common) for n in "ab")
    other = train_here(out_dir=tmp_path / "c", seed=8, **common)
    assert_same_run(one, two)
    assert largest_difference(weights(one), weights(other)) > 0


def test_dropout_takes_part_in_training_and_not_in_evaluation(toys, tmp_path):
    # at a learning rate of 0 the model stays what it is
    common = {"dataset": toys / "text", "max_iters": 3, "eval_interval": 1, "learning_rate": 0}
    dry = train_here(out_dir=tmp_path / "dry", **common)
    wet = train_here(out_dir=tmp_path / "wet", dropout=0.5, **common)
    assert set(validation_losses(wet).values()) == set(validation_losses(dry).values())
    pairs = zip(log(dry), log(wet), strict=True)
    assert all(a["train_loss"] != b["train_loss"] for a, b in pairs)


@pytest.fixture(scope="module")
def learnt_by_heart(tmp_path_factory):
    """An out_dir, out of patience: of twelve sentences, whose validation loss falls, then rises."""
    folder = tmp_path_factory.mktemp("heart")
    texts = {"train": [novel(0, 12)], "val": [novel(1, 40)]}
    write_pretrain(folder / "text", toy_tokenizer(), texts, ["a test"])
    common = {"dataset": folder / "text", "max_iters": 400, "learning_rate": 1e-2}
    return train_here(out_dir=folder / "out", patience=3, **common)


def test_patience_ends_a_run_whose_validation_loss_rises(learnt_by_heart, tmp_path, capsys):
    losses = validation_losses(learnt_by_heart)
    best = min(losses, key=losses.get)
    assert max(losses) == best + 3 * TINY["eval_interval"] < 400
    train_here(out_dir=learnt_by_heart, resume=True)
    assert f"finished at step {max(losses)}, nothing to do" in capsys.readouterr().out


def test_best_is_the_checkpoint_of_the_lowest_validation_loss(learnt_by_heart, toys, tmp_path):
    losses = validation_losses(learnt_by_heart)
    best, last = min(losses, key=losses.get), max(losses)
    assert pointer(learnt_by_heart, "best") == f"step-{best:06d}"
    assert pointer(learnt_by_heart, "latest") == f"step-{last:06d}"
    assert {p.name for p in learnt_by_heart.glob("*step-*")} == {
        f"step-{best:06d}",
        f"step-{last:06d}",
    }
    assert saved(learnt_by_heart)["progress"]["best_val_loss"] == losses[best]

    # and it is best that another run starts from
    common = {"dataset": toys / "questions", "max_iters": 1, "learning_rate": 0}
    tuned = train_here(out_dir=tmp_path / "out", init_from=learnt_by_heart, **common)
    assert largest_difference(weights(tuned), weights(learnt_by_heart, "best")) == 0
    assert largest_difference(weights(tuned), weights(learnt_by_heart, "latest")) > 0


def test_by_the_last_the_best_is_the_latest_whatever_its_loss(learnt_by_heart, tmp_path):
    common = {"dataset": saved(learnt_by_heart)["settings"]["dataset"], "learning_rate": 1e-2}
    steps = max(validation_losses(learnt_by_heart))
    out = train_here(out_dir=tmp_path / "out", max_iters=steps, best_by="last", **common)
    losses = validation_losses(out)
    assert losses[steps] > min(losses.values())
    assert pointer(out, "best") == pointer(out, "latest") == f"step-{steps:06d}"


def test_a_finished_run_resumed_does_nothing(toys, capsys):
    before = contents(toys / "base")
    train_here(out_dir=toys / "base", resume=True)
    assert contents(toys / "base") == before
    assert "finished at step 20, nothing to do" in capsys.readouterr().out


def test_an_evaluation_that_is_no_number_is_neither_best_nor_saved(toys, tmp_path):
    # the first step's loss is finite; its update of 1e9 makes the model that is evaluated
    common = {"dataset": toys / "text", "learning_rate": 1e9, "warmup_iters": 0}
    with pytest.raises(UserError, match="learning_rate"):
        train_here(out_dir=tmp_path / "out", eval_interval=1, **common)
    assert all(math.isfinite(loss) for loss in validation_losses(tmp_path / "out").values())
    for file in (tmp_path / "out").rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values()), file.parent.name


# --- learning rate and optimizer ---------------------------------------------------------------


def test_the_learning_rate_rises_and_falls_on_straight_lines():
    config = Settings(learning_rate=1.0, min_lr=0.2, warmup_iters=4, max_iters=12)
    rates = [learning_rate(step, config) for step in range(14)]
    rise, fall = [0.25, 0.5, 0.75, 1.0], [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2]
    assert rates == pytest.approx(rise + fall)


def test_without_lr_decay_iters_the_decay_ends_with_the_run():
    for max_iters in (10, 40):
        config = Settings(learning_rate=1.0, warmup_iters=0, max_iters=max_iters)
        rates = [learning_rate(step, config) for step in (max_iters // 2, max_iters)]
        assert rates == pytest.approx([0.5, 0.0])
    config = Settings(learning_rate=1.0, warmup_iters=0, max_iters=40, lr_decay_iters=10)
    assert [learning_rate(step, config) for step in (5, 30)] == pytest.approx([0.5, 0.0])


def test_a_warm_up_longer_than_the_run_only_rises():
    config = Settings(learning_rate=1.0, warmup_iters=100, max_iters=10)
    rates = [learning_rate(step, config) for step in range(10)]
    assert rates == pytest.approx([0.01 * (step + 1) for step in range(10)])


def test_the_first_step_moves_weights_by_the_logged_learning_rate(toys, tmp_path):
    # Adam's first step is lr x sign(gradient), wherever the gradient is far above its epsilon
    common = {"dataset": toys / "text", "max_iters": 1, "warmup_iters": 2, "weight_decay": 0}
    common |= {"optimizer": "adamw"}
    still = train_here(out_dir=tmp_path / "still", learning_rate=0, **common)
    moved = train_here(out_dir=tmp_path / "moved", learning_rate=1e-2, **common)
    name = "blocks.0.attn.c_proj.weight"
    step = (weights(moved)[name] - weights(still)[name]).abs().median().item()
    assert step == pytest.approx(5e-3, rel=1e-2)
    assert log(moved)[0]["lr"] == pytest.approx(5e-3)


def test_only_matrices_decay(toys, tmp_path):
    common = {"dataset": toys / "text", "max_iters": 1, "warmup_iters": 0, "bias": True}
    start = train_here(out_dir=tmp_path / "start", **common)  # what is 0 cannot decay
    common |= {"init_from": start}
    plain = weights(train_here(out_dir=tmp_path / "plain", weight_decay=0, **common))
    decayed = weights(train_here(out_dir=tmp_path / "decayed", weight_decay=5, **common))
    assert {"blocks.1.mlp.c_fc.bias", "norm.weight"} <= plain.keys()
    for name, value in plain.items():
        assert torch.equal(value, decayed[name]) == (value.dim() < 2), name


def test_embeddings_can_have_a_decay_of_their_own(toys, tmp_path):
    common = {"dataset": toys / "text", "max_iters": 1, "warmup_iters": 0, "weight_decay": 0}
    plain = weights(train_here(out_dir=tmp_path / "plain", learning_rate=1e-2, **common))
    common |= {"learning_rate": 1e-2, "embedding_decay": 5.0}
    decayed = weights(train_here(out_dir=tmp_path / "decayed", **common))
    changed = {name for name in plain if not torch.equal(plain[name], decayed[name])}
    assert changed == {"wte.weight"}
    start = train_here(out_dir=tmp_path / "start", **common | {"learning_rate": 0})
    moved = weights(start)["wte.weight"] * (1 - 1e-2 * 5.0) - decayed["wte.weight"]
    torch.testing.assert_close(moved, weights(start)["wte.weight"] - plain["wte.weight"])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_every_parameter_is_optimized_once(tie_weights, optimizer):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "bias": True, "tie_weights": tie_weights}
    model = GPT(ModelConfig(n_vocab=10, **shape))
    config = Settings(optimizer=optimizer, learning_rate=1e-2, embedding_lr=2e-3)
    optimizers = make_optimizers(model, config, "cpu")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    optimized = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(optimized) == sorted({id(parameter) for parameter in model.parameters()})
    for group in groups:
        for name, parameter in model.named_parameters():
            if any(parameter is other for other in group["params"]):
                embeds = name in ("wte.weight", "lm_head.weight")
                assert group["lr_ratio"] == pytest.approx(0.2 if embeds else 1.0), name


def test_gradients_are_clipped_and_logged_as_they_were(toys, tmp_path):
    for clip in (0, 0.1):
        common = {"dataset": toys / "text", "max_iters": 1, "grad_clip": clip}
        common |= {"optimizer": "adamw"}
        out = train_here(out_dir=tmp_path / str(clip), **common)
        tensors = load_file(checkpoint_file(out, "optimizer.safetensors"))
        # after one step Adam's first moment is (1 - beta1) x the gradient
        moments = [value for name, value in tensors.items() if name.endswith(":exp_avg")]
        norm = torch.cat([moment.flatten() for moment in moments]).norm().item() / (1 - 0.9)
        logged = log(out)[0]["grad_norm"]
        assert logged > 0.5
        assert norm == pytest.approx(clip or logged, rel=1e-3)


# --- what it writes and says -------------------------------------------------------------------


def test_a_line_of_the_log_has_these_keys(toys):
    always = ["iter", "tokens", "seconds", "train_loss", "lr", "grad_norm", "tokens_per_second"]
    always += ["tflops", "mfu"]
    for record in log(toys / "base"):
        evaluated = ["val_loss", "val_bits_per_byte"] if record["iter"] in (10, 20) else []
        assert list(record) == always + evaluated
    assert [record["iter"] for record in log(toys / "base")] == list(range(1, 21))
    assert log(toys / "base")[-1]["tokens"] == 20 * 4 * 32


def test_a_logged_loss_is_the_mean_since_the_line_before(toys, tmp_path):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", log_interval=5)
    every = [record["train_loss"] for record in log(toys / "base")]
    assert [record["iter"] for record in log(out)] == [5, 10, 15, 20]
    means = [sum(every[first : first + 5]) / 5 for first in (0, 5, 10, 15)]
    assert [record["train_loss"] for record in log(out)] == pytest.approx(means)


def test_bits_per_byte_are_those_of_the_bytes_scored(toys):
    text, tokenizer = novel(1, 40), toy_tokenizer()
    first, *rest = tokenizer.encode(text)  # the first token is no target, the end token is one
    scored = len(text.encode()) - tokenizer.bytes_per_id[first]
    record = log(toys / "base")[-1]
    nats = record["val_loss"] * (len(rest) + 1)
    assert record["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / scored)


def test_tokens_of_questions_leave_padding_out(toys, tmp_path):
    bounds = Dataset(str(toys / "questions")).bounds["train"]
    rows, tokens = len(bounds) - 1, int(bounds[-1])
    common = {"dataset": toys / "questions", "batch_size": rows, "max_iters": 1}
    [record] = log(train_here(out_dir=tmp_path / "out", **common))  # each row once
    assert tokens - rows <= record["tokens"] <= tokens  # a row's last token is no input


def test_tokens_per_second_are_the_tokens_over_the_seconds(toys, tmp_path):
    common = {"dataset": toys / "questions", "log_interval": 25, "eval_interval": 25}
    first, second = log(train_here(out_dir=tmp_path / "out", max_iters=50, **common))
    speed = first["tokens"] / first["seconds"]
    assert first["tokens_per_second"] == pytest.approx(speed, rel=0.1)
    # the seconds of the evaluation between are no time of training
    speed = (second["tokens"] - first["tokens"]) / (second["seconds"] - first["seconds"])
    assert second["tokens_per_second"] > 0.9 * speed


def test_run_json_holds_settings_architecture_progress_and_environment(toys):
    run = saved(toys / "base")
    assert run["settings"].keys() == {field.name for field in dataclasses.fields(Settings)}
    assert {name: run["settings"][name] for name in TINY} == TINY
    assert ModelConfig(**run["architecture"]).n_vocab == toy_tokenizer().n_vocab
    assert run["architecture"]["n_kv_head"] == 2
    assert (run["progress"]["iter"], run["progress"]["rows"]) == (20, 80)
    assert run["environment"]["torch"] == torch.__version__
    assert run["environment"]["threads"] == torch.get_num_threads()
    assert run["environment"]["precision"] == "float32"
    assert run["tokenizer_sha256"] == toy_tokenizer().sha256


def test_dry_run_prints_parameters_memory_and_time_and_writes_nothing(toys, tmp_path, capsys):
    train_here(dataset=toys / "text", out_dir=tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    block = 32 * 96 + 32 * 32 + 32 * 128 + 64 * 32 + 2 * 32 + 2 * 16
    printed = capsys.readouterr().out
    assert f"parameters  {320 * 32 + 2 * block + 32:,}\n" in printed
    assert re.search(r"^memory +[\d.]+ GB", printed, re.M)
    assert re.search(r"^time +[\d.]+ minutes for 20 steps", printed, re.M)


def test_dry_run_of_a_stopped_run_changes_none_of_its_files(toys, tmp_path):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out")
    with (out / "log.jsonl").open("a") as file:  # as if killed between two checkpoints
        file.write('{"iter": 21}\n')
    before = contents(out)
    train_here(out_dir=out, resume=True, max_iters=40, dry_run=True)
    assert contents(out) == before


def test_a_second_start_is_refused_and_leaves_the_first_whole(toys):
    before = contents(toys / "base")
    with pytest.raises(UserError, match="already holds a run; pass --resume"):
        train_here(dataset=toys / "text", out_dir=toys / "base")
    assert contents(toys / "base") == before


def test_resume_where_nothing_is_saved_starts(toys, tmp_path):
    settings = TINY | {"dataset": toys / "text", "out_dir": tmp_path / "out", "resume": True}
    assert_same_run(train_here(**settings), toys / "base")


def test_a_run_that_ended_before_its_first_checkpoint_leaves_no_lines_to_the_next(toys, tmp_path):
    with pytest.raises(UserError):
        train_here(dataset=toys / "text", out_dir=tmp_path / "out", learning_rate=1e9)
    assert log(tmp_path / "out")
    train_here(dataset=toys / "text", out_dir=tmp_path / "out", resume=False)
    assert course(tmp_path / "out") == course(toys / "base")


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"optimizer": "adamw"},
        {"short_block": 8, "embedding_lr": 1e-2},
    ],
    ids=["float32", "float16", "bfloat16", "adamw", "short"],
)
@pytest.mark.parametrize("dataset", ["text", "questions"])
def test_a_run_in_three_parts_equals_one_in_one(toys, tmp_path, dataset, options):
    common = options | {"dataset": toys / dataset, "dropout": 0.1, "lr_decay_iters": 15}
    common |= {"gradient_accumulation_steps": 2, "eval_interval": 3}
    if dataset == "questions":
        common |= {"init_from": toys / "base"}
    whole = train_here(out_dir=tmp_path / "whole", max_iters=15, **common)
    parts = train_here(out_dir=tmp_path / "parts", max_iters=3, **common)
    train_here(out_dir=parts, resume=True, max_iters=9)
    train_here(out_dir=parts, resume=True, max_iters=15)
    assert_same_run(whole, parts)
    assert saved(whole)["scaler"] == saved(parts)["scaler"]


def test_resumed_without_a_config_file_a_run_keeps_its_settings(toys, tmp_path):
    unusual = {"dropout": 0.25, "beta2": 0.9, "weight_decay": 0.3, "patience": 50, "n_kv_head": 1}
    unusual |= {"dataset": toys / "text", "min_lr": 1e-5, "tie_weights": False}
    out = train_here(out_dir=tmp_path / "out", **unusual)
    before = saved(out)["settings"]
    train_here(out_dir=out, resume=True, max_iters=30)
    after = saved(out)["settings"]
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {"resume"} == {"max_iters"}
    assert after["beta2"] == 0.9


def test_resumed_with_a_changed_setting_it_says_so(toys, tmp_path, capsys):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", max_iters=5)
    capsys.readouterr()
    train_here(out_dir=out, resume=True, max_iters=6, beta1=0.8)
    printed = capsys.readouterr().out
    assert "max_iters was 5, now 6; beta1 was 0.9, now 0.8\n" in printed


def test_resumed_unchanged_it_claims_no_difference(toys, tmp_path, capsys):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", max_iters=5)
    capsys.readouterr()
    train_here(out_dir=out, resume=True)
    assert "not bit for bit" not in capsys.readouterr().out


def test_a_moved_run_goes_on_and_claims_no_difference(toys, tmp_path, capsys):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", max_iters=5)
    moved = out.rename(tmp_path / "moved")
    train_here(out_dir=moved, resume=True)
    printed = capsys.readouterr().out
    assert f"{moved}: " in printed
    assert "not bit for bit" not in printed


def test_a_dataset_prepared_anew_is_refused(tmp_path):
    texts = {"train": [novel(0, 400)], "val": [novel(1, 40)]}
    write_pretrain(tmp_path / "text", toy_tokenizer(), texts, ["a test"])
    out = train_here(out_dir=tmp_path / "out", max_iters=3, dataset=tmp_path / "text")
    before = contents(out)
    texts["train"] = [novel(5, 400)]
    write_pretrain(tmp_path / "text", toy_tokenizer(), texts, ["a test"])
    with pytest.raises(UserError, match="prepared anew"):
        train_here(out_dir=out, resume=True, max_iters=6)
    assert contents(out) == before


@pytest.mark.parametrize("before, now", [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_is_refused_on_resume(toys, tmp_path, before, now):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", optimizer=before, max_iters=2)
    with pytest.raises(UserError, match=f"optimizer={now}, but .* has optimizer={before}"):
        train_here(out_dir=out, resume=True, optimizer=now, max_iters=4)


def test_one_gradient_that_is_not_finite_skips_the_whole_step(toys, tmp_path):
    given = TINY | {"dataset": toys / "text", "out_dir": tmp_path / "out", "dtype": "float16"}
    run, state = start(words(**given))
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    batches, counts, _ = next(steps(run, state))
    bad = state.model.blocks[0].attn.c_attn.weight
    bad.register_hook(lambda grad: torch.full_like(grad, math.nan))
    train_step(run, state, batches, counts)
    after = state.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_an_lstm_s_embeddings_follow_embedding_lr():
    shape = {"model": "lstm", "n_layer": 1, "n_embd": 8}
    model = LSTM(ModelConfig(n_vocab=10, **shape))
    config = Settings(**shape, learning_rate=1e-3, embedding_lr=1e-1)
    [adamw] = make_optimizers(model, config, "cpu")
    ratios = {id(p): g["lr_ratio"] for g in adamw.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        embeds = name.startswith(("wte", "lm_head"))
        assert ratios[id(parameter)] == pytest.approx(100 if embeds else 1), name


# --- short rows first --------------------------------------------------------------------------


def test_short_rows_hold_the_same_tokens_and_later_rows_are_whole(toys, tmp_path):
    given = TINY | {"dataset": toys / "text", "out_dir": tmp_path / "out", "max_iters": 4}
    whole = steps(*start(words(**given)))
    short = steps(*start(words(**given, short_block=8)))
    for step in range(4):
        [long_batch], counts, tokens = next(whole)
        [batch], short_counts, short_tokens = next(short)
        (idx, targets), (want, want_targets) = batch.arrays, long_batch.arrays
        assert idx.shape == ((16, 8) if step < 2 else (4, 32))
        assert torch.equal(idx.flatten(), want.flatten())
        assert torch.equal(targets.flatten(), want_targets.flatten())
        assert (short_counts, short_tokens) == (counts, tokens)


def test_short_block_must_divide_block_size():
    with pytest.raises(UserError, match="short_block=24 must divide block_size=256"):
        Settings(short_block=24)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep their ways")
def test_memory_that_a_step_frees_is_not_taken_from_the_system_again():
    script = """
import resource, torch, train
def pages_taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)  # 80 MB, 19,500 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
train.keep_freed_memory()
pages_taken()
# an aligned block fits into its own place only where there is some room beside it
print(min(pages_taken() for _ in range(3)))
"""
    done = subprocess.run(  # another process: here, earlier tests have cut the heap to pieces
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2000
