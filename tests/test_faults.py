"""A run that cannot go on says why in one line and loses nothing."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.runs import (
    TINY,
    contents,
    error_line,
    log,
    ready_python,
    small_disk,
    start,
    train_here,
    words,
)

posix = pytest.mark.skipif(os.name != "posix", reason="Windows keeps the directory of an open file")


@pytest.fixture(scope="module")
def run_ready(tmp_path_factory):
    with ready_python(tmp_path_factory.mktemp("outputs")) as run_ready:
        yield run_ready


def wait_for(happens: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not happens():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- the directory of a run --------------------------------------------------------------------


def test_of_two_runs_into_one_out_dir_the_second_is_refused(toys, tmp_path, run_ready):
    out = tmp_path / "out"
    endless = TINY | {"dataset": toys / "text", "out_dir": out, "max_iters": 10**6}
    process = start("train.py", *words(**endless))
    try:
        wait_for(lambda: (out / "latest").is_file(), process)
        for again in (words(**endless), words(out_dir=out, resume=True)):
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


def test_a_read_only_out_dir_is_said_before_anything_is_read(toys, tmp_path, run_ready):
    with small_disk(tmp_path / "disk") as (disk, _):
        train_here(dataset=toys / "text", out_dir=disk / "old", max_iters=2)
        before = contents(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name, more in (("old", {"resume": True, "max_iters": 9}), ("new", {}), ("", {})):
            given = {"out_dir": disk / name, "dataset": tmp_path / "nothing"} | more
            said = error_line(run_ready("train.py", *words(**given)))
            assert said.startswith(f"cannot write in {disk / name}: Read-only file system; ")
            assert "--out_dir=" in said
        assert contents(disk) == before


def test_where_the_out_dir_should_be_lies_a_file(tmp_path, run_ready):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        said = error_line(run_ready("train.py", *words(out_dir=out, dataset=tmp_path / "nothing")))
        assert said.startswith(f"cannot write in {out}: ")
    assert (tmp_path / "file").read_text() == "mine"


@posix
@pytest.mark.parametrize("vanish", [shutil.rmtree, lambda out: out.rename(out.with_name("away"))])
def test_an_out_dir_that_vanishes_is_said_at_the_next_line_of_the_log(toys, tmp_path, vanish):
    out = tmp_path / "out"
    # saves are rare, so that none is under way
    endless = TINY | {"dataset": toys / "text", "max_iters": 10**6, "eval_interval": 100}
    process = start("train.py", *words(**endless | {"out_dir": out}))
    wait_for(lambda: (out / "latest").is_file(), process)
    vanish(out)
    stdout, stderr = (part.decode() for part in process.communicate(timeout=120))
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    assert error_line(done).startswith(f"{out} was removed or renamed while this run wrote to it")
    assert not out.exists()
    if (tmp_path / "away").exists():  # put back, it goes on
        (tmp_path / "away").rename(out)
        train_here(out_dir=out, resume=True, max_iters=110)
        assert log(out)[-1]["iter"] == 110
