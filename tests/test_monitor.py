"""What a run shows while it trains: samples, its speed, the time to its first step."""

import re
import time
from collections.abc import Callable

import pytest
import torch

from data_utils import Dataset, open_dataset
from miniglm.checkpoint import load_checkpoint
from miniglm.generation import Sampling
from miniglm.monitor import SAMPLE_TOKENS, first_prompt, sample_prompts, write_samples
from miniglm.text import complete
from tests.runs import TINY, log, run, train_here, words

# --- samples -----------------------------------------------------------------------------------


def test_a_sample_is_what_the_checkpoint_writes(toys, tmp_path, capsys):
    common = {"dataset": toys / "text", "max_iters": 2, "eval_interval": 1}
    out = train_here(out_dir=tmp_path / "out", prompts="刘备,曹操", **common)
    printed = capsys.readouterr().out
    checkpoint = load_checkpoint(out, "latest")
    prompts = [checkpoint.tokenizer.encode(text) for text in ("刘备", "曹操")]
    sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, temperature=0.8)
    [liu], [cao] = complete(checkpoint, prompts, sampling)
    assert printed.count(f"刘备{liu.text}\n") == 1  # each evaluation has its own
    assert f"曹操{cao.text}\n" in printed
    assert printed.count("-" * 20) == 2 * 2


def test_without_prompts_the_first_of_the_validation_split_is_taken(toys, tmp_path, capsys):
    data = Dataset(str(toys / "questions"))
    question, _ = data.conversations("val")[0]
    text, ids = first_prompt(data, block_size=256)
    assert text == question["content"]
    assert ids == data.tokenizer.render_prompt([question])
    common = {"init_from": toys / "base", "max_iters": 1, "prompts": None}
    train_here(dataset=toys / "questions", out_dir=tmp_path / "out", **common)
    assert f"问：{text}\n答：" in capsys.readouterr().out
    mixture = open_dataset(f"{toys}/text:1,{toys}/questions:1")
    assert first_prompt(mixture, block_size=256)[0] == text

    data = Dataset(str(toys / "text"))
    text, ids = first_prompt(data, block_size=256)
    assert data.tokenizer.decode(data.tokens["val"][:64]).startswith(text)
    assert len(text) == 12
    assert data.tokenizer.decode(ids) == text
    shorter, ids = first_prompt(data, block_size=8)
    assert text.startswith(shorter)
    assert 0 < len(ids) <= 4
    assert first_prompt(data, block_size=2)[1]


def test_samples_of_a_compiled_model_compile_nothing(toys):
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    plain, compiled = load_checkpoint(toys / "base"), load_checkpoint(toys / "base")
    compiled.model.compile(backend=backend)
    prompts = sample_prompts(plain, Dataset(str(toys / "text")), ["刘备"])
    samples = write_samples(compiled, prompts, seed=1, compiled=True)
    assert samples == write_samples(plain, prompts, seed=1, compiled=False)
    assert not graphs
    compiled.model(torch.zeros(1, 8, dtype=torch.int64))
    assert graphs  # it does compile otherwise


# --- speed -------------------------------------------------------------------------------------


def test_the_logged_rate_is_tokens_times_their_operations_over_the_peak(toys, tmp_path, capsys):
    out = train_here(dataset=toys / "text", out_dir=tmp_path / "out", max_iters=3)
    peak = re.search(r"\(peak ([\d.,]+) ([GT])FLOP/s, measured\)", capsys.readouterr().out)
    peak = float(peak[1].replace(",", "")) * {"G": 1e9, "T": 1e12}[peak[2]]
    operations = load_checkpoint(out).model.flops_per_token(TINY["block_size"])
    for record in log(out):
        rate = record["tokens_per_second"] * operations
        assert record["tflops"] * 1e12 == pytest.approx(rate, rel=1e-2, abs=1e6)
        assert record["mfu"] == pytest.approx(rate / peak, rel=1e-2, abs=1e-4)


# --- start-up ----------------------------------------------------------------------------------


def test_the_stages_of_the_start_add_up_to_the_time_since_the_process_began(toys, tmp_path):
    given = TINY | {"dataset": toys / "text", "out_dir": tmp_path / "out", "max_iters": 1}
    began = time.monotonic()
    out = run("train.py", *words(**given)).stdout
    elapsed = time.monotonic() - began
    [line] = [line for line in out.splitlines() if line.startswith("first step after")]
    total, stages = re.fullmatch(r"first step after ([\d.]+) s: (.+)", line).groups()
    names, seconds = zip(*(stage.rsplit(" ", 1) for stage in stages.split(", ")), strict=True)
    assert names[0] == "imports"
    assert {*names} <= {"imports", "data", "model", "peak", "objective", "first step"}
    assert sum(map(float, seconds)) == pytest.approx(float(total), abs=0.31)  # each is rounded
    assert float(seconds[0]) > 0.1  # torch's import at least
    assert elapsed / 3 < float(total) < elapsed + 0.1
