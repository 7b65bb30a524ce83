"""An out_dir outlives kills at any moment and full disks, and a run goes on from it."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from configurator import UserError
from miniglm.checkpoint import (
    append_log,
    has_checkpoint,
    load_checkpoint,
    load_optimizers,
    read_log,
    read_run,
    rewind,
    save_checkpoint,
)
from model import GPT, ModelConfig
from tests.kills import KINDS, outlive, write_world
from tests.runs import (
    ROOT,
    TINY,
    assert_same_run,
    checkpoint_file,
    contents,
    edit_run,
    flip_bit,
    log,
    pointer,
    saved,
    start,
    toy_tokenizer,
    train_here,
    wait_for_lines,
    words,
)

FILES = ("model.safetensors", "optimizer.safetensors", "run.json", "tokenizer.json")
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no fork and no SIGINT to one")


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


def stepped_model(**options) -> tuple[GPT, torch.optim.Optimizer]:
    """A small model after one step of AdamW."""
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "n_vocab": 320} | options
    model = GPT(ModelConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.head(model(torch.arange(8)[None])).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save_step(
    out_dir: Path, step: int, is_best: bool, tokenizer, keep_last: int = 1, **options
) -> None:
    """A checkpoint of that step; all weights of its last norm are the step's number."""
    model, optimizer = stepped_model(**options)
    model.norm.weight.data.fill_(step)
    run = {"progress": {"iter": step}, "settings": {"keep_last": keep_last}}
    run |= {"dataset": {"kind": "pretrain"}}
    save_checkpoint(out_dir, model, [optimizer], tokenizer, run, is_best)


def step_of(out_dir: Path, which: str) -> int:
    """The step of the checkpoint that loads, by its weights, run.json and optimizer alike."""
    checkpoint = load_checkpoint(out_dir, which)
    load_optimizers(
        checkpoint.path, checkpoint.model, [torch.optim.AdamW(checkpoint.model.parameters())]
    )
    step = int(checkpoint.model.norm.weight[0])
    assert checkpoint.run["progress"]["iter"] == step
    return step


def checkpoints(out_dir: Path) -> set[str]:
    return {path.name for path in out_dir.iterdir() if "step-" in path.name}


# --- what is saved -----------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
def test_what_is_loaded_is_what_was_saved_and_a_tied_weight_is_stored_once(
    tmp_path, tokenizer, tie_weights
):
    save_step(tmp_path, 3, True, tokenizer, tie_weights=tie_weights, n_kv_head=1, bias=True)
    model, optimizer = stepped_model(tie_weights=tie_weights, n_kv_head=1, bias=True)
    model.norm.weight.data.fill_(3)
    stored = load_file(checkpoint_file(tmp_path, "model.safetensors"))
    assert sum(value.numel() for value in stored.values()) == model.n_params()
    assert ("lm_head.weight" in stored) == (not tie_weights)

    loaded = load_checkpoint(tmp_path)
    assert loaded.model.config == model.config
    assert loaded.tokenizer.sha256 == tokenizer.sha256
    assert not loaded.model.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name

    again = torch.optim.AdamW(loaded.model.parameters(), lr=0.1)
    load_optimizers(loaded.path, loaded.model, [again])
    for mine, theirs in zip(model.parameters(), loaded.model.parameters(), strict=True):
        before, after = optimizer.state[mine], again.state[theirs]
        assert before.keys() == after.keys() >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_only_the_latest_and_the_best_checkpoint_are_kept(tmp_path, tokenizer):
    for step, is_best in enumerate([True, True, False, False], 1):
        save_step(tmp_path, step, is_best, tokenizer)
    assert checkpoints(tmp_path) == {"step-000002", "step-000004"}
    assert (step_of(tmp_path, "best"), step_of(tmp_path, "latest")) == (2, 4)
    assert {path.name for path in (tmp_path / "step-000004").iterdir()} == set(FILES)
    save_step(tmp_path, 5, True, tokenizer)
    assert checkpoints(tmp_path) == {"step-000005"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_what_is_loaded_does_not_hold_its_files(tmp_path, tokenizer):
    # a mapped file keeps its space on the disk after it is deleted, and on Windows cannot be
    save_step(tmp_path, 1, True, tokenizer)
    checkpoint = load_checkpoint(tmp_path)
    optimizer = torch.optim.AdamW(checkpoint.model.parameters())
    load_optimizers(checkpoint.path, checkpoint.model, [optimizer])
    assert optimizer.state
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


UNPICKLE = re.compile(
    r"^\s*(import|from) (pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b"
    r"(?! import UnpicklingError)|(np|numpy)\.load\(|read_pickle|torch\.save|allow_pickle=True"
    r"|torch\.load\((?!.*weights_only=True)",  # which reads tensors and plain values alone
    re.MULTILINE,
)


def test_nothing_is_unpickled():
    """No source imports a module that unpickles, or calls a function that may run code by it."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("miniglm/**/*.py"), *ROOT.glob("data/**/*.py")]
    assert ROOT / "miniglm/checkpoint.py" in sources
    for path in sources:
        assert not UNPICKLE.search(path.read_text(encoding="utf-8")), path


# --- killed ------------------------------------------------------------------------------------

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def kills(action: Callable[[], None], out_dir: Path) -> list[Path]:
    """The states of out_dir after the action was killed before its 1st, 2nd, ... file operation,
    each in a directory of its own; in the last one the action went through."""
    states = []
    while not states or (states[-1].parent / "killed").exists():
        state = out_dir.parent / f"killed-{len(states)}" / out_dir.name
        shutil.copytree(out_dir, state)
        child = os.fork()
        if child == 0:
            kill_after(len(states))
            try:
                action(state)
                os._exit(0)
            finally:
                os._exit(1)  # the action failed
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            (state.parent / "killed").touch()
        else:
            assert os.WEXITSTATUS(status) == 0
        states.append(state)
    return states


def kill_after(operations: int) -> None:
    """From here on this process may do that many file operations; before the next it is killed."""
    left = [operations]

    def watch(event: str, args: tuple) -> None:
        if event in OPERATIONS:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(watch)


@posix
@pytest.mark.parametrize("is_best", [True, False])
def test_a_save_killed_at_any_file_operation_leaves_whole_checkpoints(tmp_path, tokenizer, is_best):
    out = tmp_path / "out"
    save_step(out, 1, True, tokenizer)
    save_step(out, 2, False, tokenizer)
    states = kills(lambda state: save_step(state, 3, is_best, tokenizer), out)
    assert len(states) > 20
    loads = set()
    for state in states:
        loaded = step_of(state, "latest"), step_of(state, "best")
        rewind(state)  # what resuming does
        after = step_of(state, "latest"), step_of(state, "best")
        assert after == ((3, 3 if is_best else 1) if loaded[0] == 3 else (2, 1))
        assert checkpoints(state) == {f"step-{step:06d}" for step in after}
        loads.add(loaded)
    assert loads == ({(2, 1), (3, 1), (3, 3)} if is_best else {(2, 1), (3, 1)})


@posix
def test_the_first_save_killed_at_any_file_operation_leaves_nothing_or_what_loads(
    tmp_path, tokenizer
):
    out = tmp_path / "out"
    out.mkdir()
    states = kills(lambda state: save_step(state, 1, True, tokenizer), out)
    assert len(states) > 15
    assert not has_checkpoint(states[0])
    assert has_checkpoint(states[-1])
    for state in states:
        if has_checkpoint(state):
            assert step_of(state, "latest") == 1
            assert step_of(state, "best") == 1


@posix
def test_a_rewind_killed_at_any_file_operation_is_made_up_by_the_next(tmp_path, tokenizer):
    out = tmp_path / "out"
    save_step(out, 1, True, tokenizer)
    shutil.copytree(out / "step-000001", tmp_path / "kept")
    save_step(out, 2, True, tokenizer)
    (tmp_path / "kept").rename(out / "step-000001")
    (out / "best").write_text("step-000001\n")  # as if killed before `best` was written
    (out / ".step-000003.tmp").mkdir()
    for step in (1, 2, 3):
        append_log(out, {"iter": step})
    states = kills(rewind, out)
    assert len(states) > 5
    for state in states:
        assert step_of(state, "latest") == 2
        assert step_of(state, "best") in (1, 2)
        assert [record["iter"] for record in read_log(state)] in ([1, 2, 3], [1, 2])
        rewind(state)
        assert (step_of(state, "latest"), step_of(state, "best")) == (2, 2)
        assert checkpoints(state) == {"step-000002"}
        assert [record["iter"] for record in read_log(state)] == [1, 2]


def test_the_rest_of_a_killed_save_is_no_part_of_the_next(tmp_path, tokenizer):
    save_step(tmp_path, 1, True, tokenizer)
    for name in ("step-000002", ".step-000002.tmp"):  # renamed, but no pointer yet; not renamed
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
        (tmp_path / name / "stale").touch()
    save_step(tmp_path, 2, False, tokenizer)
    assert checkpoints(tmp_path) == {"step-000001", "step-000002"}
    assert {path.name for path in (tmp_path / "step-000002").iterdir()} == set(FILES)
    assert step_of(tmp_path, "latest") == 2


def test_a_log_cut_at_any_byte_keeps_its_whole_lines(tmp_path):
    records = [{"iter": step, "train_loss": step / 3} for step in (1, 2, 3)]
    for record in records:
        append_log(tmp_path, record)
    whole = (tmp_path / "log.jsonl").read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("}")]
    for cut in range(len(whole) + 1):
        (tmp_path / "log.jsonl").write_bytes(whole[:cut])
        assert read_log(tmp_path) == records[: sum(end < cut for end in ends)]


@pytest.mark.parametrize(
    "line", [b"\xe5", b"[" * 10**5, b"9" * 5000, b"[]", b"{}", b'{"iter": "1"}']
)
def test_a_damaged_line_of_the_log_is_named_and_stays(line, tmp_path):
    content = line + b'\n{"iter": 1}\n'
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"^.*log\.jsonl is damaged.*\Z"):
        rewind(tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == content
    (tmp_path / "log.jsonl").write_bytes(b'{"iter": 1}\n' + b"[" * 10**5)
    assert read_log(tmp_path) == [{"iter": 1}]


# --- full disks and damage ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(tmp_path, tokenizer, name):
    save_step(tmp_path, 1, True, tokenizer)
    file = checkpoint_file(tmp_path, name)
    edit_run(file.parent, sha256={})  # as an older version wrote it
    whole = file.read_bytes()
    # what a disk may have left: nothing, the beginning, zeros
    damages = [b"", whole[:1], whole[: len(whole) // 2], whole[:-2], bytes(len(whole))]
    damages += [b"{}", b"null", b'{"architecture": {"n_layers": 3}}']
    for content in [*damages, None]:
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=rf"^.*{re.escape(name)}.*\Z"):
            step_of(tmp_path, "latest")


@pytest.mark.parametrize("name", sorted({*FILES} - {"run.json"}))
def test_a_flipped_bit_is_named_and_the_checkpoint_before_still_there(tmp_path, tokenizer, name):
    for step in (1, 2):
        save_step(tmp_path, step, True, tokenizer, keep_last=2)
    file = checkpoint_file(tmp_path, name)
    flip_bit(file)
    said = f"{file} is damaged (its sha256 is not that in run.json); copy it again, write "
    said += f"step-000001 into {tmp_path}/latest and best, or train again"
    with pytest.raises(UserError, match=re.escape(said)):
        step_of(tmp_path, "latest")
    for name in ("latest", "best"):
        (tmp_path / name).write_text("step-000001\n")
    rewind(tmp_path)
    assert step_of(tmp_path, "latest") == step_of(tmp_path, "best") == 1


# part of run.json, a name in it or "", a value
WRONG = [("settings", "", []), ("settings", "max_iters", "x"), ("settings", "track", 3)]
WRONG += [("progress", "iter", "x"), ("progress", "", {}), ("dataset", "", "x"), ("scaler", "", 3)]
WRONG += [("architecture", "n_layer", 2.5), ("architecture", "norm", "x")]
WRONG += [("sha256", "", "x"), ("dataset", "", {})]


@pytest.mark.parametrize(("part", "name", "value"), WRONG)
def test_a_value_of_a_wrong_type_in_run_json_is_one_line(toys, tmp_path, part, name, value):
    out = shutil.copytree(toys / "base", tmp_path / "out")
    edit_run(out / "step-000020", **{part: saved(out)[part] | {name: value} if name else value})
    before = contents(out)
    with pytest.raises(UserError, match=r"^.*step-000020/run\.json is damaged \(.*\).*\Z"):
        if part in ("architecture", "dataset"):
            load_checkpoint(out)
        train_here(out_dir=out, resume=True, max_iters=30)
    if part == "dataset":
        with pytest.raises(UserError, match=r"is damaged|as prepared then"):
            train_here(out_dir=out, resume=True, max_iters=30)
    assert contents(out) == before


def test_with_lost_pointers_the_newest_checkpoint_is_found(toys, tmp_path):
    common = {"dataset": toys / "text", "out_dir": tmp_path / "out"}
    out = train_here(**common, max_iters=20, keep_last=2)
    edit_run(out / "step-000020", best="step-000010")
    for name in ("latest", "best"):
        (out / name).unlink()
    with pytest.raises(UserError, match="already holds a run; pass --resume"):
        train_here(**common)
    steps = {which: read_run(out, which)["progress"]["iter"] for which in ("best", "latest")}
    assert steps == {"best": 10, "latest": 20}
    train_here(out_dir=out, resume=True)  # nothing to do
    assert (pointer(out, "best"), pointer(out, "latest")) == ("step-000010", "step-000020")
    train_here(out_dir=out, resume=True, max_iters=22)
    assert [record["iter"] for record in log(out)] == [*range(1, 23)]


def test_a_damaged_pointer_is_an_error_of_one_line(tmp_path, tokenizer):
    save_step(tmp_path, 1, True, tokenizer)
    garbage = (b"", bytes(12), b"\xff\xfe\x00", b"[" * 10**5)  # no name of a file is so long
    for content in (b"step-000009\n", b"../elsewhere\n", *garbage):
        (tmp_path / "best").write_bytes(content)
        with pytest.raises(UserError, match=r"^.*\Z"):
            load_checkpoint(tmp_path, "best")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("model.safetensors", {"n_embd": 16}),
        ("model.safetensors", {"n_layer": 1}),
        ("model.safetensors", {"tie_weights": False}),
        ("optimizer.safetensors", {"n_layer": 1}),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, tokenizer, name, options):
    save_step(tmp_path / "ours", 1, True, tokenizer, n_layer=2)
    save_step(tmp_path / "other", 1, True, tokenizer, **{"n_layer": 2} | options)
    shutil.copy(*(checkpoint_file(tmp_path / out, name) for out in ("other", "ours")))
    edit_run(checkpoint_file(tmp_path / "ours", name).parent, sha256={})
    with pytest.raises(UserError, match=name):
        step_of(tmp_path / "ours", "latest")


# --- stopped and resumed in processes of their own ---------------------------------------------


def flags(toys: Path, **settings: object) -> list[str]:
    given = {"dataset": toys / "text", "dropout": 0.1, "gradient_accumulation_steps": 2}
    return words(**TINY | given | settings)


@posix
def test_a_run_stopped_by_ctrl_c_and_by_sigterm_ends_in_the_bits_of_one_never_stopped(
    toys, tmp_path, capsys
):
    # a directory with a blank, as the printed command must quote it
    out = tmp_path / "out 三国"
    common = {"max_iters": 60, "eval_interval": 20}
    script, argv = "train.py", flags(toys, out_dir=out, **common)
    for stop, signum in ((5, signal.SIGINT), (25, signal.SIGTERM)):
        process = start(script, *argv)
        wait_for_lines(out, stop, process)
        process.send_signal(signum)
        stdout, stderr = (part.decode() for part in process.communicate(timeout=120))
        assert process.returncode == 128 + signum
        assert "Traceback" not in stderr
        step = read_run(out, "latest")["progress"]["iter"]
        assert stop <= step < 60
        assert f"stopped at step {step} and saved; go on with\n" in stdout
        # it prints what a person types: python, and a script beside which they stand
        python, script, *argv = shlex.split(stdout.splitlines()[-1])
        assert (python, script) == ("python", "train.py")
    train.main(argv)
    assert "finished at step 60" in capsys.readouterr().out
    train.main(flags(toys, out_dir=tmp_path / "whole", **common))
    assert_same_run(tmp_path / "whole", out)
    assert len(log(out)) == 60


@posix
def test_a_second_ctrl_c_stops_without_saving(toys, tmp_path):
    out = tmp_path / "out"
    slow = {"gradient_accumulation_steps": 1000}  # a step takes seconds
    process = start("train.py", *flags(toys, out_dir=out, **slow))
    read_until(process, b"0%|")
    process.send_signal(signal.SIGINT)
    read_until(process, b"stopping after this step")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.endswith(b"interrupted\n")
    assert b"Traceback" not in stderr
    assert not has_checkpoint(out)


def read_until(process: subprocess.Popen, text: bytes) -> None:
    """Reads stderr up to this text."""
    read = b""
    while text not in read:
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, read
        read += piece


QUICK = "accumulation, short rows first"


@pytest.fixture(scope="module")
def killed_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    write_world(folder)
    return folder


@posix
@pytest.mark.parametrize(
    ("kind", "count"),
    [(QUICK, 4), *(pytest.param(kind, 6, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_a_run_killed_at_random_ends_in_the_bits_of_one_never_killed(
    killed_world, tmp_path, kind, count
):
    done = outlive(killed_world, tmp_path, kind, count, random.Random(kind))
    assert done.same
    # on a busy machine a run may end before the last ones
    assert done.kills > count // 2
    assert done.in_a_save > 0
