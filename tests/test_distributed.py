"""Several processes train as one does: the same rows, losses and files, and the same bits again."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import UserError
from data_utils import Dataset
from miniglm.distributed import ALONE, World, join, world_of
from miniglm.preflight import Start, check
from tests.runs import (
    ROOT,
    TINY,
    assert_same_run,
    contents,
    course,
    error_line,
    finish,
    free_port,
    ids_of_row,
    log,
    plant_nan,
    ready_python,
    saved,
    start,
    train_here,
    wait_for_lines,
    weights,
    without_bars,
    words,
)
from train import Settings, seed_dropout

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes that are forked or signalled")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Callable[..., list[subprocess.CompletedProcess]]:
    """several(2, **settings): train.py in two processes, with the environment that torchrun gives
    them, but without its seconds of imports. A dict for each before the settings is its own."""
    pythons = []
    with ExitStack() as stack:

        def run(size: int, *own: dict, script: str = "train.py", **settings: object):
            place = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            given = {} if settings.get("resume") else TINY
            while len(pythons) < size:
                ready = ready_python(tmp_path_factory.mktemp("process"))
                pythons.append(stack.enter_context(ready))

            def train(rank: int) -> subprocess.CompletedProcess:
                argv = words(**given | settings | (own[rank] if own else {}))
                return pythons[rank](script, *argv, **place, RANK=str(rank), LOCAL_RANK=str(rank))

            with ThreadPoolExecutor(size) as pool:
                return list(pool.map(train, range(size)))

        yield run


def train_in(several, size: int, **settings: object) -> Path:
    """A run of several processes that succeeds; its out_dir."""
    done = several(size, **settings)
    for process in done:
        assert process.returncode == 0, process.stderr
    for other in done[1:]:
        assert other.stdout == ""
        assert without_bars(other.stderr) == []
    return Path(settings["out_dir"])


def torchrun(
    *argv: object, script: object = "train.py", nodes: tuple[str, ...] = ("--standalone",)
) -> subprocess.Popen:
    """What a person types: torchrun --nproc_per_node=2 train.py ARGV."""
    command = ["-m", "torch.distributed.run", *nodes, "--nproc_per_node=2", str(script)]
    return start(*command, *argv, encoding="utf-8")


def errors(done: subprocess.CompletedProcess) -> list[str]:
    """What train.py said of its failure, torchrun's own report left out."""
    return [line for line in without_bars(done.stderr) if line.startswith("error: ")]


EXACT = ("iter", "tokens", "lr")  # of a line of the log


def assert_same_course(alone: Path, together: Path) -> None:
    """The same steps over the same tokens, and the same losses but for rounding."""
    assert log(alone)
    for x, y in zip(course(alone), course(together), strict=True):
        assert x == pytest.approx(y, rel=1e-3, abs=1e-3)
        assert [x[name] for name in EXACT] == [y[name] for name in EXACT]
        losses = [name for name in x if "loss" in name]
        assert [x[name] for name in losses] == pytest.approx([y[name] for name in losses], abs=1e-5)
    assert contents(alone).keys() == contents(together).keys()


# --- the same course ---------------------------------------------------------------------------

BASE = {"init_from": "base"}
LORA = BASE | {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 3e-3}
PAIRS = {"dataset": "pairs", "init_from": "answers", "learning_rate": 3e-3}
# 9 rows of a step: one process takes 3 x 3, the first of two 3 + 2, the second 2 + 2
UNEVEN = {"batch_size": 3, "gradient_accumulation_steps": 3}
MIXED = BASE | {"dataset": "questions:1,text:1", "mix_weight": 0.5}
COURSES = {
    "pretraining with Muon": {"dataset": "text", "gradient_accumulation_steps": 4},
    "pretraining with AdamW": {"dataset": "text", "optimizer": "adamw"},
    "uneven micro-batches": {"dataset": "text", **UNEVEN},
    "questions with a text": MIXED,
    "questions, uneven, with a text": MIXED | UNEVEN,
    "adapters": {"dataset": "questions", **LORA},
    "preferences": PAIRS | {"dpo_sft_weight": 0.5},
    "preferences by adapters": PAIRS | LORA | {"init_from": "answers", "dataset": "pairs"},
    "marks": LORA | {"init_from": "answers", "dataset": "marks"},
    "rewards": LORA
    | {"init_from": "answers", "dataset": "questions"}
    | {"reward": "chrf,bleu", "num_samples": 3, "max_iters": 8},
    "an untied head": {"dataset": "text", "tie_weights": False, "checkpoint_activations": True},
    "short rows first": {"dataset": "text", "short_block": 8},
    "an LSTM": {"dataset": "text", "model": "lstm", "n_head": 8},
}
QUICK = {("pretraining with Muon", False), ("questions, uneven, with a text", False)}
QUICK |= {("preferences by adapters", False), ("questions with a text", True)}
QUICK |= {("marks", False), ("rewards", False)}
WHOLE_ONLY = ("uneven micro-batches", "questions, uneven, with a text", "an LSTM", "rewards")
CASES = [(name, shard) for name in COURSES for shard in (False, True)]
CASES = [(name, shard) for name, shard in CASES if not (shard and name in WHOLE_ONLY)]


@pytest.fixture(scope="module")
def world(toys):
    """toys, and answers, a model of the questions."""
    train_here(dataset=toys / "questions", init_from=toys / "base", out_dir=toys / "answers")
    return toys


def located(world: Path, settings: dict) -> dict:
    """Names of datasets and models as paths; with samples at evaluations."""
    paths = {"prompts": None}
    for name in settings.keys() & {"dataset", "init_from"}:
        paths[name] = ",".join(f"{world}/{part}" for part in settings[name].split(","))
    return settings | paths


@pytest.mark.parametrize(
    ("name", "shard"), [c if c in QUICK else pytest.param(*c, marks=slow) for c in CASES]
)
def test_two_processes_take_the_course_of_one(world, several, tmp_path, name, shard):
    settings = located(world, COURSES[name])
    alone = train_here(out_dir=tmp_path / "alone", **settings)
    both = train_in(several, 2, out_dir=tmp_path / "both", shard=shard, **settings)
    assert_same_course(alone, both)
    assert saved(alone)["progress"]["rows"] == saved(both)["progress"]["rows"]
    assert saved(both)["environment"]["processes"] == 2
    theirs = weights(both)
    assert all((theirs[name] - w).abs().max() < 1e-3 for name, w in weights(alone).items())


def test_a_steps_rows_are_shared_without_gap_or_repeat():
    rows = np.arange(11)
    for size in (1, 2, 3, 4, 11):
        shares = [World(rank, size).share(rows) for rank in range(size)]
        assert np.concatenate(shares).tolist() == rows.tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_every_batch_counts_once_and_each_process_gets_as_many():
    for size in (1, 2, 3, 5):
        dealt = [list(World(rank, size).deal("abcdefg")) for rank in range(size)]
        counted = sorted(batch for own in dealt for batch, counts in own if counts)
        assert counted == list("abcdefg")
        assert len({len(own) for own in dealt}) == 1


def test_dropout_of_the_first_process_is_that_of_one_and_of_no_other():
    draws = []
    for rank in (0, 1, 2):
        seed_dropout(1337, 5, 2, rank)
        draws.append(torch.rand(8))
    torch.manual_seed(int(np.random.SeedSequence([1337, 5, 2]).generate_state(1, np.uint64)[0]))
    assert torch.equal(draws[0], torch.rand(8))
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


def test_evaluation_is_that_of_one_process(world, several, tmp_path):
    common = {"learning_rate": 0, "max_iters": 1, "batch_size": 3}
    for number, names in enumerate(("questions:3,text:1", "pairs")):
        given = common | located(world, {"dataset": names, "init_from": "answers"})
        [a] = log(train_here(out_dir=tmp_path / f"alone-{number}", **given))
        [b] = log(train_in(several, 2, out_dir=tmp_path / f"both-{number}", **given))
        scores = [name for name in a if name.startswith("val_")]
        assert len(scores) > 1
        assert [a[name] for name in scores] == pytest.approx([b[name] for name in scores], rel=1e-9)


@slow
def test_the_process_that_had_a_row_whose_loss_is_nan_is_named(world, several, tmp_path):
    data = Dataset(world / "text")
    given = {"dataset": data.path, "tie_weights": False}
    base = train_here(out_dir=tmp_path / "base", max_iters=1, **given)
    bad = plant_nan(base, data)
    rows = np.concatenate([data.step_rows(1337, 4 * n, 4, TINY["block_size"]) for n in range(60)])
    place = next(n for n, row in enumerate(rows) if bad in ids_of_row(data, row))
    step, rank = place // 4 + 1, place % 4 // 2
    more = {"init_from": base, "max_iters": 60, "eval_interval": 60, "log_interval": 60}
    first, _ = several(2, out_dir=tmp_path / "out", **given, **more)
    said = ", ".join(map(str, rows[place // 2 * 2 :][:2]))
    assert (
        f"at step {step}, of micro-batch 1 of process {rank}, which has the rows from tokens "
        f"{said} of " in error_line(first)
    )


# --- the same bits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shard"),
    [(2, False), *(pytest.param(*case, marks=slow) for case in [(3, False), (2, True), (3, True)])],
)
def test_stopped_and_resumed_several_processes_end_in_the_same_bits(
    world, several, tmp_path, size, shard
):
    # with three, a sum's bits depend on where in a bucket a gradient lies
    common = {"dataset": world / "text", "dropout": 0.1, "eval_interval": 3, "lr_decay_iters": 6}
    common |= {"batch_size": 3, "gradient_accumulation_steps": 2, "shard": shard}
    whole = train_in(several, size, out_dir=tmp_path / "whole", max_iters=6, **common)
    parts = train_in(several, size, out_dir=tmp_path / "parts", max_iters=3, **common)
    train_in(several, size, out_dir=parts, resume=True, max_iters=6)
    assert_same_run(whole, parts)


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("before", "after", "shard"),
    [
        (2, 1, False),
        *(pytest.param(*case, marks=slow) for case in [(1, 2, False), (2, 1, True), (1, 2, True)]),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes_and_says_so(
    world, several, tmp_path, before, after, shard, lora
):
    common = {"dataset": world / "pairs", "init_from": world / "answers", "eval_interval": 5}
    common |= {"lr_decay_iters": 10, "shard": shard, **lora}
    whole = train_here(out_dir=tmp_path / "whole", max_iters=10, **common)
    parts = tmp_path / "parts"
    for size, settings in ((before, common | {"max_iters": 5}), (after, {"max_iters": 10})):
        first, *_ = several(size, out_dir=parts, resume=size == after, **settings)
    assert f"processes was {before}, now {after}" in first.stdout
    assert_same_course(whole, parts)


# --- torchrun ----------------------------------------------------------------------------------


def test_torchrun_starts_a_run_whose_first_process_speaks_alone(world, several, tmp_path):
    given = words(**TINY | {"dataset": world / "text", "out_dir": tmp_path / "out"})
    done = finish(torchrun(*given))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("finished at step 20" in line for line in lines) == 1
    assert sum("on cpu in 2 processes" in line for line in lines) == 1
    assert sum(line.startswith("step 10: ") for line in lines) == 1
    assert_same_run(
        tmp_path / "out", train_in(several, 2, dataset=world / "text", out_dir=tmp_path / "other")
    )


@slow
def test_what_is_wrong_with_the_command_is_said_once(world, tmp_path):
    given = words(**TINY | {"dataset": world / "text", "out_dir": tmp_path / "out"})
    for wrong, message in (
        ("--n_layers=2", "unknown setting 'n_layers'"),
        ("--learning_rate=1e9", "nothing was saved"),
    ):
        done = finish(torchrun(*given, wrong))
        assert done.returncode == 1
        assert len(errors(done)) == 1, done.stderr
        assert message in errors(done)[0]


@slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_to_torchrun_all_stop_at_one_step(world, several, tmp_path, signum):
    common = {"dataset": world / "text", "max_iters": 200, "eval_interval": 100}
    out = tmp_path / "out"
    process = torchrun(*words(**TINY | common | {"out_dir": out}))
    wait_for_lines(out, 10, process)
    process.send_signal(signum)
    done = finish(process)
    step = saved(out)["progress"]["iter"]
    assert 10 <= step < 200 and len(log(out)) == step
    assert f"stopped at step {step} and saved; go on with\n  torchrun --standalone" in done.stdout
    assert errors(done) == []
    train_in(several, 2, out_dir=out, resume=True)
    assert_same_run(train_in(several, 2, out_dir=tmp_path / "whole", **common), out)


# train.py, changed by `code`
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
{code}
train.command(train.main)
"""
# the second process does something of its own before its seventh step
AT_STEP_6 = """
step = train.train_step

def step_with_a_fault(run, state, *batch):
    if (run.world.rank, state.progress.iter) == (1, 6):
        {action}
    return step(run, state, *batch)

train.train_step = step_with_a_fault
"""


def script_with(folder: Path, code: str) -> Path:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), code=code), encoding="utf-8")
    return script


@slow
def test_a_signal_to_one_process_stops_all(world, several, tmp_path):
    script = script_with(tmp_path, AT_STEP_6.format(action="os.kill(os.getpid(), signal.SIGTERM)"))
    out = tmp_path / "out"
    first, second = several(2, script=str(script), dataset=world / "text", out_dir=out)
    assert (first.returncode, second.returncode) == (130, 143), first.stderr + second.stderr
    assert saved(out)["progress"]["iter"] == 7


@slow
@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("raise train.UserError('a fault of the second one')", ["a fault of the second one"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", []),
    ],
)
def test_one_process_that_fails_ends_all_and_is_heard_alone(world, tmp_path, action, said):
    script = script_with(tmp_path, AT_STEP_6.format(action=action))
    given = words(**TINY | {"dataset": world / "text", "out_dir": tmp_path / "out"})
    done = finish(torchrun(*given, script=script))
    assert done.returncode == 1
    assert errors(done) == [f"error: {line}" for line in said], done.stderr
    assert len(log(tmp_path / "out")) == 6


TRACKED = """
from miniglm import trackers

def fail(*args, **options):
    raise train.UserError("a second id")

if os.environ["RANK"] == "1":
    trackers.tracking_id = fail
"""


@slow
def test_only_the_first_process_makes_a_tracking_id(world, several, tmp_path):
    given = {"dataset": world / "text", "track": "tensorboard"}
    script = str(script_with(tmp_path, TRACKED))
    out = train_in(several, 2, out_dir=tmp_path / "out", script=script, **given)
    assert (out / "tracking_id").is_file()


@slow
def test_two_machines_train_as_one(world, several, tmp_path):
    given = words(**TINY | {"dataset": world / "text", "out_dir": tmp_path / "out"})
    nodes = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    machines = [torchrun(*given, nodes=(*nodes, f"--node_rank={rank}")) for rank in (0, 1)]
    done = [finish(machine) for machine in machines]
    assert [machine.returncode for machine in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "on cpu in 4 processes" in done[0].stdout
    assert done[1].stdout == ""
    alone = train_here(dataset=world / "text", out_dir=tmp_path / "alone")
    assert_same_course(alone, tmp_path / "out")


@slow
def test_processes_with_other_settings_are_refused(world, several, tmp_path):
    done = several(2, {}, {"learning_rate": 1e-4}, dataset=world / "text", out_dir=tmp_path / "out")
    assert [process.returncode for process in done] == [1, 1]
    assert "the processes differ in their settings" in errors(done[0])[0]


# --- gradients ---------------------------------------------------------------------------------

ONE_STEP = """
import json, sys
sys.path.insert(0, {root!r})
from torch.profiler import ProfilerActivity, profile
from miniglm.distributed import together
from train import n_trained, start, steps, train_step

with together() as world:
    run, state = start(sys.argv[1:], world)
    batches, counts, _ = next(steps(run, state))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train_step(run, state, batches, counts)
    names = [event.name for event in profiler.events()]
    states = [pair for optimizer in state.optimizers for pair in optimizer.state.items()]
    # Muon's averages of rows are held by all: a number for each row of a matrix
    moments = [m for p, tensors in states for m in tensors.values() if m.shape == p.shape]

    def n_held(tensors):
        return sum(getattr(t, "to_local", lambda t=t: t)().numel() for t in tensors)

    counts = dict(micro=len(batches), parameters=n_trained(state.model))
    counts |= dict(held=n_held(state.model.parameters()), moments=n_held(moments))
    counts["sums"] = names.count("gloo:all_reduce")  # which reduce_scatter is made of, too
    print(json.dumps(counts))
"""


def one_step(several, world: Path, folder: Path, **settings: object) -> dict:
    """What the first of two processes holds after a step, and which sums it took part in."""
    script = folder / "one_step.py"
    script.write_text(ONE_STEP.format(root=str(ROOT)), encoding="utf-8")
    common = {"dataset": world / "text", "out_dir": folder / "out", "script": str(script)}
    first, _ = several(2, **common, **settings)
    assert first.returncode == 0, first.stderr
    return json.loads(first.stdout.splitlines()[-1])


# --- a sharded model ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=slow)])
def test_each_process_holds_half_and_sums_gradients_once_a_step(
    world, several, tmp_path, optimizer
):
    common = {"optimizer": optimizer, "gradient_accumulation_steps": 2}
    replica = one_step(several, world, tmp_path, **common)
    half = one_step(several, world, tmp_path, **common, shard=True)
    common["gradient_accumulation_steps"] = 8
    more = one_step(several, world, tmp_path, **common, shard=True)
    replica_of_more = one_step(several, world, tmp_path, **common)
    assert half["parameters"] == replica["parameters"] == replica["held"] == 2 * half["held"]
    assert replica["moments"] == 2 * half["moments"] > half["held"]
    assert (half["micro"], more["micro"]) == (1, 4)
    assert replica["sums"] == replica_of_more["sums"] > 0
    assert half["sums"] == more["sums"] == 3 + 1  # two blocks and the rest; the gradients' norm


def test_what_a_sharded_model_cannot_do_is_refused(world):
    text = Dataset(str(world / "text"))
    for settings, message in (
        ({"batch_size": 5}, "batch_size x gradient_accumulation_steps is 5"),
        ({"dtype": "float16"}, "does not go with float16"),
        ({"dry_run": True}, "dry_run=True does not know shard=True"),
    ):
        config = Settings(shard=True, block_size=32, max_iters=20, **settings)
        check(config, Start(), text, "cpu", ALONE)
        with pytest.raises(UserError, match=message):
            check(config, Start(), text, "cpu", World(0, 2))
    with pytest.raises(UserError, match="shard=True is for model='gpt'"):
        Settings(shard=True, model="lstm")


# --- who takes part ----------------------------------------------------------------------------


def test_the_place_of_a_process_is_what_torchrun_says():
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert world_of(environment) == World(5, 8, 1, 4)
    assert world_of({}) == world_of({"WORLD_SIZE": "8"}) == ALONE


def test_devices_and_rows_that_do_not_go_round_are_refused(world):
    with pytest.raises(UserError, match="device=mps: several processes train on cuda or on cpu"):
        join(World(0, 2), "mps")
    assert join(ALONE, "mps") == "mps"
    text = Dataset(str(world / "text"))
    check(Settings(batch_size=5, block_size=32, max_iters=20), Start(), text, "cpu", World(0, 4))
    with pytest.raises(UserError, match="too few for 8 processes"):
        check(
            Settings(batch_size=7, block_size=32, max_iters=20), Start(), text, "cpu", World(0, 8)
        )
