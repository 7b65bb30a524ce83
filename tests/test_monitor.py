"""What a run shows while it trains: samples, its rate, the time to its first step."""

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from data_utils import Dataset
from miniglm.checkpoint import load_checkpoint
from miniglm.generation import Sampling
from miniglm.monitor import (
    SAMPLE_TOKENS,
    Stopwatch,
    first_prompt,
    process_seconds,
    sample_prompts,
    write_samples,
)
from miniglm.text import complete
from tests.runs import (
    ROOT,
    TINY,
    assert_same_run,
    log,
    run,
    train_here,
    words,
)

# --- samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["text", "questions"])
def test_samples_do_not_disturb_the_training(toys, tmp_path, dataset):
    common = {"dataset": toys / dataset, "dropout": 0.2, "eval_interval": 5}
    none = train_here(out_dir=tmp_path / "none", prompts="", **common)
    some = train_here(out_dir=tmp_path / "some", prompts="刘备,曹操", **common)
    first = train_here(out_dir=tmp_path / "first", **common)
    assert_same_run(none, some)
    assert_same_run(none, first)


def test_a_sample_is_what_the_checkpoint_writes(toys, tmp_path, capsys):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", prompts="刘备,曹操")
    printed = capsys.readouterr().out
    checkpoint = load_checkpoint(out, "latest")
    prompts = [checkpoint.tokenizer.encode(text) for text in ("刘备", "曹操")]
    sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, temperature=0.8)
    [liu], [cao] = complete(checkpoint, prompts, sampling)
    assert f"刘备{liu.text}\n" in printed
    assert f"曹操{cao.text}\n" in printed
    assert printed.count("刘备" + liu.text) == 1  # each evaluation has its own
    assert printed.count("-" * 20) == 2 * 2


def test_without_prompts_the_first_of_the_validation_split_is_taken(toys, tmp_path, capsys):
    data = Dataset(str(toys / "questions"))
    question, _ = data.conversations("val")[0]
    text, ids = first_prompt(data, block_size=256)
    assert text == question["content"]
    assert ids == data.tokenizer.render_prompt([question])
    train_here(dataset=toys / "questions", out_dir=tmp_path / "out", init_from=toys / "base")
    assert capsys.readouterr().out.count(f"问：{text}\n答：") == 2

    data = Dataset(str(toys / "text"))
    text, ids = first_prompt(data, block_size=256)
    assert data.tokenizer.decode(data.tokens["val"][:64]).startswith(text)
    assert len(text) == 12
    assert data.tokenizer.decode(ids) == text
    shorter, ids = first_prompt(data, block_size=8)
    assert text.startswith(shorter)
    assert 0 < len(ids) <= 4
    assert first_prompt(data, block_size=2)[1]


def test_no_prompts_no_samples(toys, tmp_path, capsys):
    train_here(dataset=toys / "text", out_dir=tmp_path / "out", prompts="")
    printed = capsys.readouterr().out
    assert "step 20: loss" in printed
    assert "-" * 20 not in printed


def test_samples_of_a_compiled_model_compile_nothing(toys):
    texts, graphs = ["刘备"], []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    plain, compiled = load_checkpoint(toys / "base"), load_checkpoint(toys / "base")
    compiled.model.compile(backend=backend)
    prompts = sample_prompts(plain, Dataset(str(toys / "text")), texts)
    samples = write_samples(compiled, prompts, seed=1, compiled=True)
    assert samples == write_samples(plain, prompts, seed=1, compiled=False)
    assert not graphs
    compiled.model(torch.zeros(1, 8, dtype=torch.int64))
    assert graphs  # it is compiled otherwise


# --- rate --------------------------------------------------------------------------------------


def test_the_logged_rate_is_tokens_times_their_operations_over_the_peak(toys, tmp_path, capsys):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out")
    number, unit = re.search(
        r"\(peak ([\d.,]+) ([GT])FLOP/s, measured\)", capsys.readouterr().out
    ).groups()
    peak = float(number.replace(",", "")) * {"G": 1e9, "T": 1e12}[unit]
    operations = load_checkpoint(out).model.flops_per_token(TINY["block_size"])
    for record in log(out):
        rate = record["tokens_per_second"] * operations
        assert record["tflops"] * 1e12 == pytest.approx(rate, rel=1e-2, abs=1e6)
        assert record["mfu"] == pytest.approx(rate / peak, rel=1e-2, abs=1e-4)


# --- start-up ----------------------------------------------------------------------------------


def test_the_parts_of_the_start_add_up_to_the_whole(toys, tmp_path):
    words_ = words(**TINY | {"dataset": toys / "text", "out_dir": tmp_path / "out", "max_iters": 1})
    out = run("train.py", *words_).stdout
    [line] = [line for line in out.splitlines() if line.startswith("first step after")]
    total, parts = re.fullmatch(r"first step after ([\d.]+) s: (.+)", line).groups()
    names, seconds = zip(*(part.rsplit(" ", 1) for part in parts.split(", ")), strict=True)
    assert (
        {"imports", "peak", "first step"}
        <= {*names}
        <= {"imports", "data", "model", "peak", "objective", "first step"}
    )
    assert sum(map(float, seconds)) == pytest.approx(float(total), abs=0.31)  # each is rounded
    assert float(seconds[0]) > 0.1  # torch's import at least


def test_a_process_knows_its_age():
    script = "import time; time.sleep(1); from miniglm import monitor; "
    script += "print(monitor.process_seconds())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if sys.platform == "linux":
        assert 1 <= float(done.stdout) < 120
    assert process_seconds() > 0


def test_a_stopwatch_names_its_stages():
    watch = Stopwatch()
    watch.began, watch.seconds, watch.last = 0.0, {"imports": 2.25, "data": 0.5}, 2.75
    assert str(watch) == "first step after 2.8 s: imports 2.2, data 0.5"
