"""Three recipes in the same time: who reaches which validation bits per byte when.

    python data/sanguo/prepare.py
    python data/sanguo/prepare.py --vocab_size=6400 --out=data/sanguo_6400
    python data/fetch_data.py gpt2
    python data/sanguo/prepare.py --tokenizer=gpt2 --out=data/sanguo_gpt2
    python -m bench quality                  all runs, then the table and the picture
    python -m bench quality --only=ours-2    one run, or those of a recipe; then run the rest

Ours, MiniMind's (config/minimind.py) and the reference's, at the same depth and width. Machines are
shared, so time is counted in steps: the cost of each recipe's step is measured first, in turns, and
kept in plan.json; a run has as many steps as fit its minutes, and its schedule ends there.
Evaluations are not counted. After Ctrl-C the same command continues; what is finished stays.
"""

import itertools
import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Annotated

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

import train as training
from bench import timing
from bench.step import own_step
from bench.timing import measure
from configurator import ROOT, UserError, above, configure, repo_path, show_path, written_aside
from miniglm.checkpoint import has_checkpoint, read_log, read_run
from miniglm.devices import environment, pick_dtype
from visualize import save_figure, style

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
    only: list[str] = field(default_factory=list)  # runs or recipes to train now: ours-2, minimind
    runs: str = "bench-quality"  # where they are trained

    def __post_init__(self):
        super().__post_init__()
        for name in ("ours_minutes", "minimind_rates"):
            if not getattr(self, name):
                raise UserError(f"{name}=[] must hold one number or more")


@dataclass
class Trial:
    """A run: a recipe and its time."""

    name: str  # of its out_dir
    recipe: str
    minutes: float  # of training steps at their measured cost
    argv: list[str]  # train.py's, without what depends on the cost


def bench(config: Settings) -> dict | None:
    """Trains the missing trials -> costs, runs, who reaches which level when; and a picture. None
    while trials are missing."""
    recipes = recipe_argv(config)
    trials = list_trials(config, recipes)
    chosen = choose(trials, config.only)
    folder = repo_path(config.runs)
    costs = plan(config, recipes)
    commands = {trial.name: [*trial.argv, *budget(trial, costs)] for trial in trials}
    for trial in chosen:
        out_dir, argv = folder / trial.name, commands[trial.name]
        if not is_finished(out_dir, argv):
            run_script("train.py", *argv, f"--out_dir={out_dir}", "--resume")
    missing = [n for n, argv in commands.items() if not is_finished(folder / n, argv)]
    if missing:
        print(f"quality: still to be trained: {', '.join(missing)}")
        return None
    runs = {t.name: read_trial(folder / t.name, t, commands[t.name], costs) for t in trials}
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


def choose(trials: list[Trial], only: list[str]) -> list[Trial]:
    """The trials that `only` names, themselves or by their recipe; all if it is empty."""
    for name in only:
        if not any(name in (trial.name, trial.recipe) for trial in trials):
            have = ", ".join(trial.name for trial in trials)
            raise UserError(f"only={name!r} names no run; there are {have}")
    return [t for t in trials if not only or t.name in only or t.recipe in only]


def budget(trial: Trial, costs: dict[str, dict]) -> list[str]:
    """train.py's flags for as many steps as fit the trial's minutes."""
    settings = configure(training.Settings, trial.argv)
    step = step_seconds(costs[trial.recipe])
    max_iters = int(60 * trial.minutes / step)
    if max_iters < 1:
        raise UserError(
            f"{trial.name}: a step takes {step:.1f} s; give {trial.recipe} more minutes"
        )
    tenth = math.ceil(max_iters / 10)
    return [
        f"--max_iters={max_iters}",
        f"--eval_interval={math.ceil(max_iters / EVALUATIONS)}",
        f"--warmup_iters={min(settings.warmup_iters, tenth)}",
        f"--log_interval={min(settings.log_interval, tenth)}",
        f"--dtype={costs[trial.recipe]['dtype']}",
    ]


def is_finished(out_dir: Path, argv: list[str]) -> bool:
    """Whether a run has done its steps, or ended earlier, out of patience."""
    if not has_checkpoint(out_dir):
        return False
    settings, run = configure(training.Settings, argv), read_run(out_dir, "latest")
    if (before := run["settings"]["max_iters"]) != settings.max_iters:
        raise UserError(
            f"{show_path(out_dir)} is a run of {before} steps, the plan has {settings.max_iters}; "
            "delete it, or pass another --runs="
        )
    return training.Progress(**run["progress"]).is_finished(settings)


def run_script(name: str, *words: str) -> None:
    """Runs a script of this repository, which handles Ctrl-C. Raises UserError if it fails."""
    sys.stdout.flush()
    # subprocess.run would kill a script that is saving; a handler is not inherited, SIG_IGN is
    before = signal.signal(signal.SIGINT, lambda signum, frame: None)
    try:
        code = subprocess.Popen([sys.executable, str(ROOT / name), *words]).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if code == 130:
        raise UserError("stopped; the same command continues")
    if code:
        raise UserError(f"{name} ended with exit code {code}; its message is above")


def read_trial(out_dir: Path, trial: Trial, argv: list[str], costs: dict[str, dict]) -> dict:
    """A finished trial: its curve on the axis of its steps' cost, and its best evaluation."""
    minutes = step_seconds(costs[trial.recipe]) / 60
    evaluated = [r for r in read_log(out_dir) if "val_bits_per_byte" in r]
    curve = [(r["iter"] * minutes, r["val_bits_per_byte"]) for r in evaluated]
    at, best = min(curve, key=lambda point: point[1])
    progress = read_run(out_dir, "latest")["progress"]
    return {
        "recipe": trial.recipe,
        "minutes": trial.minutes,
        "command": ["train.py", *argv],
        "steps": progress["iter"],
        "clock_seconds": progress["seconds"],
        "curve": curve,
        "bits_best": best,
        "minutes_at_best": at,
    }


# --- costs ---------------------------------------------------------------------------------------


def step_seconds(cost: dict) -> float:
    """Of a recipe's step in its own dtype."""
    return cost["step"][cost["dtype"]]


def plan(config: Settings, recipes: dict[str, list[str]]) -> dict[str, dict]:
    """The costs of each recipe, from plan.json, or measured and written there."""
    path = repo_path(config.runs) / "plan.json"
    settings = {name: asdict(configure(training.Settings, recipes[name])) for name in recipes}
    machine = environment(config.device)
    if not path.is_file():
        costs = measure_costs(config, recipes)
        record = {"environment": machine, "recipes": settings, "costs": costs}
        with written_aside(path) as aside:
            aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return costs
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        costs, before, measured_on = (record[key] for key in ("costs", "recipes", "environment"))
        changed = [
            f"{key} of {name}"
            for name, now in settings.items()
            for key in before[name].keys() & now.keys()
            if before[name][key] != now[key]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{show_path(path)} is damaged; delete it to measure the costs again"
        ) from None
    if changed:
        raise UserError(
            f"{show_path(path)} has another {', '.join(sorted(changed))}; pass another --runs="
        )
    print(f"costs as in {show_path(path)}; delete it to measure them again")
    if measured_on != machine:
        print("note: they were measured on another machine, or with other threads")
    return costs


def measure_costs(config: Settings, recipes: dict[str, list[str]]) -> dict[str, dict]:
    """Seconds of a step in the recipe's own dtype and in float32."""
    calls, dtypes = {}, {}
    for name, argv in recipes.items():
        # a dry run may start in an out_dir that holds a run
        argv = [*argv, f"--out_dir={config.runs}/{name}", "--dry_run"]
        settings = configure(training.Settings, argv)
        own = str(pick_dtype(settings.dtype, config.device)).removeprefix("torch.")
        dtypes[name] = list(dict.fromkeys(["float32", own]))
        # a recipe with short rows has them in the first half of its steps
        for dtype, rows in itertools.product(dtypes[name], {settings.short_block, None}):
            words = [*argv, f"--dtype={dtype}", f"--short_block={rows}"]
            calls[name, dtype, rows], _ = own_step(words)
    print(f"measuring the cost of a step, {config.rounds + 1} turns of {len(calls)} contenders")
    seconds = measure(calls, config.rounds, config.device)
    costs = {}
    for name in recipes:
        turns = {d: [seconds[k] for k in calls if k[:2] == (name, d)] for d in dtypes[name]}
        step = {dtype: mean(map(median, kinds)) for dtype, kinds in turns.items()}
        costs[name] = {"dtype": dtypes[name][-1], "step": step}
    return costs


# --- curves --------------------------------------------------------------------------------------


def first_time(curve: Curve, level: float) -> float | None:
    """When a curve first reaches a level, linear between evaluations; None: never."""
    for i, (minutes, bits) in enumerate(curve):
        if bits <= level:
            if i == 0:
                return minutes
            before, higher = curve[i - 1]
            return before + (minutes - before) * (higher - level) / (higher - bits)
    return None


def earliest(curves: list[Curve], level: float) -> float | None:
    """When the first of the curves reaches a level."""
    times = [first_time(curve, level) for curve in curves]
    return min((time for time in times if time is not None), default=None)


def grid(curve: Curve, step: float = 0.2) -> list[float]:
    """Round levels from the first evaluation down to the best, without the best itself."""
    lowest = min(bits for _, bits in curve)
    count = range(math.floor(curve[0][1] / step), math.floor(lowest / step), -1)
    return [round(step * i, 10) for i in count if step * i > lowest]


def judge(runs: dict[str, dict], costs: dict[str, dict]) -> dict:
    """The best run of each recipe, and the minutes after which each recipe reaches each level: with
    any of its runs, MiniMind's with its best one. Levels: round ones on MiniMind's way, its best,
    and the best of our shortest run."""
    names = {recipe: [n for n in runs if runs[n]["recipe"] == recipe] for recipe in costs}
    best = {r: min(names[r], key=lambda name: runs[name]["bits_best"]) for r in names}
    curves = {recipe: [runs[name]["curve"] for name in names[recipe]] for recipe in names}
    peer = runs[best["minimind"]]
    curves["minimind"] = [peer["curve"]]
    shortest = min((runs[name] for name in names["ours"]), key=lambda run: run["minutes"])
    levels = {*grid(peer["curve"]), peer["bits_best"], shortest["bits_best"]}
    in_float32 = costs["minimind"]["step"]["float32"] / step_seconds(costs["minimind"])
    rows = []
    for level in sorted(levels, reverse=True):
        row = {recipe: earliest(curves[recipe], level) for recipe in curves}
        both = row["minimind"] and row["ours"]
        row["ratio"] = row["minimind"] / row["ours"] if both else None
        row["in float32"] = row["ratio"] * in_float32 if both else None
        rows.append({"bits": level} | row)
    return {"best": best, "levels": rows}


def print_quality(results: dict) -> None:
    print("quality: validation bits per byte; minutes are steps x their measured cost")
    for name, cost in results["costs"].items():
        steps = ", ".join(f"{seconds:.3f} s in {dtype}" for dtype, seconds in cost["step"].items())
        print(f"  a step of {name:<12} {steps}")
    for name, run in results["runs"].items():
        print(
            f"  {name:<20} {run['bits_best']:.3f} at {run['minutes_at_best']:.2f} min, "
            f"{run['steps']:,} steps, {run['clock_seconds'] / 60:.1f} min with its evaluations"
        )
    print("  minutes to a level, and MiniMind's / ours, as it is and with MiniMind in float32")
    columns = ("minimind", "ours", "reference", "ratio", "in float32")
    print(f"  {'bits':<8}" + "".join(f"{name:>12}" for name in columns))
    for row in results["levels"]:
        cells = (f"{row[name]:.2f}" if row[name] else "never" for name in columns)
        print(f"  {row['bits']:<8.3f}" + "".join(f"{cell:>12}" for cell in cells))


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
