"""Where the time of a training step on a CPU goes, by kind of work, from torch's profiler.

The profiler's events nest: an operation's own time is its duration without those inside it, so
the own times of all that happens inside a step, and the step's, add up to its duration. Whatever
happens inside a part of the step (PARTS) counts as that part; elsewhere an operation counts by its
name (OPERATIONS); what is no operation of torch's is Python's and autograd's. The profiler itself
takes time, most for small operations, and other processes lengthen whatever they interrupt.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

import train as training
from data_utils import Dataset
from miniglm.prep.writer import write_pretrain
from miniglm.tokenizer import train_tokenizer
from model import GPT

PARTS = {  # kind -> names of its events, forward and backward, which are searched
    "head and loss": r"ChunkedLoss",
    "attention": r"CausalAttention|scaled_dot_product|ScaledDotProduct",
    "Muon": r"^Optimizer\..*#Muon\.",
    "AdamW": r"^Optimizer\..*#AdamW\.",
    "data": r"^data$",
}
OPERATIONS = {
    "products of the blocks": r"^aten::(mm|addmm|bmm|baddbmm)$",
    "copies and casts": r"^aten::(to|_to_copy|copy_|clone|contiguous)$",
    "gradient norm": r"^aten::(_foreach_norm|linalg_vector_norm|_foreach_mul_)$",
}
ELEMENTWISE = "norms, rotary, activation, other"
REST = "Python, autograd, idle"
KINDS = [*OPERATIONS, ELEMENTWISE, *PARTS, REST]
STEP = "step"


def profile_step(step: Callable[[], None], steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step by kind, the mean of some, after one that warms up. Their sum is the
    duration of the step."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            with record_function(STEP):
                step()
    events = profiled.events()
    roots = [event for event in events if event.name == STEP]
    # a backward pass on a CPU runs in the thread that calls it: elsewhere it would not be seen
    elsewhere = {e.name for e in events if e.thread != roots[0].thread and "autograd::" in e.name}
    assert not elsewhere, f"not in the calling thread: {elsewhere}"
    times = dict.fromkeys(KINDS, 0.0)
    for root in roots:
        for kind, microseconds in own_times(root):
            times[kind] += microseconds / 1000 / steps
    wall = sum(root.time_range.elapsed_us() for root in roots) / 1000 / steps
    assert abs(sum(times.values()) - wall) < 1e-3, f"{times} are not {wall} ms"
    return times


def own_times(event: FunctionEvent, inside: str | None = None) -> Iterator[tuple[str, float]]:
    """The kind and the own microseconds of an event, and of all inside it; `inside`: the kind of
    what it is in, if that has one."""
    kind = find(PARTS, event.name) or inside or find(OPERATIONS, event.name)
    other = ELEMENTWISE if event.name.startswith("aten::") else REST
    yield kind or other, event.self_cpu_time_total
    for child in event.cpu_children:
        yield from own_times(child, kind)


def find(kinds: dict[str, str], name: str) -> str | None:
    return next((kind for kind, pattern in kinds.items() if re.search(pattern, name)), None)


def print_profile(profiles: dict[str, dict[str, float]]) -> None:
    """Milliseconds and shares by kind, a pair of columns for each profile."""
    walls = {name: sum(times.values()) for name, times in profiles.items()}
    print(f"  {'':<34}" + "".join(f"  {name:>16}" for name in profiles))
    for kind in KINDS:
        pairs = [(times[kind], times[kind] / walls[name]) for name, times in profiles.items()]
        print(f"  {kind:<34}" + "".join(f"  {ms:>8.1f} ms {share:>4.0%}" for ms, share in pairs))
    print(f"  {'together':<34}" + "".join(f"  {wall:>8.1f} ms 100%" for wall in walls.values()))


def whole_step(model: GPT, data: Dataset, config: training.Settings) -> Callable[[], None]:
    """train.py's step on the dataset's next batch, which is made too."""
    run = whole_run(model, data, config)
    batches = training.step_batches(run)

    def step() -> None:
        with record_function("data"):
            micro, counts, _ = next(batches)
        training.train_step(run, micro, counts)

    return step


def whole_run(model: GPT, data: Dataset, config: training.Settings) -> training.Run:
    """A run of train.py at its first step."""
    device = config.device
    return training.Run(
        config=config,
        out_dir=Path(config.out_dir),
        data=data,
        tokenizer=data.tokenizer,
        model=model,
        optimizers=training.make_optimizers(model, config, device),
        progress=training.Progress(),
        device=device,
        scaler=training.make_scaler(config, device),
        startup=training.Stopwatch(),
    )


@contextmanager
def numbers(count: int = 20_000) -> Iterator[Dataset]:
    """A dataset of a vocabulary of 320 at most: the numbers up to count, five ids each or so."""
    text = "\n".join(str(number) for number in range(count))
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tokenizer = train_tokenizer([text], 320)
        splits = {"train": [text], "val": [text[:4096]]}
        write_pretrain(Path(folder), tokenizer, splits, ["numbers"])
        yield Dataset(folder)
