"""Three recipes at equal time: what is trained, what continues, and who is judged to be first."""

from pathlib import Path

import pytest

import train
from bench import __main__ as bench
from bench import quality
from bench.quality import Settings, first_time, levels
from configurator import UserError, configure
from miniglm.checkpoint import read_run
from tests.helpers import tiny_tokenizer, write_novel
from tests.runs import edit_json, read_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Settings, dict, dict]:
    """Settings and recipes of a race of tiny models, of ten steps at most, and its results."""
    folder = tmp_path_factory.mktemp("quality")
    dataset = write_novel(folder / "novel", tiny_tokenizer())
    tiny = ["--n_layer=1", "--n_head=2", "--block_size=16", "--device=cpu", "--patience=None"]
    tiny += [f"--dataset={dataset}", "--warmup_iters=0", "--batch_size=2", "--prompts=[]"]
    widths = {"ours": 32, "minimind": 16, "reference": 8}
    recipes = {name: [*tiny, f"--n_embd={width}"] for name, width in widths.items()}
    recipes["ours"].append("--short_block=8")
    costs = {"dtype": "float32", "step": 0.06, "float32_step": 0.06}
    times = {"ours_minutes": [0.005, 0.01], "minimind_minutes": 0.01, "reference_minutes": 0.01}
    config = Settings(**times, minimind_rates=[1e-3], rounds=1, runs=str(folder / "runs"))
    measured = quality.plan(config, recipes)
    assert all(cost["step"] > 0 for cost in measured.values())
    plan = read_json(folder / "runs/plan.json")
    assert plan.keys() == {"environment", "recipes", "costs"}
    # so many steps on any machine
    edit_json(folder / "runs/plan.json", costs=dict.fromkeys(recipes, costs))
    return config, recipes, quality.race(config, recipes)


def test_all_recipes_are_trained_and_judged(finished):
    config, _, results = finished
    names = ["ours-0.005", "ours-0.01", "minimind-0.01-0.001", "reference-0.01"]
    assert list(results["runs"]) == names
    assert [run["steps"] for run in results["runs"].values()] == [5, 10, 10, 10]
    for run in results["runs"].values():
        assert len(run["curve"]) == run["steps"]  # evaluated at each of so few
        assert run["curve"][-1][0] == pytest.approx(run["steps"] * 0.001)
        assert run["bits_best"] == min(bits for _, bits in run["curve"])
    assert results["best"].keys() == {"ours", "minimind", "reference"}
    assert (Path(config.runs) / "quality.png").stat().st_size > 0


def test_finished_runs_stay_and_a_stopped_one_continues(finished, capfd):
    config, recipes, results = finished
    before = results["runs"]["ours-0.01"]
    ours = quality.list_trials(config, recipes)[1]
    out = Path(config.runs) / "stopped"
    # as Ctrl-C leaves it: a checkpoint in the middle of as many steps
    budget = quality.step_flags(configure(train.Settings, ours.argv), 10)
    run, state = train.start([*ours.argv, *budget, "--dtype=float32", f"--out_dir={out}"])
    for _ in range(5):
        batches, counts, _ = next(train.steps(run, state))
        train.train_step(run, state, batches, counts)
        state.progress.iter += 1
        state.progress.rows += run.config.rows_per_step
    train.save(run, state, is_best=True)
    cost = results["costs"]["ours"]
    continued = quality.train_trial(out, ours, cost)
    assert continued["curve"] == before["curve"][5:]
    assert read_run(out, "latest")["progress"]["iter"] == 10
    assert quality.race(config, recipes) == results
    assert capfd.readouterr().out.count("nothing to do") == 4
    with pytest.raises(UserError, match=r"ours-0\.01 is a run of 10 steps, the plan has 20;"):
        quality.train_trial(out.with_name("ours-0.01"), ours, cost | {"step": 0.03})


# --- plan ----------------------------------------------------------------------------------------


def test_a_plan_holds_for_its_own_settings_alone(finished):
    config, recipes, _ = finished
    other = recipes | {"ours": [*recipes["ours"], "--seed=2"]}
    with pytest.raises(UserError, match=r"plan\.json has other settings; pass another --runs="):
        quality.plan(config, other)


@pytest.mark.parametrize("word", ["--ours_minutes=[]", "--minimind_rates=[2, 0]"])
def test_quality_refuses_before_anything_is_measured(tmp_path, word):
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match=word[2:].partition("=")[0]):
        bench.main(["quality", f"--runs={runs}", word])
    assert not runs.exists()


def test_there_is_a_run_for_each_number():
    config = configure(Settings, ["--ours_minutes=30", "--minimind_rates=1e-3,4e-3", "--seed=7"])
    trials = quality.list_trials(config, quality.recipe_argv(config))
    names = ["ours-30", "minimind-20-0.001", "minimind-20-0.004", "reference-60"]
    assert [trial.name for trial in trials] == names
    assert {configure(train.Settings, trial.argv).seed for trial in trials} == {7}


# --- curves --------------------------------------------------------------------------------------


def test_times_and_levels_of_a_curve_by_hand():
    curve = [(1, 4.0), (2, 3.0), (4, 3.5), (6, 2.5)]
    assert first_time(curve, 5.0) == 1  # not evaluated before
    assert first_time(curve, 3.25) == 1.75
    assert first_time(curve, 3.0) == 2
    assert first_time(curve, 2.75) == 5.5
    assert first_time(curve, 2.0) == float("inf")
    assert levels(curve) == [4.0, 3.8, 3.6, 3.4, 3.2, 3.0, 2.8, 2.6, 2.5]
