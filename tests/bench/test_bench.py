"""bench at tiny sizes: every part runs, its ratios are positive numbers, and its counts hold."""

import math
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from bench import __main__ as bench
from bench import serve as bench_serve
from bench import step as bench_step
from bench.timing import OUTSIDE, Settings, measure, profile_kinds, speed_ratio
from configurator import UserError
from miniglm import compiling
from miniglm.losses import next_token
from model import GPT, ModelConfig
from tests.helpers import (
    random_ids,
    save_run,
    tiny_model,
    tiny_tokenizer,
    write_novel,
    write_questions,
)
from tests.runs import read_json

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--rounds=2"]


def results_of(part: str, folder: Path, *argv: str) -> dict:
    bench.main([part, *argv, f"--out={folder}"])
    record = read_json(folder / f"{part}.json")
    assert record.keys() == {"part", "environment", "settings", "results"}
    return record["results"]


def assert_positive(ratios: dict[str, dict]) -> None:
    for label, ratio in ratios.items():
        numbers = ratio["min"], ratio["ratio"], ratio["max"]
        assert all(math.isfinite(number) and number > 0 for number in numbers), label


@pytest.fixture(scope="module")
def novel(tmp_path_factory) -> Path:
    return write_novel(tmp_path_factory.mktemp("novel"), tiny_tokenizer())


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, novel) -> Path:
    tokenizer = tiny_tokenizer()
    model = tiny_model(n_vocab=tokenizer.n_vocab)
    return save_run(tmp_path_factory.mktemp("out"), model, tokenizer, novel, "pretrain")


# --- parts ---------------------------------------------------------------------------------------


def test_an_unknown_part_names_the_nearest_and_help_names_them_all(capsys):
    with pytest.raises(UserError, match="unknown part 'stpe'; did you mean 'step'"):
        bench.main(["stpe"])
    bench.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"python -m bench {part} " in printed for part in bench.PARTS)
    with pytest.raises(SystemExit):
        bench.main(["quality", "--help"])
    printed = capsys.readouterr().out
    assert "--minimind_rates=" in printed and "--prompt_tokens=" not in printed


@pytest.mark.slow
def test_step_has_speeds_shares_and_memory_of_every_contender(novel, tmp_path):
    pytest.importorskip("transformers")
    argv = [*TINY, "--batch_size=2", "--block_size=16", f"--dataset={novel}"]
    results = results_of("step", tmp_path, *argv)
    for own in results.pop("train.py").values():
        assert_positive(own["ratios"])
        assert {"muon / adamw", "muon, compiled: of its matmul roofline"} < own["ratios"].keys()
        assert {*bench_step.KINDS} < {*own["milliseconds, muon"]}
        assert min(own["milliseconds, muon, compiled"].values()) >= 0
    has_compiler = compiling.what_lacks("cpu") is None
    peers = bench_step.PEERS + (bench_step.COMPILED if has_compiler else [])
    names = {*bench_step.contenders(peers)}
    for of_dtype in results.values():
        assert of_dtype["tokens_per_second"].keys() == names
        assert len(of_dtype["ratios"]) == len(peers) + len(names)
        assert_positive(of_dtype["ratios"])
        if Path("/proc/self/status").is_file():
            assert of_dtype["memory"].keys() == names
            assert min(of_dtype["memory"].values()) >= 0


@pytest.mark.slow
def test_generate_prints_positive_ratios(tmp_path, capsys):
    pytest.importorskip("transformers")
    sizes = ["--vocab_size=64", "--prompt_tokens=4", "--new_tokens=6", "--prompts=3"]
    results = results_of("generate", tmp_path, *TINY, *sizes)
    printed = capsys.readouterr().out
    for part in ("one", "many"):
        ratios = results[part]["ratios"]
        assert len(ratios) == 3
        assert_positive(ratios)
        assert all(f"  {label}" in printed for label in ratios)


@pytest.mark.slow
def test_generate_of_a_trained_model_has_the_time_to_its_first_character(out_dir, tmp_path):
    pytest.importorskip("transformers")
    argv = ["--rounds=1", "--prompt_tokens=4", "--prompts=2", f"--out_dir={out_dir}"]
    results = results_of("generate", tmp_path, *argv)
    assert results["first character"] > 0
    # the text is as long as the model reads
    assert results["one"]["seconds"].keys() > {"ours", "Hugging Face", "memory read"}
    with pytest.raises(UserError, match="no checkpoint in"):
        bench.main(["generate", f"--out_dir={tmp_path / 'none'}"])


def test_generate_says_in_a_line_what_llama_cpp_needs(out_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.generate.first_character", lambda *_: 0)
    given = ["generate", f"--out={tmp_path}", "--prompt_tokens=4", "--rounds=1"]
    trained = [*given, f"--out_dir={out_dir}"]
    cases = {
        "--llama_cpp= goes with --out_dir=": [*given, "--llama_cpp=python"],
        "does not start: No such file": [*trained, f"--llama_cpp={tmp_path / 'none'}"],
        "failed: ModuleNotFoundError": [*trained, f"--llama_cpp={sys.executable}"],
        "prompt_tokens=24 must be below 24": [*trained, "--prompt_tokens=24"],
    }
    for message, argv in cases.items():
        with pytest.raises(UserError, match=message):
            bench.main(argv)


def test_without_transformers_the_error_says_what_to_install(novel, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as Python marks what is not there
    for argv in (["step", f"--dataset={novel}"], ["generate"]):
        with pytest.raises(UserError, match=r"requirements-dev\.txt"):
            bench.main(argv)


@pytest.mark.skipif(sys.platform == "win32", reason="core-seconds are not told there")
@pytest.mark.slow
def test_every_user_of_serve_gets_its_own_text(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(n_vocab=tokenizer.n_vocab, block_size=300)
    data = write_questions(tmp_path / "data", tokenizer)
    out = save_run(tmp_path / "out", model, tokenizer, data, "sft")
    results = results_of("serve", tmp_path, f"--out_dir={out}", "--users=3", "--seconds=2")
    for way in ("endpoint", "page"):
        assert results[way]["answers"] >= 3
        assert results[way]["failed"] == results[way]["wrong"] == 0
        assert 0 < results[way]["first"][0] <= results[way]["whole"][0]


def test_serve_counts_what_fails_and_what_is_anothers():
    def says(*texts: str):
        time.sleep(0.01)
        yield from texts
        if not texts:
            raise ValueError("nothing")

    asks = [partial(says, "a", "ab"), partial(says, "x"), says]
    results = bench_serve.crowd("endpoint", asks, ["ab", "y", "z"], 0.3)
    assert results["answers"] > results["wrong"] > 0
    assert results["failed"] > 0


# --- timing --------------------------------------------------------------------------------------


def test_a_ratio_is_of_medians_and_its_range_of_turns():
    seconds = {"ours": [1.0, 2.0, 4.0], "other": [2.0, 6.0, 4.0]}
    assert speed_ratio(seconds, "ours", "other") == {"ratio": 2.0, "min": 1.0, "max": 3.0}


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    seconds = measure(calls, Settings(rounds=2))
    assert "".join(order) == "ABABAB"
    assert {name: len(turns) for name, turns in seconds.items()} == {"A": 2, "B": 2}


def test_the_times_of_all_kinds_add_up_to_what_a_clock_measures():
    inside = []

    def step() -> None:
        began = time.perf_counter()
        torch.randn(300, 300) @ torch.randn(300, 300)
        time.sleep(0.02)
        inside.append(time.perf_counter() - began)

    began = time.perf_counter()
    times = profile_kinds(step, bench_step.KINDS, 3)
    outside = time.perf_counter() - began
    total = 3 * sum(times.values()) / 1000
    assert 0.99 * sum(inside[1:]) < total < 1.01 * outside
    assert times[OUTSIDE] > 0.99 * 20
    assert times["matmuls of the blocks"] > 0
    assert not any(times[kind] for kind in ("head and loss", "attention", "Muon", "AdamW", "data"))


# --- steps ---------------------------------------------------------------------------------------


def test_the_heads_matmuls_are_none_of_the_blocks():
    model, ids = tiny_model(), random_ids(2, 10)
    model.blocks = torch.nn.ModuleList()
    batch = ids, ids, torch.arange(20)
    times = profile_kinds(lambda: next_token(model, *batch).backward(), bench_step.KINDS, 3)
    assert times["head and loss"] > 0
    assert times["matmuls of the blocks"] == 0


def test_matmuls_of_a_step_counted_by_hand():
    config = ModelConfig(
        block_size=8, n_layer=1, n_head=2, n_embd=4, mlp="gelu", n_vocab=64, position="learned"
    )
    matmuls = bench_step.step_matmuls(GPT(config), rows=5)
    matrices = 4 * 12 + 4 * 4 + 2 * 4 * 16 + 4 * 64  # q k v, output, mlp, head
    attention = 12 * 1 * 4 * 8 / 2
    flops = sum(2 * left.numel() * right.shape[-1] for left, right in matmuls)
    assert flops == 5 * 8 * (6 * matrices + attention)


def test_matmuls_are_computed_anew_in_each_turn():
    run = bench_step.run_matmuls([(torch.randn(3, 4), torch.randn(4, 5))], "float32")
    with profile() as profiled:
        run()
    assert [e.count for e in profiled.key_averages() if e.key == "aten::mm"] == [1]


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2"])
def test_steps_of_ours_and_hugging_faces_train_as_many_parameters(architecture):
    pytest.importorskip("transformers")
    config = bench_step.Settings(n_layer=1, n_head=2, n_embd=32, batch_size=2, block_size=16)
    sizes = []
    for who in ("ours", "Hugging Face"):
        model = bench_step.build(config, 64, f"{who}, {architecture}")
        before = [p.detach().clone() for p in model.parameters()]
        step = bench_step.training_step(config, model, "float32")
        for _ in range(2):  # in the first, ours has outputs of 0, which pass nothing back
            step()
        after = list(model.parameters())
        assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
        sizes.append(sum(p.numel() for p in after))
    assert sizes[0] == sizes[1]
