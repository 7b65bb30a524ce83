"""What the curves of bench.py's quality say: who has which bits per byte when; table and picture.

runs: of each trial its recipe, minutes, curve and best evaluation; costs: of each recipe its dtype,
and the seconds of a step in that and in float32.
"""

import itertools
import math

from matplotlib.figure import Figure

from visualize import style

Curve = list[tuple[float, float]]  # minutes, bits per byte: an evaluation each


def own_step(costs: dict[str, dict], recipe: str) -> float:
    """Seconds of a recipe's step in its own dtype."""
    return costs[recipe]["step"][costs[recipe]["dtype"]]


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
    """Best runs, the times at which ours and MiniMind's best have each level, and two verdicts."""
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
        "minimind_level_in_a_third": bool(last["ratio"] and last["ratio"] >= 3),
        "highest_ratio": max((row["ratio"] for row in rows if row["ratio"]), default=None),
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
        "  Only the last row compares schedules that have ended; in float32 the steps are the same."
    )
    yes = {True: "yes", False: "no"}
    print(f"  MiniMind's level in a third of its time: {yes[results['minimind_level_in_a_third']]}")
    shortest = results["shortest_ours"]
    at = ", ".join(
        f"{bits:.3f} at {minutes} min" if bits else f"not yet evaluated at {minutes} min"
        for minutes, bits in results["reference_at"].items()
    )
    print(
        f"  the reference never has what ours has after {shortest['minutes']:g} min "
        f"({shortest['bits']:.3f}): {yes[results['reference_never_there']]}; it has {at}"
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
        ticks = sorted({run["minutes"] for run in results["runs"].values()})
        axes.set_xticks(ticks, [f"{minutes:g}" for minutes in ticks])
        axes.set(xlabel="minutes (steps x their measured cost)", ylabel="bits per byte, validation")
        figure.legend(loc="outside right upper", frameon=False)
    return figure
