"""The trials of bench's quality, and what their curves say: who has which bits per byte when.

costs: of each recipe its dtype, the seconds of a step in that and in float32, of an evaluation;
runs: of each trial its recipe, minutes, steps, curve and best evaluation.
"""

import itertools
import math
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

import train as training
from configurator import ROOT, UserError, configure, nearest, show_path
from miniglm.checkpoint import has_checkpoint, read_log, read_run
from visualize import style

EVALUATIONS = 20  # of a run
EVALUATION_SHARE = 0.1  # of its time, at most
PATIENCE = 6  # evaluations without a better one, after which a run has overfitted and is stopped

Curve = list[tuple[float, float]]  # minutes, bits per byte: an evaluation each


# --- trials ------------------------------------------------------------------------------------


@dataclass
class Trial:
    """A run of quality: a recipe and its time."""

    name: str  # of its out_dir
    recipe: str
    minutes: float  # of training steps at their measured cost; evaluations are not counted
    words: list[str]  # train.py's, without what depends on the cost


def choose(trials: list[Trial], only: list[str]) -> list[Trial]:
    """The trials that `only` names, themselves or by their recipe; all where it is empty."""
    names = {name for trial in trials for name in (trial.name, trial.recipe)}
    for name in only:
        if name not in names:
            have = ", ".join(trial.name for trial in trials)
            raise UserError(f"only={name!r} names no run{nearest(name, names)}; there are {have}")
    return [t for t in trials if not only or t.name in only or t.recipe in only]


def own_step(costs: dict[str, dict], recipe: str) -> float:
    """Seconds of a recipe's step in its own dtype."""
    return costs[recipe]["step"][costs[recipe]["dtype"]]


def budget(trial: Trial, costs: dict[str, dict]) -> list[str]:
    """train.py's flags for as many steps as the trial's minutes have."""
    settings = configure(training.Settings, trial.words)
    step, evaluation = own_step(costs, trial.recipe), costs[trial.recipe]["evaluation"]
    seconds = 60 * trial.minutes
    max_iters = int(seconds / step)
    if max_iters < 1:
        raise UserError(
            f"{trial.name}: a step takes {step:.1f} s; give {trial.recipe} more minutes"
        )
    evaluations = max(2, min(EVALUATIONS, int(EVALUATION_SHARE * seconds / evaluation)))
    tenth = math.ceil(max_iters / 10)
    return [
        f"--max_iters={max_iters}",
        f"--eval_interval={math.ceil(max_iters / evaluations)}",
        f"--warmup_iters={min(settings.warmup_iters, tenth)}",
        f"--log_interval={min(settings.log_interval, tenth)}",
        f"--dtype={costs[trial.recipe]['dtype']}",
    ]


def steps_wanted(argv: list[str]) -> int:
    return configure(training.Settings, argv).max_iters


def is_finished(out_dir: Path, argv: list[str]) -> bool:
    """Whether a run has done its steps, or ended before, out of patience."""
    if not has_checkpoint(out_dir):
        return False
    progress = training.Progress(**read_run(out_dir, "latest")["progress"])
    return progress.is_finished(configure(training.Settings, argv))


def train_trial(out_dir: Path, argv: list[str]) -> None:
    """Trains from the start, or from where it was stopped; not at all where it is finished."""
    if has_checkpoint(out_dir):
        before = read_run(out_dir, "latest")["settings"]["max_iters"]
        if before != steps_wanted(argv):
            raise UserError(
                f"{show_path(out_dir)} is a run of {before} steps, the plan has "
                f"{steps_wanted(argv)}; delete it, or pass another --runs="
            )
    if not is_finished(out_dir, argv):
        run_script("train.py", *argv, f"--out_dir={out_dir}", "--resume")


def run_script(name: str, *words: str) -> None:
    """Runs a script of this repository. UserError where it fails; Ctrl-C is left to it."""
    sys.stdout.flush()
    # subprocess.run would kill a script that is saving; a handler is not inherited, SIG_IGN is
    before = signal.signal(signal.SIGINT, lambda signum, frame: None)
    try:
        code = subprocess.Popen([sys.executable, str(ROOT / name), *words]).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if code == 130:
        raise UserError("stopped; the same command goes on with it")
    if code:
        raise UserError(f"{name} ended with exit code {code}; its message is above")


def read_trial(out_dir: Path, trial: Trial, argv: list[str], costs: dict[str, dict]) -> dict:
    """A finished trial: its curve on the axis of its steps' cost, and its best evaluation."""
    minutes = own_step(costs, trial.recipe) / 60
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
        "bits_at_end": curve[-1][1],
    }


# --- curves ------------------------------------------------------------------------------------


def first_time(curve: Curve, level: float) -> float | None:
    """When a curve first has a level, linear between evaluations; None: never."""
    for i, (minutes, bits) in enumerate(curve):
        if bits <= level:
            if i == 0:
                return minutes
            before, higher = curve[i - 1]
            return before + (minutes - before) * (higher - level) / (higher - bits)
    return None


def level_at(curve: Curve, minutes: float) -> float | None:
    """A curve's bits per byte at a time, linear between evaluations; None before the first."""
    for (start, left), (end, right) in itertools.pairwise(curve):
        if start <= minutes <= end:
            return left + (right - left) * (minutes - start) / (end - start)
    return curve[-1][1] if minutes >= curve[-1][0] else None


def earliest(curves: list[Curve], level: float) -> float | None:
    """When the first of the curves has a level."""
    times = [first_time(curve, level) for curve in curves]
    return min((time for time in times if time is not None), default=None)


def judge(runs: dict[str, dict], costs: dict[str, dict]) -> dict:
    """Best runs, the times at which ours and MiniMind's best have each level, what the last of
    them is of MiniMind's minutes and of its own time, and whether the reference is ever there."""
    of = {name: [r for r in runs.values() if r["recipe"] == name] for name in costs}
    best = {name: min(of[name], key=lambda run: run["bits_best"]) for name in of}
    peer, reference = best["minimind"], best["reference"]
    ours = [run["curve"] for run in of["ours"]]
    to_float32 = costs["minimind"]["step"]["float32"] / own_step(costs, "minimind")
    rows = []
    for level in [*grid(peer["curve"]), peer["bits_best"]]:
        theirs, time = first_time(peer["curve"], level), earliest(ours, level)
        ratio = theirs / time if time else None
        in_float32 = ratio * to_float32 if ratio else None
        rows.append(
            {"bits": level, "minimind": theirs, "ours": time, "ratio": ratio}
            | {"ratio_to_float32": in_float32}
        )
    shortest = min(of["ours"], key=lambda run: run["minutes"])
    times = (shortest["minutes"], peer["minutes"], reference["minutes"])
    last = rows[-1]
    return {
        "best": {name: next(k for k, r in runs.items() if r is run) for name, run in best.items()},
        "levels": rows,
        "ours_at_minimind_best": {
            "share_of_its_minutes": last["ours"] and last["ours"] / peer["minutes"],
            "share_of_its_time_at_best": last["ours"] and last["ours"] / last["minimind"],
        },
        "shortest_ours": {"minutes": shortest["minutes"], "bits": shortest["bits_best"]},
        "reference_at": {f"{t:g}": level_at(reference["curve"], t) for t in times},
        "reference_never_there": reference["bits_best"] > shortest["bits_best"],
    }


def grid(curve: Curve, step: float = 0.2) -> list[float]:
    """Round levels from the first evaluation down to the best, without the best itself."""
    lowest = min(bits for _, bits in curve)
    count = range(math.floor(curve[0][1] / step), math.floor(lowest / step), -1)
    return [round(step * i, 10) for i in count if step * i > lowest]


def print_quality(results: dict) -> None:
    print("quality: validation bits per byte; minutes are steps x their measured cost")
    for name, cost in results["costs"].items():
        steps = ", ".join(f"{seconds:.3f} s in {dtype}" for dtype, seconds in cost["step"].items())
        print(f"  a step of {name:<12} {steps}; an evaluation {cost['evaluation']:.1f} s")
    for name, run in results["runs"].items():
        clock = f"{run['clock_seconds'] / 60:.1f} min by the clock, evaluations included"
        print(
            f"  {name:<20} {run['bits_best']:.3f} at {run['minutes_at_best']:.2f} min, "
            f"{run['steps']:,} steps ({clock})"
        )
    rates = [run for run in results["runs"].values() if run["recipe"] == "minimind"]
    if len(rates) > 1 and results["runs"][results["best"]["minimind"]] in (rates[0], rates[-1]):
        print(
            f"  note: the best of MiniMind's rates, {results['best']['minimind']}, is at the edge"
        )
    print("  bits per byte    MiniMind min    ours min    ratio    with MiniMind in float32")
    for row in results["levels"]:
        cells = [row["minimind"], row["ours"], row["ratio"], row["ratio_to_float32"]]
        texts = [f"{cell:.2f}" if cell else "never" for cell in cells]
        print("  {:<15.3f}  {:>12}  {:>10}  {:>7}  {:>26}".format(row["bits"], *texts))
    print(
        "  The last row is MiniMind's best; above it, schedules of other lengths are under way. "
        "In float32 the steps are the same."
    )
    print_minimind_best(results)
    yes = {True: "yes", False: "no"}
    shortest = results["shortest_ours"]
    at = ", ".join(
        f"{bits:.3f} at {minutes} min" if bits else f"not yet evaluated at {minutes} min"
        for minutes, bits in results["reference_at"].items()
    )
    print(
        f"  the reference never has what ours has after {shortest['minutes']:g} min "
        f"({shortest['bits']:.3f}): {yes[results['reference_never_there']]}; it has {at}"
    )


def print_minimind_best(results: dict) -> None:
    last, shares = results["levels"][-1], results["ours_at_minimind_best"]
    minutes = results["runs"][results["best"]["minimind"]]["minutes"]
    what = f"what MiniMind's {minutes:g} min reach, {last['bits']:.3f}, ours"
    if not last["ours"]:
        print(f"  {what} never has")
        return
    of_minutes, of_time = shares["share_of_its_minutes"], shares["share_of_its_time_at_best"]
    print(
        f"  {what} has after {last['ours']:.2f} min: {of_minutes:.2f} of those, {of_time:.2f} of "
        f"the {last['minimind']:.2f} min after which MiniMind has it"
    )


def quality_figure(results: dict) -> Figure:
    """Bits per byte against minutes, a colour a recipe, its best run bold, two levels in grey."""
    recipes, dashes, peer = list(results["best"]), ("--", ":", "-.", "-"), results["levels"][-1]
    shortest = results["shortest_ours"]
    with style():
        figure = Figure(figsize=(11, 6.5), layout="constrained")
        axes = figure.subplots()
        drawn = dict.fromkeys(recipes, 0)
        for name, run in results["runs"].items():
            color, dash = f"C{recipes.index(run['recipe'])}", dashes[drawn[run["recipe"]] % 4]
            drawn[run["recipe"]] += 1
            width, size = 1.1, 3
            if name in results["best"].values():
                width, size, dash = 2.8, 5, "-"
            label = f"{name}: {run['bits_best']:.3f}"
            minutes, bits = zip(*run["curve"], strict=True)
            axes.plot(minutes, bits, f"o{dash}", color=color, lw=width, ms=size, label=label)
        what = f"ours after {shortest['minutes']:g} min: {shortest['bits']:.3f}"
        axes.axhline(shortest["bits"], color="0.45", lw=1, ls=":", label=what)
        what = f"MiniMind's best: {peer['bits']:.3f}"
        axes.axhline(peer["bits"], color="0.45", lw=1, ls="--", label=what)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="minutes (steps x their measured cost)", ylabel="bits per byte, validation")
        figure.legend(loc="outside right upper", frameon=False)
    return figure
