"""bench.py at tiny sizes: every part runs, its ratios are positive numbers, and its counts hold."""

import json
import math
import sys

import pytest

import bench
from configurator import UserError
from tests.helpers import tiny_tokenizer, write_novel

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=64", "--rounds=2"]
TINY += ["--batch_size=2", "--block_size=16", "--prompt_tokens=4", "--new_tokens=6"]


def assert_positive(ratios: dict[str, dict]) -> None:
    for label, ratio in ratios.items():
        numbers = ratio["min"], ratio["ratio"], ratio["max"]
        assert all(math.isfinite(number) and number > 0 for number in numbers), label


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_ratios"), [("train", 4), ("generate", 3)])
def test_a_part_prints_positive_ratios(name, n_ratios, tmp_path, capsys):
    pytest.importorskip("transformers")
    bench.main([name, *TINY, f"--out={tmp_path}"])
    results = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["results"]
    assert len(results["ratios"]) == n_ratios
    assert_positive(results["ratios"])
    printed = capsys.readouterr().out
    assert all(f"  {label}" in printed for label in results["ratios"])


def test_recipes_train_for_the_time_given_and_are_drawn(tmp_path, capfd):
    dataset = write_novel(tmp_path / "novel", tiny_tokenizer())
    tiny = ["--n_layer=1", "--n_head=2", "--block_size=16", f"--dataset={dataset}", "--device=cpu"]
    words = {"wide": [*tiny, "--n_embd=32"], "narrow": [*tiny, "--n_embd=16"]}
    config = bench.Settings(runs=str(tmp_path / "runs"), seconds=1, evaluations=2)
    results = bench.bench_recipe(config, words)
    for run in results["runs"].values():
        assert run["steps"] >= 1
        assert run["evaluations"] in (1, 2)
        assert 0 < run["bits_best"] <= run["bits_at_end"]
    assert results["bits_best_ratio"] > 0
    assert f"{results['bits_best_ratio']:.3f}" in capfd.readouterr().out
    assert (tmp_path / "runs" / "curves.png").stat().st_size > 0


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
    with pytest.raises(UserError, match="unknown part 'trian'; did you mean 'train'"):
        bench.main(["trian"])


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as Python marks what is not there
    with pytest.raises(UserError, match=r"requirements-dev\.txt"):
        bench.main(["train"])
