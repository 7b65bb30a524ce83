"""A run that cannot go on says why in one line and loses nothing."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import bench.__main__
import evaluations
import export
import sample
import train
from configurator import UserError, locked
from data_utils import Dataset
from tests.runs import (
    TINY,
    contents,
    error_line,
    ids_of_row,
    log,
    plant_nan,
    pointer,
    run,
    small_disk,
    start,
    train_here,
    wait_for,
    words,
)

posix = pytest.mark.skipif(os.name != "posix", reason="Windows keeps the directory of an open file")


# --- the directory of a run --------------------------------------------------------------------


def endless(toys: Path, out: Path) -> dict:
    return TINY | {"dataset": toys / "text", "out_dir": out, "max_iters": 10**6}


def test_of_two_runs_into_one_out_dir_the_second_is_refused(toys, tmp_path, run_ready):
    out = tmp_path / "out"
    argv = words(**endless(toys, out))
    process = start("train.py", *argv)
    try:
        wait_for(lambda: (out / "latest").is_file(), process)
        for again in (argv, words(out_dir=out, resume=True)):
            said = error_line(run_ready("train.py", *again))
            assert said == f"another run writes {out}; wait for it, or name another"
        # what only reads is free to
        done = run_ready("sample.py", f"--out_dir={out}", "--max_new_tokens=3", "--start=刘备")
        assert done.returncode == 0, done.stderr
        before = len(log(out))
        wait_for(lambda: len(log(out)) > before, process)  # and the first one goes on
    finally:
        process.kill()
        process.communicate()
    # a lock is its process's: what a killed one leaves does not block
    assert (out / "lock").is_file()
    train_here(out_dir=out, resume=True, max_iters=log(out)[-1]["iter"] + 10)
    assert not (out / "lock").exists()


def test_where_nothing_can_be_written_no_script_works_first(toys, tmp_path, capsys):
    with small_disk(tmp_path / "disk") as (disk, _):
        own = train_here(dataset=toys / "text", out_dir=disk / "run", max_iters=2)
        before = contents(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        base, nothing = toys / "base", tmp_path / "nothing"
        capsys.readouterr()
        for main, *argv in (
            (train.main, *words(out_dir=own, dataset=nothing, resume=True)),
            (train.main, *words(out_dir=disk / "new", dataset=nothing)),
            (train.main, *words(out_dir=disk, dataset=nothing)),
            (evaluations.main, *words(out_dir=own)),
            (evaluations.main, *words(compare=base, out=disk / "new/out")),
            (sample.main, *words(out_dir=base, start="刘备", save_path=disk / "said.txt")),
            (export.main, *words(out_dir=base, to=disk / "hf")),
            (bench.__main__.main, "step", *words(out=disk, dataset=toys / "text")),
        ):
            with pytest.raises(UserError, match=f"cannot write in {disk}.*: Read-only file system"):
                main(argv)
        assert capsys.readouterr().out == "" and contents(disk) == before


def test_where_the_out_dir_should_be_lies_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=f"^cannot write in {out}: .*; make it writable"):
            train_here(out_dir=out, dataset=tmp_path / "nothing")
    assert (tmp_path / "file").read_text() == "mine"


def test_who_waits_at_a_lock_that_goes_does_not_hold_it(tmp_path):
    lock = tmp_path / "lock"
    with locked(tmp_path, lock) as is_held:
        assert is_held()
        lock.unlink()
        assert not is_held()
        with locked(tmp_path, lock) as another:  # it is a new file
            assert another()
            assert not is_held()
        assert not lock.exists()


# --- numbers that are none ---------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "log_interval"), [("text", 7), ("questions", 1)])
def test_the_step_and_the_rows_of_a_loss_that_is_nan_are_named(toys, tmp_path, kind, log_interval):
    data = Dataset(toys / kind)
    untied = {"dataset": data.path, "tie_weights": False}
    base = train_here(out_dir=tmp_path / "base", max_iters=1, **untied)
    bad = plant_nan(base, data)
    rows = {"batch_size": 2, "gradient_accumulation_steps": 3}
    common = untied | rows | {"init_from": base, "log_interval": log_interval, "max_iters": 60}
    with pytest.raises(UserError) as caught:
        train_here(out_dir=tmp_path / "out", eval_interval=60, **common)
    said = re.search(
        r"loss is nan or infinite at step (\d+), of micro-batch (\d+), which has (.*) of "
        rf"{re.escape(str(data.path))}/train; .*; nothing was saved$",
        str(caught.value),
    )
    step, micro = int(said[1]), int(said[2])
    kind_of_rows, numbers = re.fullmatch(r"([a-z ]+) (.*)", said[3]).groups()
    assert kind_of_rows == {"text": "the rows from tokens", "questions": "conversations"}[kind]
    stream = [
        int(row) for n in range(step) for row in data.step_rows(1337, 6 * n, 6, TINY["block_size"])
    ]
    first = next(n for n, row in enumerate(stream) if bad in ids_of_row(data, row))
    assert (step, micro) == (first // 6 + 1, first % 6 // 2 + 1)
    assert numbers == ", ".join(map(str, stream[first // 2 * 2 :][:2]))
    assert len(log(tmp_path / "out")) == (step - 1) // log_interval
    assert not [*tmp_path.glob("out/step-*")]


def test_a_run_that_diverges_leaves_the_checkpoint_before_as_it_was(toys, tmp_path):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", max_iters=10)
    before = contents(out / "step-000010")
    more = {"max_iters": 30, "learning_rate": 1e30, "warmup_iters": 0, "log_interval": 5}
    with pytest.raises(
        UserError, match=r"step 1\d, .*lower --learning_rate=1e\+30.*step-000010 is"
    ):
        train_here(out_dir=out, resume=True, **more)
    assert contents(out / "step-000010") == before
    assert pointer(out, "latest") == "step-000010"
    train_here(out_dir=out, resume=True, max_iters=12)
    assert log(out)[-1]["iter"] == 12


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("absurd", [{"batch_size": 10**13}, {"n_embd": 2**44}])
def test_an_absurd_size_is_out_of_memory_and_says_what_to_lower(toys, tmp_path, run_ready, absurd):
    given = TINY | {"dataset": toys / "text", "out_dir": tmp_path / "out"} | absurd
    said = error_line(run_ready("train.py", *words(**given)))
    assert said.startswith("out of memory (") and len(said) < 600
    assert "lower --batch_size=, for train.py raise --gradient_accumulation_steps= as much" in said


@posix
def test_a_step_that_the_system_refuses_memory_leaves_the_checkpoint(toys, tmp_path):
    import resource  # of POSIX alone

    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", max_iters=2)
    before = contents(out)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))  # bytes of addresses

    # the two blocks' activations are 80 numbers of 4 bytes for each of these tokens and channels
    more = {"resume": True, "max_iters": 4, "batch_size": 8_000}
    said = error_line(run("train.py", *words(out_dir=out, **more), preexec_fn=limit))
    assert said.startswith("out of memory (") and "allocate memory" in said
    assert contents(out) == before


@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_newest_checkpoints_stay(toys, tmp_path, keep_last):
    given = {"dataset": toys / "text", "out_dir": tmp_path / "out", "keep_last": keep_last}
    out = train_here(**given, max_iters=50, best_by="last")
    steps = [f"step-{step:06}" for step in (10, 20, 30, 40, 50)]
    assert sorted(path.name for path in out.glob("step-*")) == steps[-keep_last:]
    train_here(out_dir=out, resume=True, max_iters=60)
    steps = [*steps, "step-000060"]
    assert sorted(path.name for path in out.glob("step-*")) == steps[-keep_last:]
    with pytest.raises(UserError, match="keep_last=0 must be 1 or more"):
        train_here(**given | {"keep_last": 0})
