"""Whether a run is compiled; graphs and breaks of a compiled one; what it is without a compiler."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

import train
from miniglm import compiling
from tests.helpers import NEEDS_COMPILER
from tests.runs import (
    TINY,
    assert_same_run,
    course,
    read_json,
    run,
    saved,
    train_here,
    words,
)


class Graphs(list):
    steps = 0


@pytest.fixture
def graphs(monkeypatch):
    """After how many steps each graph was compiled, by a backend that traces forward and backward
    and needs no compiler."""
    torch._dynamo.reset()
    counters.clear()
    compiled = Graphs()

    def backend(graph: torch.fx.GraphModule, inputs: list):
        compiled.append(compiled.steps)
        return lookup_backend("aot_eager")(graph, inputs)

    def train_step(*args: object):
        compiled.steps += 1
        return step(*args)

    step = train.train_step
    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(compiling, "backend", backend)
    monkeypatch.setattr(compiling, "what_lacks", lambda device: None)
    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("dataset", "settings", "count"),
    [
        # with gradients, without; one row
        ("text", {"short_block": 8, "n_kv_head": 1, "n_layer": 3}, 3),
        ("text", {"checkpoint_activations": True, "dropout": 0.1, "dtype": "bfloat16"}, 3),
        ("text:1,questions:1", {"init_from": "base"}, 4),
        ("pairs", {"init_from": "base"}, 3),
        ("pairs", {"init_from": "base", "lora_rank": 2}, 5),
    ],
)
def test_a_run_is_a_few_graphs_without_a_break(toys, tmp_path, graphs, dataset, settings, count):
    """Of all layers, lengths of rows, evaluations and last batches; no graph comes after the first
    evaluation, and losses are those of a run that is not compiled."""
    dataset = ",".join(f"{toys}/{name}" for name in dataset.split(","))
    settings = {
        name: toys / value if name == "init_from" else value for name, value in settings.items()
    }
    settings["prompts"] = None  # samples compile nothing
    ways = {}
    for way in (False, True):
        out_dir = tmp_path / str(way)
        graphs.steps = 0
        ways[way] = train_here(dataset=dataset, out_dir=out_dir, compile=way, **settings)
    assert not counters["graph_break"], counters["graph_break"]
    assert len(graphs) == count, graphs
    assert max(graphs) <= 10  # steps before the first evaluation
    plain, compiled = map(course, ways.values())
    for ours, theirs in zip(plain, compiled, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2 if "dtype" in settings else 1e-4)


# --- the choice --------------------------------------------------------------------------------


def test_counted_work_decides_what_is_compiled():
    lots, little = (factor * compiling.LEAST["cpu"] for factor in (1.01, 0.99))
    if compiling.what_lacks("cpu") is None:
        assert compiling.decide(None, "cpu", lots)[0]
        assert compiling.decide(True, "cpu", 0) == (True, "compile=True")
    assert not compiling.decide(None, "cpu", little)[0]
    assert compiling.decide(False, "cpu", lots) == (False, "compile=False")
    assert not compiling.decide(True, "mps", lots)[0]


def test_work_is_counted_from_its_steps(toys):
    config = train.configure(train.Settings, words(dataset=toys / "text", max_iters=10))
    data = train.open_dataset(str(toys / "text"))
    model = SimpleNamespace(flops_per_token=lambda length: 100 * length)
    assert train.work_left(config, data, model, 0) == 10 * 16 * 256 * 100 * 256
    assert train.work_left(config, data, model, 9) == 16 * 256 * 100 * 256
    answers = train.open_dataset(str(toys / "questions"))
    mean = answers.input_tokens(np.arange(90), 256) / 90
    assert train.work_left(config, answers, model, 0) == pytest.approx(160 * 100 * mean**2, rel=0.1)


def test_a_run_keeps_its_choice(toys, tmp_path, capsys, graphs, monkeypatch):
    monkeypatch.setitem(compiling.LEAST, "cpu", 0)
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", max_iters=6)
    assert saved(out)["settings"]["compile"] is True
    assert "steps are compiled: " in capsys.readouterr().out
    monkeypatch.setitem(compiling.LEAST, "cpu", 1e30)
    train_here(out_dir=out, resume=True, max_iters=7)
    assert "steps are compiled: compile=True" in capsys.readouterr().out
    train_here(out_dir=out, resume=True, max_iters=8, compile=False)
    printed = capsys.readouterr().out
    assert "not bit for bit" in printed and "compile was True, now False" in printed
    monkeypatch.setattr(compiling, "what_lacks", lambda device: "no compiler is found")
    train_here(out_dir=out, resume=True, max_iters=9, compile=True)
    printed = capsys.readouterr().out
    assert "steps are not compiled: no compiler is found, so each step takes longer" in printed


# --- compilers ---------------------------------------------------------------------------------


@NEEDS_COMPILER
def test_a_compiled_run_resumes_to_the_same_bits(toys, tmp_path):
    """In processes of their own, as users have them."""
    settings = TINY | {"dataset": toys / "text", "n_layer": 1, "dtype": "bfloat16", "compile": True}
    settings |= {"eval_interval": 3, "keep_last": 2, "max_iters": 6}
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def train(*argv: str) -> None:
        done = run("train.py", *argv)
        assert done.returncode == 0, done.stderr
        assert "steps are compiled: " in done.stdout and "compiling failed" not in done.stderr

    train(*words(**settings | {"out_dir": whole}))
    shutil.copytree(whole, parts)  # as if killed after step 3
    shutil.rmtree(parts / "step-000006")
    for name in ("latest", "best"):
        (parts / name).write_text("step-000003\n", encoding="utf-8")
    train(f"--out_dir={parts}", "--resume")
    assert_same_run(whole, parts)


@pytest.mark.parametrize("place", ["nowhere", "broken"])
def test_without_a_compiler_a_run_says_so_and_trains(toys, tmp_path, place):
    """None on an empty PATH, or one that fails."""
    environment = {"PATH": str(tmp_path)}
    if place == "broken":
        broken = tmp_path / "broken"
        broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
        broken.chmod(0o755)
        environment = {"CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    out_dir = tmp_path / "out"
    tiny = words(n_layer=1, n_embd=32, n_head=2, block_size=16, max_iters=2, warmup_iters=0)
    argv = [*tiny, "--compile=True", "--device=cpu", f"--dataset={toys}/text"]
    done = run("train.py", *argv, f"--out_dir={out_dir}", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "so each step takes longer" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert read_json(out_dir / "step-000002" / "run.json")["progress"]["iter"] == 2
