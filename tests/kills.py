"""Runs that are killed at random moments, and resumed, end in the bits of runs never killed.

    python -m tests.kills --kills=50

Of each kind one run goes through, and one is killed (SIGKILL, all its processes at once) again and
again and resumed: at moments drawn between its first step and its end, or as soon as a save has
begun. Weights, the optimizer's state and the log of the two must be the same. Needs fork.
"""

import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

import train
from configurator import UserError, command, configure
from miniglm.checkpoint import has_checkpoint, load_checkpoint
from tests.runs import TINY, assert_same_run, free_port, log, pointer, words, write_toys

LORA = {"lora_rank": 4, "learning_rate": 3e-3}
ALL = {"max_iters": 100, "eval_interval": 4, "dropout": 0.1, "prompts": "[]"}
KINDS = {
    "pretraining, Muon": {"dataset": "text"},
    "pretraining, AdamW": {"dataset": "text", "optimizer": "adamw"},
    "accumulation, short rows first": {"dataset": "text", "short_block": 8}
    | {"gradient_accumulation_steps": 3},
    "questions with a text": {"dataset": "questions:3,text:1", "init_from": "base"},
    "questions": {"dataset": "questions", "init_from": "base"},
    "adapters": {"dataset": "questions", "init_from": "base", **LORA},
    "preferences": {"dataset": "pairs", "init_from": "answers"},
    "preferences by adapters": {"dataset": "pairs", "init_from": "answers", **LORA},
    "two processes": {"dataset": "text", "gradient_accumulation_steps": 2},
    "two processes, shared out": {"dataset": "text", "shard": True},
}


@dataclass
class Settings:
    kills: int = 50  # of all kinds together
    seed: int = 0  # of the moments


@dataclass
class Outcome:
    kills: int
    in_a_save: int  # of them
    same: bool  # bits

    def __str__(self) -> str:
        return f"{self.kills:>5}{self.in_a_save:>11}{'yes' if self.same else 'NO':>11}"


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if not hasattr(os, "fork"):
        raise UserError("this system cannot fork; run it on Linux or macOS")
    torch.set_num_threads(1)
    print(f"{'kind':<38}kills  in a save  same bits  seconds", flush=True)
    total = Outcome(0, 0, True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder)
        for number, kind in enumerate(KINDS):
            began = time.perf_counter()
            count = config.kills // len(KINDS) + (number < config.kills % len(KINDS))
            done = outlive(
                folder, folder / "runs", kind, count, random.Random(f"{config.seed} {kind}")
            )
            print(f"{kind:<38}{done}{time.perf_counter() - began:>9.0f}", flush=True)
            total.kills += done.kills
            total.in_a_save += done.in_a_save
            total.same &= done.same
    print(f"{'all':<38}{total}")
    if not total.same:
        raise UserError("a run that was killed has other bits")


def write_world(folder: Path) -> None:
    """The datasets text, questions and pairs, and the models base and answers."""
    write_toys(folder)
    for name, given in (
        ("base", {"dataset": folder / "text"}),
        ("answers", {"dataset": folder / "questions", "init_from": folder / "base"}),
    ):
        wait(launch(words(**TINY | given | {"out_dir": folder / name}), folder / f"{name}.txt"))


def outlive(world: Path, folder: Path, kind: str, kills: int, draw: random.Random) -> Outcome:
    """Kills a run of this kind in folder so many times, every second time within a save."""
    given = TINY | ALL | KINDS[kind]
    for name in given.keys() & {"dataset", "init_from"}:
        given[name] = ",".join(f"{world}/{part}" for part in given[name].split(","))
    size = 2 if kind.startswith("two processes") else 1
    whole, out, said = (folder / kind / part for part in ("whole", "killed", "said.txt"))
    said.parent.mkdir(parents=True)
    wait(launch(words(**given | {"out_dir": whole}), said, size))
    seconds = log(whole)[-1]["seconds"] / max(1, kills)  # no kill comes after the run's end
    argv = [*words(**given | {"out_dir": out}), "--resume"]
    done = Outcome(0, 0, True)
    for number in range(kills):
        processes = launch(argv, said, size)
        if not wait_for(lambda: b"first step after" in said.read_bytes(), processes):
            kill(processes)
            break  # it had gone further than it was thought to
        if number % 2 == 0:
            time.sleep(draw.uniform(0, seconds))
        elif wait_for(lambda: any(out.glob(".step-*.tmp")), processes):
            time.sleep(draw.uniform(0, 0.01))
        if not kill(processes):
            break
        done.kills += 1
        done.in_a_save += in_a_save(out)
        for which in ("latest", "best"):
            if has_checkpoint(out):
                load_checkpoint(out, which)
    wait(launch(argv, said, size))
    try:
        assert_same_run(whole, out)
    except AssertionError:
        done.same = False
    return done


def in_a_save(out_dir: Path) -> bool:
    """Whether a save was under way when the run was killed: its files, or a checkpoint that no
    pointer names."""
    named = {pointer(out_dir, which) for which in ("latest", "best") if (out_dir / which).is_file()}
    steps = {path.name for path in out_dir.glob("step-*")}
    return bool(steps - named) or any(out_dir.glob("*.tmp")) or any(out_dir.glob(".*.tmp"))


# --- processes ---------------------------------------------------------------------------------


def launch(argv: list[str], said: Path, size: int = 1) -> list[int]:
    """train.py's main in new processes, as torchrun places them -> their ids. They are forked, to
    be spared the seconds of imports; the first one's output goes to the file `said`."""
    port = free_port()
    said.write_bytes(b"")
    processes = []
    for rank in range(size):
        process = os.fork()
        if process == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            target = said if rank == 0 else os.devnull
            code = 1
            try:
                # tqdm's own is shared with the parent, who would wait for ever for a killed holder
                tqdm.set_lock(threading.RLock())
                sys.stdout = sys.stderr = open(target, "w", 1, encoding="utf-8")  # noqa: PTH123, SIM115
                train.main(argv)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        processes.append(process)
    return processes


def wait(processes: list[int]) -> None:
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert codes == [0] * len(processes), codes


def kill(processes: list[int]) -> bool:
    """Kills all of them -> whether they still ran."""
    for process in processes:
        os.kill(process, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return codes == [-signal.SIGKILL] * len(processes)


def wait_for(happens: Callable[[], bool], processes: list[int]) -> bool:
    """Whether it happens before the first process ends."""
    deadline = time.monotonic() + 120
    while not happens():
        if os.waitid(os.P_PID, processes[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    return True


if __name__ == "__main__":
    command(main)
