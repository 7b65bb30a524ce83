"""What a run shows of itself while it trains: time, speed, faults, samples; and what stops it."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data_utils import Dataset
from miniglm.checkpoint import Checkpoint
from miniglm.distributed import World
from miniglm.generation import Sampling
from miniglm.losses import eval_mode
from miniglm.text import complete, prompt_ids, show

SAMPLE_TOKENS = 60  # of a sample, at most
PROMPT_LENGTH = 12  # characters of the validation text that a sample continues

Prompt = tuple[str, list[int]]  # as it is shown, and its ids


class Stopwatch:
    """Seconds of each stage since the process began; the first are its imports."""

    def __init__(self):
        # imports hardly wait, so their processor time is their time
        self.began = self.last = time.perf_counter() - time.process_time()
        self.seconds = {}
        self.lap("imports")

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self.last
        self.last = now

    def __str__(self) -> str:
        longer = {stage: seconds for stage, seconds in self.seconds.items() if seconds >= 0.05}
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in longer.items())
        return f"first step after {self.last - self.began:.1f} s: {parts}"


# --- steps -------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """The first loss or gradient of a window that is no number."""

    steps_ago: int
    rank: int  # of the process that had it
    micro: int | None  # of its micro-batches; None: the norm of the whole gradient alone


class Window:
    """The steps since the last line of log.jsonl. Nothing here waits for a GPU before `means`."""

    def __init__(self):
        self.began = time.perf_counter()
        self.losses: list[dict[str, Tensor]] = []  # of each step, by term: (micro-batches,)
        self.norms: list[Tensor] = []  # of the gradients, scalars
        self.rows = self.tokens = 0

    def add(self, losses: dict[str, Tensor], norm: Tensor, rows: int, tokens: int) -> None:
        self.losses.append(losses)
        self.norms.append(norm)
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def means(self, world: World) -> dict[str, float]:
        """Of each term over processes and the steps that had it, as log.jsonl names them."""
        names = dict.fromkeys(name for step in self.losses for name in step)
        sums = [[step[name].sum() for step in self.losses if name in step] for name in names]
        means = world.sums(torch.stack([torch.stack(steps).mean() for steps in sums]).tolist())
        names = [f"train_{name}" if name.startswith("loss") else name for name in names]
        return dict(zip(names, means, strict=True))

    def speed(self, flops_per_token: float, peak: float) -> dict[str, float]:
        """Tokens per second, padding left out; the model's TFLOP/s, as if each token were trained,
        and their fraction of the peak."""
        seconds = self.seconds()
        rate = self.tokens * flops_per_token / seconds
        return {
            "tokens_per_second": round(self.tokens / seconds),
            "tflops": round(rate / 1e12, 6),
            "mfu": round(rate / peak, 4),
        }

    def find_fault(self, world: World, tolerates_norms: bool) -> Fault | None:
        """The first loss that is nan or infinite, or norm of a gradient unless a scaler tolerates
        these, in any process."""
        usable = torch.stack(self.norms).isfinite().cpu() | tolerates_norms
        # of each step and process: 1 + the micro-batch of its first such loss, or 0
        faults = torch.zeros(len(self.losses), world.size, dtype=torch.int64)
        for number, step in enumerate(self.losses):
            finite = torch.stack(list(step.values())).isfinite().all(dim=0).tolist()
            if not all(finite):
                faults[number, world.rank] = 1 + finite.index(False)
        faults = world.add(faults)
        faulty = faults.any(dim=1) | ~usable
        if not faulty.any():
            return None
        number = int(faulty.byte().argmax())
        rank = int(faults[number].ne(0).byte().argmax())
        place = int(faults[number, rank])
        return Fault(len(self.losses) - 1 - number, rank, place - 1 if place else None)


def progress_bar(name: str, steps: int, done: int, world: World) -> tqdm:
    """Steps done and time left; a line each half minute if no one watches."""
    return tqdm(
        total=steps,
        initial=done,
        desc=name,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=not world.is_first,
    )


@contextmanager
def catch_interrupt(world: World) -> Iterator[list[int]]:
    """A list that holds something once Ctrl-C was pressed, or SIGTERM came, as from Slurm before a
    job's time is over; a second Ctrl-C stops at once."""
    caught = []

    def handler(signum: int, frame: object) -> None:
        caught.append(signum)
        if signum == signal.SIGTERM:
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if world.is_first:
            print("\nstopping after this step; Ctrl-C again stops without saving", file=sys.stderr)

    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    except RuntimeError:
        if world.size == 1 or signal.SIGTERM not in caught:
            raise
        sys.exit(128 + signal.SIGTERM)  # another process has failed, and said so
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


# --- samples -----------------------------------------------------------------------------------


def sample_prompts(checkpoint: Checkpoint, data: Dataset, texts: list[str] | None) -> list[Prompt]:
    """The prompts of the samples; None is the first of the validation split, or of training.

    Raises UserError if a question is longer than the model can read.
    """
    if texts is None:
        return [first_prompt(data, checkpoint.model.config.block_size)]
    return [(text, prompt_ids(checkpoint, text)) for text in texts]


def first_prompt(data: Dataset, block_size: int) -> Prompt:
    """The beginning of the validation text, in at most half of block_size; or the first question
    with what stands before it. Of training if there is no validation."""
    tokenizer, split = data.tokenizer, data.splits[-1]
    if data.kind == "pretrain":
        # a character has at most four bytes
        beginning = data.tokens[split][: min(4 * PROMPT_LENGTH, block_size // 2)].tolist()
        text = tokenizer.decode(beginning)[:PROMPT_LENGTH].rstrip("\ufffd")  # cut characters
        while len(ids := tokenizer.encode(text)) > block_size // 2:
            text = text[:-1]
        return text, ids or [tokenizer.end_of_text]
    *messages, _ = data.conversations(split, slice(1))[0]
    return messages[-1]["content"], tokenizer.render_prompt(messages)


def write_samples(
    checkpoint: Checkpoint, prompts: list[Prompt], seed: int, compiled: bool
) -> list[str]:
    """What the model now makes of each prompt, as sample.py shows it. The model stays as it is,
    and no random state is touched."""
    sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, seed=seed)
    # a compiled model would be compiled anew for each length of its cache
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with eager, eval_mode(checkpoint.model):
        outputs = complete(checkpoint, [ids for _, ids in prompts], sampling)
        return [
            show(checkpoint, text, output.text)
            for (text, _), [output] in zip(prompts, outputs, strict=True)
        ]
