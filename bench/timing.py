"""Contenders that take turns, the ratios of their speeds, and where the time of one goes."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Literal

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from configurator import at_least, below
from miniglm.devices import pick_device

Seconds = dict[str, list[float]]  # of each contender, turn by turn
Ratio = dict[str, float]
OTHER, OUTSIDE = "other operations", "Python, autograd, idle"
FUSED = "fused by the compiler"  # what calls other operations is only in part of this kind
CALL = "call of profile_kinds"


@dataclass
class Settings:
    """What all parts have that race contenders."""

    n_layer: Annotated[int, at_least(1)] = 4  # blocks
    n_head: Annotated[int, at_least(1)] = 4  # heads
    n_embd: Annotated[int, at_least(1)] = 256  # width
    rounds: Annotated[int, at_least(1)] = 7  # turns of each contender, after one to warm up
    seed: Annotated[int, at_least(0), below(2**63)] = 1337  # of weights, ids and training
    device: str = "cpu"  # or cuda, mps, auto
    clock: Literal["wall", "cpu"] = "wall"  # cpu: of this process, on all threads
    out: str = "bench-results"  # where the figures are written

    def __post_init__(self):
        self.device = pick_device(self.device)


def measure(contenders: dict[str, Callable], config: Settings) -> Seconds:
    """Seconds of each contender's calls, which take turns; the first turn is not counted."""
    now = time.process_time if config.clock == "cpu" else time.perf_counter
    seconds = {name: [] for name in contenders}
    for _ in range(config.rounds + 1):
        for name, run in contenders.items():
            began = now()
            run()
            if config.device != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(now() - began)
    return {name: turns[1:] for name, turns in seconds.items()}


def speed_ratio(seconds: Seconds, ours: str, other: str, work: float = 1.0) -> Ratio:
    """ours' speed / other's, of the medians and the range; work: ours' in a turn over other's."""
    turns = [work * b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]
    ratio = work * median(seconds[other]) / median(seconds[ours])
    return {"ratio": ratio, "min": min(turns), "max": max(turns)}


def report(seconds: Seconds, names: list[str], tokens: int, ratios: dict[str, Ratio]) -> dict:
    """Prints and returns the speeds of the named contenders, and the ratios."""
    speeds = {name: tokens / median(seconds[name]) for name in names}
    for name, speed in speeds.items():
        print(f"  {name:<50} {speed:,.0f} tokens per second")
    for label, r in ratios.items():
        print(f"  {label:<50} {r['ratio']:.3g} ({r['min']:.3g} to {r['max']:.3g})")
    return {"tokens_per_second": speeds, "ratios": ratios, "seconds": seconds}


# --- profile -------------------------------------------------------------------------------------


def profile_kinds(run: Callable[[], object], kinds: dict[str, str], calls: int) -> dict[str, float]:
    """Milliseconds of a call on a CPU by kind of work, the mean of some calls after a warm-up; they
    add up to the call's duration.

    kinds: kind -> a pattern of its events' names. Events of torch's profiler nest: whatever happens
    inside one counts as its kind, other operations count as OTHER, and what is none of torch's
    operations as OUTSIDE. The profiler itself takes time, most for small operations.
    """
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(calls):
            with record_function(CALL):
                run()
    # a backward pass on a CPU runs in the calling thread, so inside of these
    roots = [event for event in profiled.events() if event.name == CALL]
    times = dict.fromkeys([*kinds, OTHER, OUTSIDE], 0.0)
    for root in roots:
        for kind, microseconds in own_times(root, kinds):
            times[kind] += microseconds / 1000 / calls
    return times


def own_times(
    event: FunctionEvent, kinds: dict[str, str], outer: str | None = None
) -> Iterator[tuple[str, float]]:
    """Kind and own microseconds (its duration without those inside it) of an event and of all
    events inside it. outer: the kind of the event it is inside of."""
    matching = (kind for kind, pattern in kinds.items() if re.search(pattern, event.name))
    kind = outer or next(matching, None)
    is_operation = event.name.startswith("aten::")
    yield kind or (OTHER if is_operation else OUTSIDE), event.self_cpu_time_total
    for child in event.cpu_children:
        yield from own_times(child, kinds, None if kind == FUSED else kind)


def print_profile(name: str, times: dict[str, float]) -> None:
    """Milliseconds and shares by kind."""
    total = sum(times.values())
    print(f"  {name}, under the profiler")
    for kind, ms in times.items():
        print(f"    {kind:<24} {ms:>10.2f} ms {ms / total:>4.0%}")
