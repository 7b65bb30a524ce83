"""A user's mistake or a full disk is one line on stderr, exit code 1, and changes no file."""

import itertools
import json
import shutil

import pytest

import train
from configurator import UserError
from miniglm.checkpoint import load_checkpoint
from miniglm.prep.writer import write_pretrain
from tests.runs import (
    ROOT,
    SOURCES,
    TINY,
    assert_same_run,
    contents,
    error_line,
    novel,
    pointer,
    small_disk,
    toy_tokenizer,
    train_here,
    without_bars,
    words,
)


@pytest.fixture(scope="module")
def world(toys):
    """Datasets, good and bad ones, and trained models."""
    shutil.copytree(toys / "base", toys / "lost")
    (toys / "lost" / "latest").write_text("step-000777\n")
    texts = {"train": [novel(0, 400)], "val": [novel(1, 40)]}
    write_pretrain(toys / "other_tokens", toy_tokenizer(300), texts, ["a test"])
    write_pretrain(toys / "no_val", toy_tokenizer(), {"train": texts["train"]}, ["a test"])
    shutil.copytree(toys / "text", toys / "swapped_tokens")
    toy_tokenizer(300).save(toys / "swapped_tokens" / "tokenizer.json")
    return toys


# case: settings of train.py, and its message; {} is the world's folder
CASES = {
    "no such device": ({"device": "gpu"}, "device='gpu' cannot be used"),
    "a second start": ({"out_dir": "{}/base"}, "already holds a run; pass --resume"),
    "odd short rows": ({"short_block": 24}, "short_block=24 must divide block_size=32"),
    "another tokenizer.json": (
        {"dataset": "{}/swapped_tokens"},
        "{}/swapped_tokens/tokenizer.json is not what the dataset was prepared with",
    ),
    "prompt beyond block_size": (
        {"dataset": "{}/questions", "prompts": "话说天下大势分久必合合久必分周末七国分争"},
        "longer than block_size=32; shorten it",
    ),
    "patience without validation": (
        {"dataset": "{}/no_val", "patience": 2},
        "patience=2 counts evaluations, but {}/no_val has no validation split; leave it out",
    ),
    "init_from another tokenizer": (
        {"dataset": "{}/other_tokens", "init_from": "{}/base"},
        "{}/other_tokens has another tokenizer than {}/base/step-000020; "
        "prepare it with --tokenizer={}/base/step-000020",
    ),
    "init_from another shape": (
        {"init_from": "{}/base", "n_layer": 3},
        "n_layer=3, but the model in {}/base has n_layer=2; leave it out",
    ),
    "resume with a shorter block_size": (
        {"out_dir": "{}/base", "resume": True, "block_size": 16},
        "block_size=16, but the model in {}/base has block_size=32; leave it out",
    ),
    "resume with another optimizer": (
        {"out_dir": "{}/base", "resume": True, "optimizer": "adamw"},
        "optimizer=adamw, but the model in {}/base has optimizer=muon",
    ),
    "resume from a lost checkpoint": (
        {"out_dir": "{}/lost", "resume": True},
        "{}/lost/step-000777/run.json is missing",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_setting_is_one_line_and_changes_nothing(case, world):
    settings, message = CASES[case]
    before = contents(world)
    given = TINY | {"dataset": "{}/text", "out_dir": "{}/new"} | settings
    with pytest.raises(UserError) as error:
        train.main([word.replace("{}", str(world)) for word in words(**given)])
    assert message.replace("{}", str(world)) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert contents(world) == before


# --- real command lines, in a fresh copy of the repository -------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The sources alone, as cloned: nothing fetched, prepared or trained."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    for path in [p for part in SOURCES for p in ROOT.glob(part)]:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train.py config/pretrain_sanguo.py", "meta.json is missing; run python data/sanguo/prep"),
        ("data/sanguo/prepare.py", "docs.json is missing; run python data/fetch_data.py sanguo"),
        ("train.py config/sft_sanguo.py", "no checkpoint in out-sanguo"),
        ("sample.py --out_dir=out-sanguo-sft", "no checkpoint in out-sanguo-sft"),
        ("data/sanguo/prepare_sft.py", "run python data/sanguo/prepare.py"),
    ],
)
def test_in_a_fresh_clone_each_step_names_the_one_before(checkout, run_ready, command, message):
    before = contents(checkout)
    assert message in error_line(run_ready(*command.split(), cwd=checkout))
    added = contents(checkout).keys() - before.keys()
    assert all("__pycache__" in path for path in added)


def test_every_step_runs_from_another_current_directory(checkout, run_ready, tmp_path):
    chapters = [f"第{number}回 {novel(number, 20)}" for number in range(20)]
    (tmp_path / "novel.json").write_text(json.dumps(chapters))
    (tmp_path / "toy.py").write_text("n_layer = 2\nmax_iters = 3\nblock_size = 32\n")
    (tmp_path / "prompts.txt").write_text("刘备到", encoding="utf-8")
    before = contents(tmp_path)
    shape = words(dataset="toy", out_dir="out-toy", n_embd=32, n_head=2, dtype="bfloat16")
    for script, *argv in (
        ["data/sanguo/prepare.py", "--input=novel.json", "--out=data/toy", "--vocab_size=300"],
        ["train.py", "toy.py", *shape],
        ["sample.py", "--out_dir=out-toy", "--start=FILE:prompts.txt", "--max_new_tokens=9"],
    ):
        done = run_ready(str(checkout / script), *argv, cwd=tmp_path)
        assert (done.returncode, without_bars(done.stderr)) == (0, [])
    assert done.stdout.startswith("刘备到")
    assert (checkout / "data/toy/train.bin").is_file()
    assert pointer(checkout / "out-toy", "latest") == "step-000003"
    assert contents(tmp_path) == before


# --- full disks --------------------------------------------------------------------------------


def test_training_on_a_full_disk_keeps_its_checkpoint_and_goes_on_from_it(
    world, run_ready, tmp_path
):
    common = TINY | {"dataset": world / "text", "eval_interval": 5}
    whole = train_here(**common | {"out_dir": tmp_path / "whole"})
    size = sum(len(content) for content in contents(whole / pointer(whole, "latest")).values())
    with small_disk(tmp_path / "disk") as (disk, leave):
        out = disk / "out"
        # without a checkpoint a run starts anew, and drops the lines of the log
        for room, beginning, end in (
            (0, f"cannot write {out}/log.jsonl: ", "; nothing was saved"),
            (size // 2, f"cannot save in {out}: ", "; nothing was saved"),
            (size * 3 // 2, f"cannot save in {out}: ", "; step-000005 is whole, --resume goes on"),
        ):
            leave(room)
            said = error_line(run_ready("train.py", *words(**common | {"out_dir": out})))
            assert said.startswith(beginning) and end in said
            assert "No space left on device" in said
            assert not [*disk.rglob("*.tmp")]
        for which in ("latest", "best"):
            assert load_checkpoint(out, which).run["progress"]["iter"] == 5
        (disk / "filler").unlink()
        train_here(out_dir=out, resume=True)
        assert_same_run(whole, out)


def test_preparing_on_a_full_disk_keeps_the_old_dataset(checkout, run_ready, tmp_path):
    chapters = [f"第{n}回 {n}甲 {n}乙\n{novel(n, 20)}" for n in range(1, 21)]
    (tmp_path / "novel.json").write_text(json.dumps(chapters))
    for name, size in (("one", 320), ("other", 300)):
        toy_tokenizer(size).save(tmp_path / name)
    with small_disk(tmp_path / "disk") as (disk, leave):
        argv = ["data/sanguo/prepare.py", f"--input={tmp_path}/novel.json", f"--out={disk}/out"]
        assert run_ready(*argv, f"--tokenizer={tmp_path}/one", cwd=checkout).returncode == 0
        before = contents(disk / "out")
        bins = {f"{split}.bin" for split in ("train", "val", "test")}
        assert {*bins, "meta.json", "tokenizer.json"} == before.keys()
        for room in itertools.count(0, 2 * 4096):
            leave(room)
            done = run_ready(*argv, f"--tokenizer={tmp_path}/other", cwd=checkout)
            assert not [*disk.rglob("*.tmp")]
            if done.returncode == 0:
                break
            assert "No space left on device" in error_line(done)
            assert contents(disk / "out") == before
        assert room >= 4 * 4096
        after = contents(disk / "out")
        assert all(after[name] != before[name] for name in before)
