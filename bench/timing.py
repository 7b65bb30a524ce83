"""Contenders that take turns, and the ratios of their speeds. What they do is the benches'."""

import time
from collections.abc import Callable
from statistics import median

import torch

Seconds = dict[str, list[float]]  # of each contender, turn by turn


def measure(contenders: dict[str, Callable], rounds: int, clock: str, device: str) -> Seconds:
    """Seconds of each contender's calls, which take turns; the first turn is not counted."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            began = now()
            run()
            if device != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(now() - began)
    return {name: turns[1:] for name, turns in seconds.items()}


def speed_ratio(seconds: Seconds, ours: str, other: str, work: float = 1.0) -> dict[str, float]:
    """ours' speed / other's, of the medians and the range; work: ours' in a turn over other's."""
    turns = [work * b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]
    ratio = work * median(seconds[other]) / median(seconds[ours])
    return {"ratio": ratio, "min": min(turns), "max": max(turns)}


def report(seconds: Seconds, names: list[str], tokens: int, ratios: dict[str, dict]) -> dict:
    """Prints and returns the speeds of the contenders that are named, and the ratios."""
    speeds = {name: tokens / median(seconds[name]) for name in names}
    for name, speed in speeds.items():
        print(f"  {name:<50} {speed:,.0f} tokens per second")
    for label, of in ratios.items():
        print(f"  {label:<50} {of['ratio']:.3g} ({of['min']:.3g} to {of['max']:.3g})")
    return {"tokens_per_second": speeds, "ratios": ratios, "seconds": seconds}
