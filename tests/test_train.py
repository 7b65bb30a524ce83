"""Training: what may change its course and what may not, what it prints and writes."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluations
import train
import visualize
from configurator import UserError
from miniglm.generation import Sampling
from miniglm.prep.writer import write_pretrain, write_sft, write_splits
from miniglm.text import complete, load_for_sampling, prompt_ids
from model import ModelConfig
from tests.helpers import dialogue
from tests.runs import (
    TINY,
    assert_accumulation_is_exact,
    assert_resumes_exactly,
    assert_same_run,
    checkpoint_file,
    contents,
    log,
    novel,
    pointer,
    preferences,
    questions,
    saved,
    toy_tokenizer,
    train_here,
    weights,
    words,
)
from train import Settings, start, steps, train_step


def largest_difference(out_dir: Path, other: Path, which: str = "latest") -> float:
    """Between the latest weights of an out_dir and those of another."""
    ours, theirs = weights(out_dir), weights(other, which)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def validation_losses(out_dir: Path) -> dict[int, float]:
    return {record["iter"]: record["val_loss"] for record in log(out_dir) if "val_loss" in record}


# --- the course of a run -----------------------------------------------------------------------


def test_accumulated_micro_batches_equal_the_full_batch(toys, tmp_path):
    # the answers' lengths differ, so a mean of the micro-batches' means would be another loss
    names = ("train_loss", "grad_norm")
    assert_accumulation_is_exact(tmp_path, names, dataset=toys / "questions")


@pytest.mark.parametrize("dataset", ["text", "questions"])
def test_evaluations_and_samples_do_not_disturb_the_training(toys, tmp_path, capsys, dataset):
    common = {"dataset": toys / dataset, "dropout": 0.2, "max_iters": 8}
    rarely = train_here(out_dir=tmp_path / "rarely", eval_interval=8, prompts="", **common)
    printed = capsys.readouterr().out
    assert "step 8: loss" in printed
    assert "-" * 20 not in printed and "答：" not in printed  # no prompts, no samples
    often = train_here(out_dir=tmp_path / "often", eval_interval=2, prompts="刘备", **common)
    assert largest_difference(often, rarely) == 0
    assert [r["grad_norm"] for r in log(often)] == [r["grad_norm"] for r in log(rarely)]
    assert sorted(validation_losses(often)) == [2, 4, 6, 8]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(toys, tmp_path):
    # resume starts a run if there is none yet
    again = TINY | {"dataset": toys / "text", "out_dir": tmp_path / "again", "resume": True}
    assert_same_run(train_here(**again), toys / "base")
    other = train_here(dataset=toys / "text", out_dir=tmp_path / "other", seed=8)
    assert largest_difference(other, toys / "base") > 0


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
    """A run on twelve sentences, ended by patience: its validation loss falls, then rises."""
    folder = tmp_path_factory.mktemp("heart")
    texts = {"train": [novel(0, 12)], "val": [novel(1, 40)]}
    write_pretrain(folder / "text", toy_tokenizer(), texts, ["a test"])
    common = {"dataset": folder / "text", "max_iters": 400, "learning_rate": 1e-2}
    return train_here(out_dir=folder / "out", patience=3, **common)


def test_the_loss_falls_far_below_a_uniform_guess(learnt_by_heart):
    records = log(learnt_by_heart)
    assert records[-1]["train_loss"] < 0.3 * math.log(toy_tokenizer().n_vocab)
    assert records[-1]["train_loss"] < records[29]["train_loss"] < records[0]["train_loss"]


def test_epochs_become_steps_and_both_are_printed(toys, tmp_path, capsys):
    """90 questions, 4 a step; in a mixture the first data set's."""
    file, other = tmp_path / "three.py", tmp_path / "steps.py"
    file.write_text("epochs = 3\n", encoding="utf-8")
    other.write_text("max_iters = 9\n", encoding="utf-8")
    own = words(**TINY | {"dataset": toys / "questions", "out_dir": tmp_path / "out"})
    own.remove("--max_iters=20")
    mixed = [*own, f"--dataset={toys}/questions:3,{toys}/text:1"]
    for argv, wanted in (
        ([*own, "--epochs=2"], 45),
        ([*own, "--epochs=2", "--max_iters=45"], 45),
        ([*own, "--epochs=0.01"], 1),
        ([*mixed, "--epochs=1"], 30),
        ([*own, str(file)], 68),
        ([*own, str(file), "--max_iters=7"], 7),
        ([*own, str(other), "--epochs=1"], 23),
        (own, 2000),
    ):
        config, *_ = train.read_settings(argv)
        assert (config.max_iters, config.epochs) == (wanted, None)
    for argv in ([*own, "--epochs=2", "--max_iters=44"], [*own, str(file), str(other)]):
        with pytest.raises(UserError, match=r"epochs=. of 90 rows are .. steps of 4, but max_"):
            train.read_settings(argv)
    train.main([*own, "--epochs=0.2"])
    train.main([*mixed, "--epochs=0.1", f"--out_dir={tmp_path}/mixed"])
    printed = capsys.readouterr().out
    assert "90 rows of questions; 5 steps of 4 are 0.222 epochs\n" in printed
    assert "steps of 4 are 0.1 epochs of questions\n" in printed
    train.main([f"--out_dir={tmp_path}/out", "--resume", "--epochs=0.3"])
    assert saved(tmp_path / "out")["progress"]["iter"] == 7
    more = [f"--out_dir={tmp_path}/out", "--resume", "--epochs=0.6", "--batch_size=2"]
    assert train.read_settings(more)[0].max_iters == 20  # 28 rows of 54 are read


def test_patience_ends_a_run_whose_validation_loss_rises(learnt_by_heart):
    losses = validation_losses(learnt_by_heart)
    best = min(losses, key=losses.get)
    assert 10 < best < best + 3 * TINY["eval_interval"] == max(losses) < 400


def test_a_finished_run_resumed_does_nothing(learnt_by_heart, toys, capsys):
    for out, step in ((toys / "base", 20), (learnt_by_heart, log(learnt_by_heart)[-1]["iter"])):
        before = contents(out)
        train_here(out_dir=out, resume=True)
        assert contents(out) == before
        assert f"finished at step {step}, nothing to do" in capsys.readouterr().out


def test_best_is_the_checkpoint_of_the_lowest_validation_loss(learnt_by_heart, toys, tmp_path):
    losses = validation_losses(learnt_by_heart)
    best, last = min(losses, key=losses.get), max(losses)
    assert pointer(learnt_by_heart, "best") == f"step-{best:06d}"
    assert pointer(learnt_by_heart, "latest") == f"step-{last:06d}"
    kept = {path.name for path in learnt_by_heart.glob("*step-*")}
    assert kept == {f"step-{best:06d}", f"step-{last:06d}"}
    assert saved(learnt_by_heart)["progress"]["best_val_loss"] == losses[best]

    # and it is best that another run starts from
    common = {"dataset": toys / "questions", "max_iters": 1, "learning_rate": 0}
    tuned = train_here(out_dir=tmp_path / "out", init_from=learnt_by_heart, **common)
    assert largest_difference(tuned, learnt_by_heart, "best") == 0
    assert largest_difference(tuned, learnt_by_heart, "latest") > 0


@pytest.mark.parametrize(("best_by", "best"), [("val_loss", 1), ("last", 3)])
def test_of_equal_losses_the_first_is_best_or_by_last_the_latest(toys, tmp_path, best_by, best):
    common = {"dataset": toys / "text", "max_iters": 3, "eval_interval": 1, "learning_rate": 0}
    out = train_here(out_dir=tmp_path / "out", best_by=best_by, **common)
    assert len(set(validation_losses(out).values())) == 1
    assert pointer(out, "best") == f"step-{best:06d}"
    assert pointer(out, "latest") == "step-000003"


def test_a_loss_that_is_nan_is_neither_best_nor_saved(toys, tmp_path):
    # the first step's loss is finite; its update of 1e9 makes the model that is evaluated
    common = {"dataset": toys / "text", "learning_rate": 1e9, "eval_interval": 1}
    with pytest.raises(UserError, match="lower --learning_rate="):
        train_here(out_dir=tmp_path / "out", warmup_iters=0, **common)
    assert all(math.isfinite(loss) for loss in validation_losses(tmp_path / "out").values())
    for file in (tmp_path / "out").rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values()), file.parent.name


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


def test_gradients_are_clipped_and_logged_as_they_were(toys, tmp_path):
    common = {"dataset": toys / "text", "max_iters": 1, "optimizer": "adamw"}
    for clip in (0, 0.1):
        out = train_here(out_dir=tmp_path / str(clip), grad_clip=clip, **common)
        logged = log(out)[0]["grad_norm"]
        assert logged > 0.5
        tensors = load_file(checkpoint_file(out, "optimizer.safetensors"))
        # Adam's first moment after a step is (1 - beta1) x the gradient
        moments = torch.cat([v.flatten() for k, v in tensors.items() if k.endswith(":exp_avg")])
        assert moments.norm().item() / 0.1 == pytest.approx(clip or logged, rel=1e-3)


# --- what it writes and prints -----------------------------------------------------------------


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
    environment = {"torch": torch.__version__, "threads": 1, "precision": "float32"}
    assert environment.items() <= run["environment"].items()
    assert run["tokenizer_sha256"] == toy_tokenizer().sha256


def test_dry_run_prints_parameters_memory_and_time_and_writes_nothing(toys, tmp_path, capsys):
    train_here(dataset=toys / "text", out_dir=tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    block = 32 * 96 + 32 * 32 + 32 * 128 + 64 * 32 + 2 * 32 + 2 * 16
    printed = capsys.readouterr().out
    assert f"parameters  {320 * 32 + 2 * block + 32:,}\n" in printed
    assert re.search(r"^memory +[\d.]+ GB at its highest: [\d.]+ of weights", printed, re.M)
    assert re.search(r"^ +on a GPU about 0.5 GB, an estimate$", printed, re.M)
    assert re.search(r"^time +[\d.]+ minutes for 20 steps", printed, re.M)


def test_dry_run_of_a_stopped_run_changes_none_of_its_files(toys, tmp_path):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", max_iters=2)
    with (out / "log.jsonl").open("a") as file:  # as if killed between two checkpoints
        file.write('{"iter": 3}\n')
    before = contents(out)
    train_here(out_dir=out, resume=True, max_iters=4, dry_run=True)
    assert contents(out) == before


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("text", {"short_block": 8, "embedding_lr": 1e-2}),
        ("text", {"optimizer": "adamw", "dtype": "bfloat16"}),
        ("questions", {"dtype": "float16"}),
        ("questions:3,{}/text:1", {"short_block": 8}),
    ],
    ids=["float32", "bfloat16", "float16", "mixed"],
)
def test_a_run_in_three_parts_equals_one_in_one(toys, tmp_path, dataset, options):
    common = {"dataset": f"{toys}/{dataset}".replace("{}", str(toys)), "dropout": 0.1}
    common["gradient_accumulation_steps"] = 2
    whole, parts = assert_resumes_exactly(tmp_path, **common, **options)
    assert saved(whole)["scaler"] == saved(parts)["scaler"]


def test_a_resumed_run_keeps_its_settings_and_prints_what_changed(toys, tmp_path, capsys):
    unusual = {"dropout": 0.25, "beta2": 0.9, "weight_decay": 0.3, "patience": 50, "n_kv_head": 1}
    unusual |= {"dataset": toys / "text", "min_lr": 1e-5, "tie_weights": False}
    out = train_here(out_dir=tmp_path / "out", max_iters=2, **unusual)
    before = saved(out)["settings"]
    moved = out.rename(tmp_path / "moved")
    capsys.readouterr()
    train_here(out_dir=moved, resume=True)
    assert "not bit for bit" not in capsys.readouterr().out
    train_here(out_dir=moved, resume=True, max_iters=3, beta1=0.8)
    assert "max_iters was 2, now 3; beta1 was 0.9, now 0.8\n" in capsys.readouterr().out
    after = saved(moved)["settings"]
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {"resume", "out_dir"} == {"max_iters", "beta1"}


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


def test_short_rows_hold_the_same_tokens_and_later_rows_are_whole(toys, tmp_path):
    given = TINY | {"dataset": toys / "text", "out_dir": tmp_path / "out", "max_iters": 4}
    whole = steps(*start(words(**given)))
    short = steps(*start(words(**given, short_block=8)))
    for step in range(4):
        [long_batch], counts, tokens = next(whole)
        [batch], short_counts, short_tokens = next(short)
        (idx, targets, _), (want, want_targets, _) = batch.arrays, long_batch.arrays
        assert idx.shape == ((16, 8) if step < 2 else (4, 32))
        assert torch.equal(idx.flatten(), want.flatten())
        assert torch.equal(targets.flatten(), want_targets.flatten())
        assert (short_counts, short_tokens) == (counts, tokens)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_mistyped_out_dir_is_not_resumed_and_not_begun(toys, dry_run):
    before = contents(toys)
    for name, hint in (("basse", "; did you mean 'base'?"), ("q", "; pass the --out_dir= of a ")):
        said = re.escape(f"no checkpoint in {toys / name} to go on from{hint}")
        with pytest.raises(UserError, match=said):
            train_here(out_dir=toys / name, resume=True, dry_run=dry_run)
        assert not (toys / name).exists()
    assert contents(toys) == before


@pytest.mark.parametrize("is_file", [False, True])
def test_what_names_its_data_begins_where_nothing_is_to_resume(toys, tmp_path, capsys, is_file):
    out, config = tmp_path / "out", tmp_path / "config.py"
    config.write_text(f"dataset = {str(toys / 'text')!r}\n", encoding="utf-8")
    data = [str(config)] if is_file else words(dataset=toys / "text")
    train.main([*data, *words(**TINY | {"out_dir": out, "resume": True, "max_iters": 2})])
    printed = capsys.readouterr().out
    assert f"no checkpoint in {out} to go on from: training begins anew\n" in printed
    assert "note: 2 steps only warm up (warmup_iters=4)\n" in printed
    assert log(out)[-1]["iter"] == 2


# --- without validation ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """Datasets of training alone."""
    folder = tmp_path_factory.mktemp("bare")
    source = toy_tokenizer(), ["a test"]
    write_pretrain(folder / "text", source[0], {"train": [novel(0, 400)]}, source[1])
    write_sft(folder / "questions", source[0], {"train": questions(1, 40)}, source[1], 32)
    write_splits("dpo", folder / "pairs", source[0], {"train": preferences(3, 40)}, source[1], 32)
    return folder


@pytest.mark.parametrize("dataset", ["text", "questions", "pairs", "questions:1,{}/text:1"])
def test_nothing_is_evaluated_and_the_last_checkpoint_is_best(
    toys, bare, tmp_path, capsys, dataset
):
    name = f"{bare}/{dataset.replace('{}', str(bare))}"
    out, _ = assert_resumes_exactly(tmp_path, dataset=name, init_from=toys / "base")
    printed = capsys.readouterr().out
    assert printed.count(" has no validation split: no evaluation, and sampling takes") == 4
    assert re.search(r"^step 2: loss(_text)? [\d.]+ in training$", printed, re.MULTILINE)
    assert pointer(out, "best") == pointer(out, "latest") == "step-000006"
    assert not [key for record in log(out) for key in record if key.startswith("val_")]
    visualize.main([f"--runs={out}"])
    if dataset == "questions":
        with pytest.raises(UserError, match="has no split 'val'; it has train"):
            evaluations.main(words(out_dir=out))
        evaluations.main(words(out_dir=out, split="train", max_new_tokens=3))


@pytest.mark.parametrize("part", ["text", "questions"])
def test_a_mixture_is_judged_on_its_parts_with_validation(toys, bare, tmp_path, part):
    parts = f"{bare}/{part}:1,{toys}/{part}:1,{toys}/questions:1"
    out = train_here(out_dir=tmp_path / "out", dataset=parts, max_iters=2)
    given = {"dataset": toys / "questions", "init_from": out, "learning_rate": 0, "max_iters": 1}
    [wanted] = log(train_here(out_dir=tmp_path / "judge", **given))
    assert log(out)[-1]["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-6)


def test_an_adapter_learns_a_name_of_its_own_by_heart(toys, tmp_path):
    rows = [dialogue(f"{name}叫什么？", "刘备。") for name in "甲乙丙丁戊己庚辛"]
    write_sft(tmp_path / "names", toy_tokenizer(), {"train": rows}, ["a test"], max_tokens=32)
    given = {"dataset": tmp_path / "names", "init_from": toys / "base", "learning_rate": 3e-2}
    out = train_here(**given, out_dir=tmp_path / "out", lora_rank=8, max_iters=60)
    checkpoint = load_for_sampling(str(out), "cpu")
    prompts = [prompt_ids(checkpoint, messages[0]["content"]) for messages in rows]
    outputs = complete(checkpoint, prompts, Sampling(20, temperature=0.0))
    assert [output.text for [output] in outputs] == ["刘备。"] * 8
