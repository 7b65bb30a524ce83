"""Model -> ids -> text: generation as functions, and the command line around them.

    python sample.py --out_dir=out-sanguo --start="却说曹操"
    python sample.py --out_dir=out-sanguo-sft --start="孔明是谁？"
    python sample.py --out_dir=out-sanguo-sft --start=FILE:questions.txt --save_path=answers.jsonl

A fine-tuned model is asked in the chat format and answers; a pretrained one continues the text.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import Checkpoint, load_checkpoint
from configurator import (
    UserError,
    command,
    configure,
    repo_path,
    show_path,
    user_path,
    written_aside,
)
from lstm_model import LSTM, StateCache
from model import GPT, KVCache, pick_device
from tokenizer import Tokenizer


@dataclass
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256  # longest output, tokens
    temperature: float | None = None  # 0 is greedy; None is 0.8 for continuing, 0 for answering
    top_k: int | None = None  # only the k likeliest tokens; None is all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    repetition_penalty: float = 1.0  # above 1 lowers what the text already has (arXiv 1909.05858)
    seed: int = 1337  # same seed, same text

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be 1 or more")
        if self.temperature is not None and self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be 1 or more, or None")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be above 0")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")


@dataclass
class Settings(Sampling):
    out_dir: str = "out"  # of the model
    start: str = ""  # a text or question; FILE:x.txt (a prompt, or a question a line); FILE:x.jsonl
    save_path: str | None = None  # also write here: a .jsonl of records, or the text as printed
    num_samples: int = 1  # outputs for each prompt
    batch_size: int = 16  # prompts at once
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there
    eval_mode: bool = False  # score the answers to FILE:... as evaluations.py does
    dataset: str | None = None  # with eval_mode: has the references that the file has not

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")


@dataclass
class Output:
    """One sample: its ids without the end token, its text, and whether an end token came."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False


# --- ids ---------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    model: GPT | LSTM,
    prompts: list[list[int]],
    sampling: Sampling,
    stop_ids: tuple[int, ...] = (),
    num_samples: int = 1,
    first_prompt: int = 0,
) -> Iterator[list[tuple[int, int]]]:
    """Yields for each step the (row, id) of all rows that still run; row = prompt x num_samples
    + sample. A row ends with a stop id, which is yielded too, or after max_new_tokens.

    Prompts are read once, in one batch, then each step reads one token a row. A row's random
    stream depends on (seed, first_prompt + prompt, sample) alone. A row that fills block_size goes
    on from its last block_size / 2 tokens, which are read anew.
    """
    block_size, device = model.config.block_size, model.wte.weight.device
    for prompt in prompts:
        if not 0 < len(prompt) <= block_size:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; this model takes 1 to {block_size}"
            )
    texts = [list(prompt) for prompt in prompts for _ in range(num_samples)]
    draws = [
        np.random.default_rng([sampling.seed, first_prompt + prompt, sample])
        for prompt in range(len(prompts))
        for sample in range(num_samples)
    ]
    logits, cache = _prefill(model, prompts)
    if num_samples > 1:
        expanded = model.new_cache(len(texts))
        rows = [row for row in range(len(prompts)) for _ in range(num_samples)]
        expanded.copy_rows(cache, rows, list(range(len(texts))))
        logits, cache = logits[rows], expanded
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, text in enumerate(texts):
            seen[row, torch.tensor(text, device=device)] = True
    running = list(range(len(texts)))  # row of the texts at each row of the cache
    for step in range(sampling.max_new_tokens):
        uniform = [draws[row].random() for row in running] if sampling.temperature else []
        ids = choose(logits, sampling, uniform, seen)
        chosen = list(zip(running, ids.tolist(), strict=True))
        yield chosen
        for row, id in chosen:
            texts[row].append(id)
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        ended = [place for place, (_, id) in enumerate(chosen) if id in stop_ids]
        for place in reversed(ended):
            cache.drop_row(place)
            for of_row in (ids, seen) if seen is not None else (ids,):
                of_row[place] = of_row[len(running) - 1]
            running[place] = running[-1]
            running.pop()
        if not running or step == sampling.max_new_tokens - 1:
            return
        full = [place for place, length in enumerate(cache.lengths) if length == block_size]
        if full:
            # all but the newest token, which is read with the other rows'
            kept = [texts[running[place]][-max(2, block_size // 2) : -1] for place in full]
            cache.copy_rows(_prefill(model, kept)[1], list(range(len(full))), full)
        hidden = model(ids[: len(running), None], cache)
        logits = model.head(hidden[:, -1])
        if seen is not None:
            seen = seen[: len(running)]


def choose(
    logits: torch.Tensor, sampling: Sampling, uniform: list[float], seen: torch.Tensor | None
) -> torch.Tensor:
    """(B, n_vocab) logits -> (B,) ids: the likeliest, or where the uniform number of each row
    falls among the probabilities that top_k and top_p leave."""
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, lowered, logits)
    if not sampling.temperature:
        return logits.argmax(dim=-1)
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    sorted_logits, sorted_ids = logits.topk(k, dim=-1)  # likeliest first
    shifted = (sorted_logits - sorted_logits[:, :1]) / sampling.temperature
    probs = torch.softmax(shifted, dim=-1)
    cumulative = probs.cumsum(dim=-1)
    probs = probs.masked_fill(cumulative - probs >= sampling.top_p, 0.0)
    cumulative = probs.cumsum(dim=-1)
    u = torch.tensor(uniform, dtype=torch.float32, device=logits.device)[:, None]
    place = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    # u can round up to the whole sum: then the last token that is left
    place = torch.minimum(place, (probs > 0).sum(dim=-1, keepdim=True) - 1)
    return sorted_ids.gather(1, place).squeeze(1)


def _prefill(
    model: GPT | LSTM, prompts: list[list[int]]
) -> tuple[torch.Tensor, KVCache | StateCache]:
    """Reads prompts of any lengths in one batch -> logits of what follows (B, n_vocab), cache."""
    lengths = [len(prompt) for prompt in prompts]
    idx = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):  # right padding: no token before it sees it
        idx[row, : len(prompt)] = torch.tensor(prompt)
    cache = model.new_cache(len(prompts))
    hidden = model(idx.to(model.wte.weight.device), cache, lengths)
    last = hidden[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
    return model.head(last), cache


# --- text --------------------------------------------------------------------------------------


def default_temperature(checkpoint: Checkpoint, sampling: Sampling) -> Sampling:
    """The sampling with its temperature filled in."""
    if sampling.temperature is None:
        sampling.temperature = 0.0 if checkpoint.answers else 0.8
    return sampling


def prompt_ids(checkpoint: Checkpoint, text: str) -> list[int]:
    """A question in the chat format for a fine-tuned model, else the text to be continued."""
    if checkpoint.answers:
        return checkpoint.tokenizer.render_prompt([{"role": "user", "content": text}])
    return checkpoint.tokenizer.encode(text) or [checkpoint.tokenizer.end_of_text]


def complete(
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    sampling: Sampling,
    num_samples: int = 1,
    batch_size: int = 16,
) -> Iterator[list[Output]]:
    """The outputs of each prompt, in the prompts' order, generated batch by batch."""
    tokenizer = checkpoint.tokenizer
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        outputs = [Output() for _ in range(len(batch) * num_samples)]
        steps = generate(checkpoint.model, batch, sampling, tokenizer.stop_ids, num_samples, first)
        for chosen in steps:
            for row, id in chosen:
                if id in tokenizer.stop_ids:
                    outputs[row].ended = True
                else:
                    outputs[row].ids.append(id)
        for output in outputs:
            output.text = tokenizer.decode(output.ids)
        for row in range(0, len(outputs), num_samples):
            yield outputs[row : row + num_samples]


def stream(checkpoint: Checkpoint, prompt: list[int], sampling: Sampling) -> Iterator[str]:
    """The text of one sample as it comes, in whole characters."""
    tokenizer: Tokenizer = checkpoint.tokenizer
    decoder = tokenizer.stream_decoder()
    for [(_, id)] in generate(checkpoint.model, [prompt], sampling, tokenizer.stop_ids):
        if id in tokenizer.stop_ids:
            break
        yield decoder.push(id)
    yield decoder.flush()


# --- command line ------------------------------------------------------------------------------


def read_start(start: str, answers: bool) -> list[dict]:
    """--start as records {"Question": text, "Answer": reference or None}."""
    if not start.startswith("FILE:"):
        return [{"Question": start, "Answer": None}]
    path = user_path(start.removeprefix("FILE:"))
    if not path.is_file():
        raise UserError(f"no file {show_path(path)}; --start=FILE: takes a .txt or a .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{show_path(path)} is not UTF-8 ({error}); convert it first") from None
    if not text.strip():
        raise UserError(f"{show_path(path)} is empty")
    if path.suffix != ".jsonl":
        lines = [line.strip() for line in text.splitlines()] if answers else [text.rstrip("\n")]
        return [{"Question": line, "Answer": None} for line in lines if line]
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines cuts at U+2028 too
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question, answer = record["Question"], record.get("Answer")
            if not isinstance(question, str) or not isinstance(answer, str | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f'{show_path(path)}, line {number}: not an object with a text "Question"'
            ) from None
        records.append({"Question": question, "Answer": answer})
    return records


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    checkpoint = load_checkpoint(repo_path(config.out_dir), "best", pick_device(config.device))
    checkpoint.model.lay_out_for_decoding()
    default_temperature(checkpoint, config)
    records = read_start(config.start, checkpoint.answers)
    if config.eval_mode:
        from evaluations import evaluate_file  # evaluations.py imports this file

        return evaluate_file(checkpoint, config, records)
    if checkpoint.answers and not config.start.strip():
        raise UserError("what is the question? pass --start=TEXT or --start=FILE:questions.txt")
    prompts = [prompt_ids(checkpoint, record["Question"]) for record in records]
    for record, prompt in zip(records, prompts, strict=True):
        if len(prompt) > checkpoint.model.config.block_size:
            raise UserError(
                f"the prompt {record['Question'][:20]!r}... has {len(prompt)} tokens, longer than "
                f"block_size={checkpoint.model.config.block_size}; shorten it"
            )
    lines = []
    if len(prompts) == config.num_samples == 1:
        record, text = records[0], ""
        if not checkpoint.answers:
            print(record["Question"], end="", flush=True)
        for piece in stream(checkpoint, prompts[0], config):
            print(piece, end="", flush=True)
            text += piece
        print()
        lines.append((record["Question"], text))
    else:
        outputs = complete(checkpoint, prompts, config, config.num_samples, config.batch_size)
        shown = tqdm(outputs, total=len(prompts), unit="prompt", disable=len(prompts) == 1)
        for record, samples in zip(records, shown, strict=True):
            for output in samples:
                shown.write(show(checkpoint, record["Question"], output.text), file=sys.stdout)
                lines.append((record["Question"], output.text))
    if config.save_path:
        save(Path(config.save_path), checkpoint, lines)


def show(checkpoint: Checkpoint, prompt: str, text: str) -> str:
    """A sample among several: question and answer, or the text with its continuation."""
    return f"问：{prompt}\n答：{text}\n" if checkpoint.answers else f"{prompt}{text}\n{'-' * 20}"


def save(path: Path, checkpoint: Checkpoint, lines: list[tuple[str, str]]) -> None:
    keys = ("question", "answer") if checkpoint.answers else ("prompt", "continuation")
    if path.suffix == ".jsonl":
        records = (dict(zip(keys, line, strict=True)) for line in lines)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        text = "".join(show(checkpoint, *line) + "\n" for line in lines)
    with written_aside(path.expanduser().absolute()) as aside:
        aside.write_text(text, encoding="utf-8")
    print(f"saved {len(lines)} in {show_path(path)}", file=sys.stderr)


if __name__ == "__main__":
    command(main)
