"""What a run shows of itself while it trains: the time to its first step, and samples."""

import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from data_utils import Dataset
from miniglm.checkpoint import Checkpoint
from miniglm.generation import Sampling
from miniglm.text import complete, default_temperature, prompt_ids, show

SAMPLE_TOKENS = 60  # of a sample, at most
PROMPT_LENGTH = 12  # characters of the validation text that a sample continues

Prompt = tuple[str, list[int]]  # as it is shown, and its ids


class Stopwatch:
    """Seconds of each stage since the process began; the first are its imports."""

    def __init__(self):
        self.began = self.last = time.perf_counter() - process_seconds()
        self.seconds = {}
        self.lap("imports")

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self.last
        self.last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        return f"first step after {self.last - self.began:.1f} s: {parts}"


def process_seconds() -> float:
    """Seconds since this process began; its processor time where only Linux could tell."""
    stat = Path("/proc/self/stat")
    if not stat.is_file():
        return time.process_time()
    fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime, since boot
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)


def sample_prompts(checkpoint: Checkpoint, data: Dataset, texts: list[str] | None) -> list[Prompt]:
    """The prompts of the samples; None is the first of the validation split.

    UserError where a question is longer than the model can read.
    """
    if texts is None:
        return [first_prompt(data, checkpoint.model.config.block_size)]
    return [(text, prompt_ids(checkpoint, text)) for text in texts]


def first_prompt(data: Dataset, block_size: int) -> Prompt:
    """The beginning of the validation text, in at most half of block_size; or the first question
    with what stands before it."""
    tokenizer, tokens = data.tokenizer, data.tokens["val"]
    if data.kind == "pretrain":
        # a character has at most four bytes
        beginning = tokens[: min(4 * PROMPT_LENGTH, block_size // 2)].tolist()
        text = tokenizer.decode(beginning)[:PROMPT_LENGTH].rstrip("\ufffd")  # cut characters
        while len(ids := tokenizer.encode(text)) > block_size // 2:
            text = text[:-1]
        return text, ids or [tokenizer.end_of_text]
    *messages, _ = tokenizer.parse(tokens[: int(data.bounds["val"][1])])
    return messages[-1]["content"], tokenizer.render_prompt(messages)


def write_samples(
    checkpoint: Checkpoint, prompts: list[Prompt], seed: int, compiled: bool
) -> list[str]:
    """What the model now makes of each prompt, as sample.py shows it. The model stays as it is,
    and no random state is touched."""
    sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, seed=seed)
    sampling = default_temperature(checkpoint, sampling)
    # a compiled model would be compiled anew for each length of its cache; on CUDA the decoding
    # step, which is compiled for long jobs, at each evaluation
    compiled |= checkpoint.model.wte.weight.device.type == "cuda"
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    was_training = checkpoint.model.training
    checkpoint.model.eval()
    with eager:
        outputs = list(complete(checkpoint, [ids for _, ids in prompts], sampling))
    checkpoint.model.train(was_training)
    return [
        show(checkpoint, text, output.text)
        for (text, _), [output] in zip(prompts, outputs, strict=True)
    ]
