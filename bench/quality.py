"""Three recipes in the same time: who reaches which validation bits per byte when.

    python data/sanguo/prepare.py
    python data/sanguo/prepare.py --vocab_size=6400 --out=data/sanguo_6400
    python data/fetch_data.py gpt2
    python data/sanguo/prepare.py --tokenizer=gpt2 --out=data/sanguo_gpt2
    python -m bench quality                  all runs, then the table and the picture

Ours, MiniMind's (config/minimind.py) and the reference's, at the same depth and width. Machines are
shared, so time is counted in steps: the cost of each recipe's step is measured first, in turns, and
kept in plan.json; a run has as many steps as fit its minutes, and its schedule ends there.
Evaluations are not counted. After Ctrl-C the same command continues; finished runs stay.
"""

import math
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Annotated

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

import train as training
from bench import timing
from bench.step import dtypes_of, own_step
from bench.timing import measure
from configurator import UserError, above, configure, repo_path, show_path
from miniglm.checkpoint import has_checkpoint, read_log, read_run
from miniglm.devices import environment
from miniglm.jsonl import read_report, write_report
from visualize import save_figure, style

COLUMNS = ("bits", "minimind", "ours", "ratio")  # minutes to a level of bits per byte
EVALUATIONS = 20  # of a run
PATIENCE = 6  # evaluations without a better one, after which a run has overfitted and is stopped

Curve = list[tuple[float, float]]  # minutes, bits per byte: an evaluation each
Positive = Annotated[list[float], above(0)]


@dataclass
class Settings(timing.Settings):
    ours_minutes: Positive = field(default_factory=lambda: [2, 3, 4, 6.67])  # a run each
    minimind_minutes: Annotated[float, above(0)] = 20.0  # of each of its runs
    minimind_rates: Positive = field(default_factory=lambda: [5e-4, 1e-3, 2e-3])  # a run each
    reference_minutes: Annotated[float, above(0)] = 60.0  # of its run
    runs: str = "bench-quality"  # where they are trained

    def __post_init__(self):
        super().__post_init__()
        if not (self.ours_minutes and self.minimind_rates):
            raise UserError("ours_minutes and minimind_rates must each hold one number or more")


@dataclass
class Trial:
    """A run: a recipe and its time."""

    name: str  # of its out_dir
    recipe: str
    minutes: float  # of training steps at their measured cost
    argv: list[str]  # train.py's, without what depends on the cost


def bench(config: Settings) -> dict:
    return race(config, recipe_argv(config))


def race(config: Settings, recipes: dict[str, list[str]]) -> dict:
    """Trains what is not finished -> costs, runs, who reaches which level when; and a picture."""
    folder, costs, runs = repo_path(config.runs), plan(config, recipes), {}
    for trial in list_trials(config, recipes):
        runs[trial.name] = train_trial(folder / trial.name, trial, costs[trial.recipe])
    results = {"costs": costs, "runs": runs} | judge(runs, costs)
    print_quality(results)
    save_figure(quality_figure(results), folder / "quality.png")
    print(f"  drawn in {show_path(folder / 'quality.png')}")
    return results


# --- trials --------------------------------------------------------------------------------------


def recipe_argv(config: Settings) -> dict[str, list[str]]:
    """train.py's argv for each recipe, all of the same depth and width."""
    names = ("n_layer", "n_head", "n_embd", "device", "seed")
    same = [f"--{name}={getattr(config, name)}" for name in names]
    same += ["--compile=False", f"--patience={PATIENCE}"]
    return {
        "ours": ["config/pretrain_sanguo.py", *same],
        "minimind": ["config/minimind.py", *same, f"--n_kv_head={max(1, config.n_head // 4)}"],
        "reference": ["config/pretrain_sanguo_reference.py", *same],
    }


def list_trials(config: Settings, recipes: dict[str, list[str]]) -> list[Trial]:
    trials = [Trial(f"ours-{m:g}", "ours", m, recipes["ours"]) for m in config.ours_minutes]
    minutes = config.minimind_minutes
    for rate in config.minimind_rates:
        argv = [*recipes["minimind"], f"--learning_rate={rate:g}", f"--min_lr={rate / 10:g}"]
        trials.append(Trial(f"minimind-{minutes:g}-{rate:g}", "minimind", minutes, argv))
    minutes = config.reference_minutes
    return [*trials, Trial(f"reference-{minutes:g}", "reference", minutes, recipes["reference"])]


def train_trial(out_dir: Path, trial: Trial, cost: dict) -> dict:
    """Trains or continues a trial -> its curve on the axis of its steps' cost, and its best."""
    max_iters = int(60 * trial.minutes / cost["step"])
    if max_iters < 1:
        raise UserError(f"{trial.name}: not enough for a step; give {trial.recipe} more minutes")
    if has_checkpoint(out_dir):
        planned = read_run(out_dir, "latest")["settings"]["max_iters"]
        if planned != max_iters:
            raise UserError(
                f"{show_path(out_dir)} is a run of {planned} steps, the plan has {max_iters}; "
                "delete it, or pass another --runs="
            )
    budget = step_flags(configure(training.Settings, trial.argv), max_iters)
    training.main(
        [*trial.argv, *budget, f"--dtype={cost['dtype']}", f"--out_dir={out_dir}", "--resume"]
    )
    evaluated = [r for r in read_log(out_dir) if "val_bits_per_byte" in r]
    curve = [(r["iter"] * cost["step"] / 60, r["val_bits_per_byte"]) for r in evaluated]
    minutes, bits = min(curve, key=lambda point: point[1])
    best = {"bits_best": bits, "minutes_at_best": minutes}
    return {"recipe": trial.recipe, "steps": evaluated[-1]["iter"], "curve": curve} | best


def step_flags(settings: training.Settings, max_iters: int) -> list[str]:
    """train.py's flags for a schedule of that many steps."""
    tenth = math.ceil(max_iters / 10)
    return [
        f"--max_iters={max_iters}",
        f"--eval_interval={math.ceil(max_iters / EVALUATIONS)}",
        f"--warmup_iters={min(settings.warmup_iters, tenth)}",
        f"--log_interval={min(settings.log_interval, tenth)}",
    ]


# --- costs ---------------------------------------------------------------------------------------


def plan(config: Settings, recipes: dict[str, list[str]]) -> dict[str, dict]:
    """The costs of each recipe, from plan.json, or measured and written there."""
    path = repo_path(config.runs) / "plan.json"
    settings = {name: asdict(configure(training.Settings, recipes[name])) for name in recipes}
    if not path.is_file():
        costs = measure_costs(config, recipes)
        machine = environment(config.device)
        write_report(path, {"environment": machine, "recipes": settings, "costs": costs})
        return costs
    record = read_report(path, ("recipes", "costs"), "delete it")
    if record["recipes"] != settings:
        raise UserError(f"{show_path(path)} has other settings; pass another --runs=")
    print(f"costs as in {show_path(path)}; delete it to measure them again")
    return record["costs"]


def measure_costs(config: Settings, recipes: dict[str, list[str]]) -> dict[str, dict]:
    """Seconds of a recipe's step, in its own dtype."""
    calls, own_dtype = {}, {}
    for name, argv in recipes.items():
        # a dry run may start in an out_dir that holds a run
        argv = [*argv, f"--out_dir={config.runs}/{name}", "--dry_run"]
        settings = configure(training.Settings, argv)
        dtype = own_dtype[name] = dtypes_of(settings.dtype, config.device)[-1]
        # a recipe with short rows has them in the first half of its steps
        for rows in {settings.short_block, None}:
            words = [*argv, f"--dtype={dtype}", f"--short_block={rows}"]
            calls[name, rows], _ = own_step(words)
    print(f"measuring the cost of a step, {config.rounds + 1} turns of {len(calls)} contenders")
    seconds = measure(calls, config)
    of_each = {name: [median(seconds[c]) for c in calls if c[0] == name] for name in recipes}
    return {name: {"dtype": own_dtype[name], "step": mean(of_each[name])} for name in recipes}


# --- curves --------------------------------------------------------------------------------------


def first_time(curve: Curve, level: float) -> float:
    """When a curve first reaches a level, linear between evaluations; infinity: never."""
    if curve[0][1] <= level:
        return curve[0][0]
    for (before, higher), (minutes, bits) in pairwise(curve):
        if bits <= level:
            return before + (minutes - before) * (higher - level) / (higher - bits)
    return math.inf


def levels(curve: Curve) -> list[float]:
    """The multiples of 0.2 from the first evaluation down to the best, and the best."""
    best = min(bits for _, bits in curve)
    return [i / 5 for i in range(math.floor(5 * curve[0][1]), math.floor(5 * best), -1)] + [best]


def judge(runs: dict[str, dict], costs: dict[str, dict]) -> dict:
    """The best run of each recipe, and the minutes to each level that MiniMind's best run and any
    of ours reach."""
    names = {recipe: [n for n in runs if runs[n]["recipe"] == recipe] for recipe in costs}
    best = {r: min(names[r], key=lambda name: runs[name]["bits_best"]) for r in names}
    peer = runs[best["minimind"]]["curve"]
    rows = []
    for level in levels(peer):
        minimind = first_time(peer, level)
        ours = min(first_time(runs[name]["curve"], level) for name in names["ours"])
        if ours < math.inf:
            rows.append(dict(zip(COLUMNS, (level, minimind, ours, minimind / ours), strict=True)))
    return {"best": best, "levels": rows}


def print_quality(results: dict) -> None:
    print("quality: validation bits per byte; minutes are steps x their measured cost")
    for name, cost in results["costs"].items():
        print(f"  a step of {name:<12} {cost['step']:.3f} s in {cost['dtype']}")
    for name, run in results["runs"].items():
        best = f"{run['bits_best']:.3f} at {run['minutes_at_best']:.2f} min"
        print(f"  {name:<20} {best}, {run['steps']:,} steps")
    print("  minutes to a level, and MiniMind's / ours")
    print("".join(f"{name:>12}" for name in COLUMNS))
    for row in results["levels"]:
        print("".join(f"{row[name]:>12.3f}" for name in COLUMNS))


def quality_figure(results: dict) -> Figure:
    """Bits per byte against minutes: a colour a recipe, its best run bold."""
    recipes = list(results["best"])
    with style():
        figure = Figure(figsize=(11, 6.5), layout="constrained")
        axes = figure.subplots()
        for name, run in results["runs"].items():
            width, dash = (2.8, "o-") if name in results["best"].values() else (1.1, "o--")
            label, color = f"{name}: {run['bits_best']:.3f}", f"C{recipes.index(run['recipe'])}"
            axes.plot(*zip(*run["curve"], strict=True), dash, color=color, lw=width, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="minutes (steps x their measured cost)", ylabel="bits per byte, validation")
        figure.legend(loc="outside right upper", frameon=False)
    return figure
