"""Three recipes at equal time: what is trained, what continues, and who is judged to be first."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import train
from bench import __main__ as bench
from bench import quality
from bench.quality import Settings, first_time, grid, judge
from configurator import ROOT, UserError, configure
from miniglm.checkpoint import read_log, read_run
from miniglm.devices import environment
from tests.helpers import tiny_tokenizer, write_novel
from tests.runs import read_json


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, list[str]]:
    """train.py's argv of three tiny recipes, whose runs take a second each."""
    folder = tmp_path_factory.mktemp("quality")
    dataset = write_novel(folder / "novel", tiny_tokenizer())
    tiny = ["--n_layer=1", "--n_head=2", "--block_size=16", "--device=cpu", "--patience=None"]
    tiny += [f"--dataset={dataset}", "--warmup_iters=0", "--batch_size=2", "--prompts=[]"]
    widths = {"ours": 32, "minimind": 16, "reference": 8}
    recipes = {name: [*tiny, f"--n_embd={width}"] for name, width in widths.items()}
    recipes["ours"].append("--short_block=8")
    return recipes


@pytest.fixture
def toy(recipes, tmp_path, monkeypatch) -> Settings:
    """Settings for runs of these recipes."""
    monkeypatch.setattr(quality, "recipe_argv", lambda _: recipes)
    monkeypatch.setattr(quality, "EVALUATIONS", 2)
    times = {"ours_minutes": [0.005, 0.01], "minimind_minutes": 0.02, "reference_minutes": 0.02}
    return Settings(**times, minimind_rates=[1e-3], rounds=1, runs=str(tmp_path / "runs"))


def test_quality_trains_what_is_missing_and_judges_it(toy, capfd):
    assert quality.bench(replace(toy, only=["ours-0.01", "minimind"])) is None
    assert "still to be trained: ours-0.005, reference-0.02" in capfd.readouterr().out
    results = quality.bench(toy)
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
    runs = Path(toy.runs)
    assert (runs / "quality.png").stat().st_size > 0
    assert {"environment", "recipes", "costs"} == read_json(runs / "plan.json").keys()


def test_a_stopped_run_continues_and_one_of_other_steps_is_refused(toy, recipes, capfd):
    config = replace(toy, only=["ours-0.01"])
    quality.bench(config)
    out = Path(config.runs) / "ours-0.01"
    steps = read_run(out, "latest")["progress"]["iter"]
    shutil.rmtree(out)
    # as Ctrl-C leaves it: a checkpoint in the middle, of a run of that many steps
    argv = [*recipes["ours"], f"--max_iters={steps}", f"--eval_interval={steps // 2}"]
    run, state = train.start([*argv, f"--out_dir={out}"])
    progress = state.progress
    progress.iter, progress.rows, progress.best_val_loss = steps // 2, steps, 9.0
    batches, counts, _ = next(train.steps(run, state))
    train.train_step(run, state, batches, counts)
    train.save(run, state, is_best=True)
    quality.bench(config)
    assert read_run(out, "latest")["progress"]["iter"] == steps
    assert read_log(out)[0]["iter"] > steps // 2
    assert f"{steps}/{steps}" in capfd.readouterr().err
    with pytest.raises(UserError, match=f"ours-0.01 is a run of {steps} steps, the plan has 1;"):
        quality.is_finished(out, ["--max_iters=1"])


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
    pipes = {"cwd": ROOT, "stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", call], **pipes) as process:
        while not (tmp_path / "ready").exists() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert stderr == b"error: stopped; the same command continues\n"
    assert (tmp_path / "saved").exists()


# --- plan ----------------------------------------------------------------------------------------


def test_a_plan_holds_for_its_own_settings_alone(tmp_path):
    config = Settings(runs=str(tmp_path))
    recipes = quality.recipe_argv(config)
    settings = {n: asdict(configure(train.Settings, argv)) for n, argv in recipes.items()}
    del settings["ours"]["compile"]  # as in a plan that is older than a setting
    plan = {"recipes": settings, "costs": {"ours": 1}, "environment": environment("cpu")}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert quality.plan(config, recipes) == {"ours": 1}
    recipes["ours"].append("--seed=2")
    with pytest.raises(UserError, match=r"plan\.json has another seed of ours; pass another"):
        quality.plan(config, recipes)


@pytest.mark.parametrize(
    "content", [b'{"recipes": {"ours"', b"\xff\xfe", b"{}", b'{"recipes": [], "costs": {}}']
)
def test_a_damaged_plan_is_told_in_a_line_that_says_what_to_do(toy, content):
    Path(toy.runs).mkdir()
    (Path(toy.runs) / "plan.json").write_bytes(content)
    with pytest.raises(UserError, match=r"plan\.json is damaged; delete it[^\n]*$"):
        quality.bench(toy)


@pytest.mark.parametrize(
    "word",
    ["--ours_minutes=[]", "--ours_minutes=[2, 0]", "--minimind_rates=nan", "--only=our"],
)
def test_quality_refuses_before_anything_is_measured(tmp_path, word):
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match=word[2:].partition("=")[0]):
        bench.main(["quality", f"--runs={runs}", word])
    assert not runs.exists()


def test_there_is_a_run_for_each_number_and_only_takes_a_run_or_a_recipe():
    argv = ["--ours_minutes=30", "--minimind_rates=1e-3,4e-3", "--seed=7"]
    config = configure(Settings, argv)
    trials = quality.list_trials(config, quality.recipe_argv(config))
    names = ["ours-30", "minimind-20-0.001", "minimind-20-0.004", "reference-60"]
    assert [trial.name for trial in trials] == names
    assert {configure(train.Settings, trial.argv).seed for trial in trials} == {7}
    chosen = quality.choose(trials, ["minimind", "reference-60"])
    assert [trial.name for trial in chosen] == names[1:]


# --- curves --------------------------------------------------------------------------------------


def test_times_and_levels_of_a_curve_by_hand():
    curve = [(1, 4.0), (2, 3.0), (4, 3.5), (6, 2.5)]
    assert first_time(curve, 5.0) == 1  # not evaluated before
    assert first_time(curve, 3.25) == 1.75
    assert first_time(curve, 3.0) == 2
    assert first_time(curve, 2.75) == 5.5
    assert first_time(curve, 2.0) is None
    assert grid(curve) == [4.0, 3.8, 3.6, 3.4, 3.2, 3.0, 2.8, 2.6]


def test_ours_is_judged_by_whichever_run_is_first():
    def run(recipe, minutes, *curve):
        best = min(bits for _, bits in curve)
        return {"recipe": recipe, "minutes": minutes, "curve": curve, "bits_best": best}

    runs = {
        "short": run("ours", 2, (1, 3.0), (2, 2.5)),
        "long": run("ours", 6, (3, 2.8), (6, 2.0)),
        "slow": run("minimind", 20, (5, 3.0), (20, 2.6)),
        "good": run("minimind", 20, (10, 3.0), (20, 1.8)),
        "other": run("reference", 60, (30, 4.0), (60, 3.0)),
    }
    cost = {"dtype": "bfloat16", "step": {"bfloat16": 1.0, "float32": 2.0}}
    results = judge(runs, {"ours": cost, "minimind": cost, "reference": cost})
    assert results["best"] == {"ours": "long", "minimind": "good", "reference": "other"}
    rows = {row["bits"]: list(row.values())[1:] for row in results["levels"]}
    assert list(rows) == [3.0, 2.8, 2.6, 2.5, 2.4, 2.2, 2.0, 1.8]  # 2.5: best of our shortest run
    # of ours, MiniMind's, the reference's; the short run is first at 3.0, the long one at 2.4,
    # half way between its evaluations, as MiniMind's is; at 1.8 ours never is
    assert rows[3.0] == [1, 10, 60, 10.0, 20.0]
    assert rows[2.4] == pytest.approx([4.5, 15, None, 15 / 4.5, 30 / 4.5])
    assert rows[1.8] == [None, 20, None, None, None]
