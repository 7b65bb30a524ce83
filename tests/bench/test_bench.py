"""bench at tiny sizes: every part runs, its ratios are positive numbers, and its counts hold."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.profiler import profile

import train
from bench import __main__ as bench
from bench import data as bench_data
from bench import loader as bench_loader
from bench.quality import first_time, grid, judge, level_at, print_minimind_best
from configurator import UserError, configure
from miniglm.checkpoint import environment, read_log, read_run
from model import GPT, ModelConfig
from tests.helpers import save_run, tiny_model, tiny_tokenizer, write_novel
from tests.runs import read_json

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=64", "--rounds=2"]
TINY += ["--batch_size=2", "--block_size=16", "--prompt_tokens=4", "--new_tokens=6", "--prompts=3"]


def assert_positive(ratios: dict[str, dict]) -> None:
    for label, ratio in ratios.items():
        numbers = ratio["min"], ratio["ratio"], ratio["max"]
        assert all(math.isfinite(number) and number > 0 for number in numbers), label


def results_of(part: str, folder: Path) -> dict:
    pytest.importorskip("transformers")
    bench.main([part, *TINY, f"--out={folder}"])
    return read_json(folder / f"{part}.json")["results"]


@pytest.mark.slow
def test_generate_prints_positive_ratios(tmp_path, capsys):
    results = results_of("generate", tmp_path)
    printed = capsys.readouterr().out
    for part, count in (("one", 6), ("many", 2)):
        ratios = results[part]["ratios"]
        assert len(ratios) == count
        assert_positive(ratios)
        assert all(f"  {label}" in printed for label in ratios)


@pytest.mark.slow
def test_start_is_the_sum_of_its_parts(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    data = write_novel(tmp_path / "data", tokenizer)
    model = tiny_model(n_vocab=tokenizer.n_vocab)
    out = save_run(tmp_path / "out", model, tokenizer, data, "pretrain")
    bench.main(["start", "--rounds=1", f"--out_dir={out}", f"--out={tmp_path}"])
    results = read_json(tmp_path / "start.json")["results"]
    assert results["seconds"] == pytest.approx(sum(results["parts"].values()))
    assert min(results["parts"].values()) > 0
    with pytest.raises(UserError, match="no checkpoint in"):
        bench.main(["start", "--rounds=1", f"--out_dir={tmp_path / 'none'}", f"--out={tmp_path}"])


def test_llama_says_in_a_line_what_it_needs(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(n_vocab=tokenizer.n_vocab)
    out = save_run(tmp_path / "out", model, tokenizer, tmp_path, "pretrain")
    given = ["llama", f"--out_dir={out}", f"--out={tmp_path}", "--prompt_tokens=4", "--rounds=1"]
    cases = {
        "": "llama takes --llama_cpp=",
        str(tmp_path / "none"): "does not start: No such file",
        sys.executable: "llama.cpp failed: ModuleNotFoundError: No module named 'llama_cpp'",
    }
    for python, words in cases.items():
        with pytest.raises(UserError, match=re.escape(words)):
            bench.main([*given, f"--llama_cpp={python}"])
    with pytest.raises(UserError, match="prompt_tokens=24 must be below 24"):
        bench.main([*given, f"--llama_cpp={sys.executable}", "--prompt_tokens=24"])


@pytest.mark.slow
def test_step_has_speeds_shares_and_memory_of_every_contender(tmp_path, capsys):
    results = results_of("step", tmp_path)
    printed = capsys.readouterr().out
    names = [row["name"] for row in results["steps"]]
    contenders = {f"{who}, {architecture}" for who, architecture in bench.CONTENDERS}
    assert {name.rpartition(", ")[0] for name in names} == contenders
    for row in results["steps"]:
        assert row["tokens_per_second"] > 0
        assert_positive({key: row[key] for key in ("share_of_product", "share_of_own_products")})
        assert f"  {row['name']} " in printed
        if Path("/proc/self/status").is_file():
            assert row["memory"]["built"] > row["memory"]["step"] > 0
    assert len(results["ratios"]) == 3 * len(names) / len(contenders)
    assert_positive(results["ratios"])
    whole = results["whole_steps"]
    assert_positive(whole["ratios"])
    linear = 4 * 32 * 32 + 3 * 32 * 64 + 32 * 261  # attention, mlp, head: the numbers have 261 ids
    flops = 2 * 16 * (6 * linear + 12 * 32 * 16 / 2)
    for dtype, shares in whole["shares"].items():
        rate = flops / median(whole["seconds"][f"muon, {dtype}"])
        for key, of in (("product", "product"), ("own_products", "products, Llama")):
            share = rate / results["flops_per_second"][f"{of}, {dtype}"]
            assert shares[f"share_of_{key}"] == pytest.approx(share)
        assert f"{shares['share_of_product']:.2f} of 2048 cubed, " in printed
    for times in whole["milliseconds"].values():
        assert all(milliseconds > 0 for milliseconds in times.values())
        assert all(f"  {kind} " in printed for kind in times)


@pytest.mark.parametrize("architecture", bench.ARCHITECTURES)
def test_a_step_moves_as_many_parameters_as_the_peers(architecture):
    pytest.importorskip("transformers")
    config = bench.Settings(n_layer=1, n_head=2, n_embd=32, vocab_size=64, block_size=16)
    sizes = []
    for who in ("ours", "Hugging Face"):
        model = bench.build(config, who, architecture)
        before = [p.detach().clone() for p in model.parameters()]
        step = bench.training_step(config, model)
        for _ in range(2):  # in the first, ours has outputs of 0, which pass nothing back
            step(torch.float32)
        after = list(model.parameters())
        assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
        sizes.append(sum(p.numel() for p in after))
    assert sizes[0] == sizes[1]


def test_what_log_and_save_take_are_shares_of_the_time(tmp_path, capsys):
    bench.main(["save", *TINY, f"--out={tmp_path}"])
    results = read_json(tmp_path / "save.json")["results"]
    took = {name: median(turns) for name, turns in results["seconds"].items()}
    share = took["log"] / (took["log"] + took["steps"])  # a line each 10 steps
    assert results["log"]["share"] == pytest.approx(share)
    share = took["save"] / (took["save"] + 17 * took["steps"])  # a checkpoint each 170
    assert results["save"]["share"] == pytest.approx(share)
    assert results["save"]["bytes"] > 2 * 4 * 320 * 32  # the embeddings and their moments alone
    assert "% of the time" in capsys.readouterr().out


@pytest.fixture(scope="module")
def toy_quality(tmp_path_factory) -> Callable[..., tuple[bench.Settings, dict]]:
    """Settings and train.py's words of three tiny recipes that train for a second each."""
    folder = tmp_path_factory.mktemp("quality")
    dataset = write_novel(folder / "novel", tiny_tokenizer())
    tiny = ["--n_layer=1", "--n_head=2", "--block_size=16", "--device=cpu", "--patience=None"]
    tiny += [f"--dataset={dataset}", "--warmup_iters=0", "--batch_size=2"]
    widths = {"ours": 32, "minimind": 16, "reference": 8}
    words = {name: [*tiny, f"--n_embd={width}"] for name, width in widths.items()}

    def settings(**changes: object) -> tuple[bench.Settings, dict]:
        times = {"ours_minutes": [0.005, 0.01], "minimind_minutes": 0.02, "rounds": 1}
        times |= {"minimind_rates": [1e-3], "reference_minutes": 0.02}
        return bench.Settings(**{"runs": str(folder / "runs")} | times | changes), words

    return settings


def test_quality_trains_what_is_missing_and_judges_it(toy_quality, capfd):
    config, words = toy_quality(only=["ours-0.01", "minimind"])
    assert bench.bench_quality(config, words) is None
    printed = capfd.readouterr().out
    assert "still to be trained: ours-0.005, reference-0.02" in printed
    config, words = toy_quality()
    results = bench.bench_quality(config, words)
    printed = capfd.readouterr().out
    assert printed.count("is ready") == 2  # the others were there
    assert "costs as in" in printed
    names = ["ours-0.005", "ours-0.01", "minimind-0.02-0.001", "reference-0.02"]
    assert list(results["runs"]) == names
    for run in results["runs"].values():
        costs = results["costs"][run["recipe"]]
        cost = costs["step"][costs["dtype"]]
        assert run["steps"] == int(60 * run["minutes"] / cost)
        assert run["curve"][-1][0] == pytest.approx(run["steps"] * cost / 60)
        assert len(run["curve"]) >= 2
        assert run["bits_best"] == min(bits for _, bits in run["curve"])
    assert (
        results["levels"][-1]["bits"] == results["runs"][results["best"]["minimind"]]["bits_best"]
    )
    runs = Path(config.runs)
    assert (runs / "quality.png").stat().st_size > 0
    assert {"environment", "recipes", "costs", "seconds"} == read_json(runs / "plan.json").keys()


def test_a_stopped_run_of_quality_goes_on(toy_quality, tmp_path, capfd):
    config, words = toy_quality(only=["ours-0.01"], runs=str(tmp_path))
    bench.bench_quality(config, words)
    out = tmp_path / "ours-0.01"
    steps = read_run(out, "latest")["progress"]["iter"]
    argv = [*words["ours"], f"--max_iters={steps}", f"--eval_interval={steps // 2}"]
    shutil.rmtree(out)
    # as Ctrl-C leaves it: a checkpoint in the middle, of a run of that many steps
    half = train.start([*argv, f"--out_dir={out}"])
    half.progress.iter, half.progress.rows, half.progress.best_val_loss = steps // 2, steps, 9.0
    batches, counts, _ = next(train.step_batches(half))
    train.train_step(half, batches, counts)
    train.save(half, is_best=True)
    bench.bench_quality(config, words)
    assert read_run(out, "latest")["progress"]["iter"] == steps
    assert read_log(out)[0]["iter"] > steps // 2
    assert f"{steps}/{steps}" in capfd.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGINT to a group")
def test_ctrl_c_is_left_to_the_script_that_trains(tmp_path):
    """It may take its time to save."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'saved').touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready').touch()\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    call = "from configurator import command; from bench.quality import run_script; "
    call += f"command(lambda _: run_script({str(script)!r}))"
    pipes = {"cwd": bench.ROOT, "stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", call], **pipes) as process:
        while not (tmp_path / "ready").exists() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert stderr == b"error: stopped; the same command goes on with it\n"
    assert (tmp_path / "saved").exists()


def test_a_plan_of_other_settings_is_not_used(toy_quality, tmp_path):
    config, words = toy_quality(runs=str(tmp_path))
    plan = '{"recipes": {"ours": {"n_embd": 33}}, "costs": {}, "environment": {}}'
    (tmp_path / "plan.json").write_text(plan, encoding="utf-8")
    with pytest.raises(UserError, match=r"plan\.json is of another n_embd of ours"):
        bench.bench_quality(config, words)


def test_a_plan_is_of_one_seed_and_those_from_before_seeds_were_given_are_of_train_pys(tmp_path):
    config = bench.Settings(runs=str(tmp_path))
    words = bench.recipe_words(config)
    earlier = {name: [w for w in argv if "seed" not in w] for name, argv in words.items()}
    recipes = {n: asdict(configure(train.Settings, argv)) for n, argv in earlier.items()}
    plan = {"recipes": recipes, "costs": {"ours": 1}, "environment": environment("cpu")}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert bench.plan(config, words) == {"ours": 1}
    config.seed = 2
    with pytest.raises(UserError, match=r"plan\.json is of another seed of ours"):
        bench.plan(config, bench.recipe_words(config))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b'{"recipes": {"ours"', b"\xff\xfe", b"[]", b"{}"),
        b'{"recipes": [], "costs": {}, "environment": {}}',
        b'{"recipes": {"another": {"n_embd": 32}}, "costs": {}, "environment": {}}',
    ],
)
def test_a_damaged_plan_is_told_in_a_line_that_says_what_to_do(toy_quality, tmp_path, content):
    config, words = toy_quality(runs=str(tmp_path))
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UserError, match=r"plan\.json is damaged; delete it") as caught:
        bench.bench_quality(config, words)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "word",
    [
        "--ours_minutes=[]",
        "--ours_minutes=-1",
        "--ours_minutes=[2, 0]",
        "--ours_minutes=[2, 2.0]",
        "--ours_minutes=[2, 2.0000001]",  # both ours-2
        "--ours_minutes=[2, 1e400]",
        "--ours_minutes=nan",
        "--minimind_minutes=0",
        "--minimind_minutes=inf",
        "--minimind_rates=[]",
        "--minimind_rates=1e-3,1e-3",
        "--minimind_rates=-1e-3",
        "--reference_minutes=-1",
        "--clock=cpu",
    ],
)
def test_quality_refuses_before_anything_is_measured(tmp_path, word):
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match=word[2:].partition("=")[0]) as caught:
        bench.main(["quality", f"--runs={runs}", word])
    assert len(str(caught.value).splitlines()) == 1
    assert not runs.exists()


def test_quality_has_a_run_for_each_number():
    argv = ["quality", "--ours_minutes=30", "--minimind_rates=1e-3,4e-3", "--seed=7"]
    config = configure(bench.Settings, argv)
    trials = bench.list_trials(config, bench.recipe_words(config))
    names = ["ours-30", "minimind-20-0.001", "minimind-20-0.004", "reference-60"]
    assert [trial.name for trial in trials] == names
    assert {configure(train.Settings, trial.words).seed for trial in trials} == {7}


def test_only_takes_a_run_or_a_recipe(toy_quality):
    config, words = toy_quality()
    trials = bench.list_trials(config, words)
    assert [t.name for t in bench.choose(trials, ["ours", "reference-0.02"])] == [
        "ours-0.005",
        "ours-0.01",
        "reference-0.02",
    ]
    with pytest.raises(UserError, match=r"only='our' names no run; did you mean 'ours'"):
        bench.choose(trials, ["our"])


def test_times_and_levels_of_a_curve_by_hand():
    curve = [(1, 4.0), (2, 3.0), (4, 3.5), (6, 2.5)]
    assert first_time(curve, 5.0) == 1  # not evaluated before
    assert first_time(curve, 3.25) == 1.75
    assert first_time(curve, 3.0) == 2
    assert first_time(curve, 2.75) == 5.5
    assert first_time(curve, 2.0) is None
    assert [level_at(curve, t) for t in (0.5, 1, 1.5, 5, 9)] == [None, 4.0, 3.5, 3.0, 2.5]
    assert grid(curve) == [4.0, 3.8, 3.6, 3.4, 3.2, 3.0, 2.8, 2.6]


def test_ours_is_judged_by_whichever_run_is_first():
    def run(recipe, minutes, *curve):
        best = min(bits for _, bits in curve)
        return {"recipe": recipe, "minutes": minutes, "curve": curve, "bits_best": best}

    runs = {
        "short": run("ours", 2, (1, 3.0), (2, 2.5)),
        "long": run("ours", 6, (3, 2.8), (6, 2.0)),
        "slow": run("minimind", 20, (10, 3.0), (20, 2.6)),
        "good": run("minimind", 20, (10, 3.0), (20, 2.4)),
        "other": run("reference", 60, (30, 4.0), (60, 3.0)),
    }
    cost = {"dtype": "bfloat16", "step": {"bfloat16": 1.0, "float32": 2.0}}
    costs = {"ours": cost, "minimind": cost, "reference": cost}
    results = judge(runs, costs)
    assert results["best"] == {"ours": "long", "minimind": "good", "reference": "other"}
    # 3.0 is reached by the short run, 2.4 by the long one half way between its evaluations
    assert results["levels"][0] == {
        "bits": 3.0,
        "minimind": 10,
        "ours": 1,
        "ratio": 10.0,
        "ratio_to_float32": 20.0,
    }
    last = results["levels"][-1]
    assert (last["bits"], last["minimind"], last["ours"]) == (2.4, 20, pytest.approx(4.5))
    assert results["ours_at_minimind_best"] == {
        "share_of_its_minutes": pytest.approx(4.5 / 20),
        "share_of_its_time_at_best": pytest.approx(4.5 / 20),
    }
    assert results["reference_never_there"]
    assert results["reference_at"] == {"2": None, "20": None, "60": 3.0}


def test_ours_is_told_beside_the_minutes_of_minimind_and_beside_its_own_time_at_best(capsys):
    print_minimind_best(judge_two((1, 3.0), (3, 2.0)))
    assert capsys.readouterr().out == (
        "  what MiniMind's 20 min reach, 2.500, ours has after 2.00 min: 0.10 of those, "
        "0.40 of the 5.00 min after which MiniMind has it\n"
    )
    print_minimind_best(judge_two((1, 3.0), (3, 2.6)))
    assert capsys.readouterr().out == "  what MiniMind's 20 min reach, 2.500, ours never has\n"


def judge_two(*ours: tuple[float, float]) -> dict:
    """judge of a curve of ours and one of MiniMind's, which is best at minute 5 of 20."""
    curves = {"ours": ours, "minimind": [(1, 3.0), (5, 2.5), (20, 2.8)], "reference": [(20, 4.0)]}
    runs = {
        name: {"recipe": name, "minutes": 20, "curve": curve}
        | {"bits_best": min(bits for _, bits in curve)}
        for name, curve in curves.items()
    }
    costs = {name: {"dtype": "float32", "step": {"float32": 1.0}} for name in curves}
    return {"runs": runs} | judge(runs, costs)


def test_products_of_a_step_counted_by_hand():
    config = ModelConfig(
        block_size=8, n_layer=1, n_head=2, n_embd=4, mlp="gelu", n_vocab=64, position="learned"
    )
    products = bench.matrix_products(GPT(config), rows=5)
    matrices = 4 * 12 + 4 * 4 + 2 * 4 * 16 + 4 * 64  # q k v, output, mlp, head
    attention = 12 * 1 * 4 * 8 / 2
    assert bench.n_flops(products) == 5 * 8 * (6 * matrices + attention)


def test_shares_of_the_step_with_muon_by_hand():
    seconds = {"muon, float32": [2.0, 1.0, 4.0], "adamw, float32": [1.0, 1.0, 1.0]}
    rates = {"product, float32": 100.0, "products, Llama, float32": 80.0}
    assert bench.muon_shares(seconds, 80, rates) == {
        "float32": {"share_of_product": 0.4, "share_of_own_products": 0.5}
    }


def test_products_are_computed_anew_in_each_turn():
    left, right = torch.randn(3, 4), torch.randn(4, 5)
    run = bench.run_products([(left, right)], torch.float32)
    with profile() as profiled:
        run()
    assert [e.count for e in profiled.key_averages() if e.key == "aten::mm"] == [1]


def test_a_ratio_is_of_medians_and_its_range_of_turns():
    seconds = {"ours": [1.0, 2.0, 4.0], "other": [2.0, 6.0, 4.0]}
    assert bench.speed_ratio(seconds, "ours", "other") == {"ratio": 2.0, "min": 1.0, "max": 3.0}


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    seconds = bench.measure(calls, 2, "wall", "cpu")
    assert "".join(order) == "ABABAB"
    assert {name: len(turns) for name, turns in seconds.items()} == {"A": 2, "B": 2}


def test_an_unknown_part_names_the_nearest():
    with pytest.raises(UserError, match="unknown part 'stpe'; did you mean 'step'"):
        bench.main(["stpe"])


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as Python marks what is not there
    with pytest.raises(UserError, match=r"requirements-dev\.txt"):
        bench.main(["step"])


@pytest.mark.slow
def test_data_prepares_a_small_text_in_each_way(tmp_path):
    pytest.importorskip("datasets")
    bench.main(["data", "--size_mb=2", f"--out={tmp_path}"])
    results = read_json(tmp_path / "data.json")["results"]
    assert results["megabytes"] == pytest.approx(2, rel=0.2)
    for name, figures in results["ways"].items():
        assert "failed" not in figures, name
        assert figures["rate"] > 0
        if Path("/proc/self/smaps_rollup").is_file():
            assert 10 < figures["peak_memory"] < 2000
    assert all(ratio > 0 for ratio in results["ratios"].values())


@pytest.mark.skipif(sys.platform == "win32", reason="core-seconds are not told there")
def test_a_way_that_says_more_than_a_pipe_holds_ends_and_its_last_line_is_kept(tmp_path):
    script = "import sys; print('step\\n' * 100_000 + 'no space', file=sys.stderr); sys.exit({})"
    figures = bench_data.run(["-c", script.format(0)], tmp_path, 1.0)
    assert figures["core_seconds"] > 0
    failed = bench_data.run(["-c", script.format(1)], tmp_path, 1.0)
    assert failed == {"failed": "no space"}


def test_loader_reads_a_corpus_of_holes(tmp_path, monkeypatch):
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    tiny_tokenizer().save(vocabulary / "tokenizer.json")
    monkeypatch.setattr(bench_loader, "VOCABULARY", str(vocabulary))
    tokens = 2**28 + 1_000_000  # in two files
    bench.main(["loader", f"--tokens={tokens}", f"--out={tmp_path}"])
    results = read_json(tmp_path / "loader.json")["results"]
    assert results["files"] == 2
    assert results["rows_of_an_epoch"] == results["different_rows"] == tokens // 1024
    # rows of an epoch fill the corpus without a gap, in an order that is no order
    assert results["chi_square_per_degree"] < 0.1
    assert abs(results["correlation_of_neighbours"]) < 0.01
    assert results["mean_distance_of_neighbours"] == pytest.approx(1 / 3, abs=0.005)
