"""Model -> text: completions, answers and conversations as functions, and the command line.

    python sample.py --out_dir=out-sanguo --start="却说曹操"
    python sample.py --out_dir=out-sanguo-sft --start="孔明是谁？"
    python sample.py --out_dir=out-sanguo-sft --interactive
    python sample.py --out_dir=out-sanguo-sft --input_data=asked.jsonl --output_data=answers.jsonl

A fine-tuned model is asked in the chat format and answers; a pretrained one continues the text.
Token ids are generation.py's, files of questions answer_file.py's.
"""

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
from decoding import pack, quantize
from generation import Batch, Request, Sampling, Token
from model import pick_device
from tokenizer import Tokenizer

AHEAD = 64  # times batch_size: prompts begun before the first that has not ended


@dataclass
class Settings(Sampling):
    out_dir: str = "out"  # of the model
    start: str = ""  # a text or question; FILE:x.txt (a prompt, or a question a line); FILE:x.jsonl
    interactive: bool = False  # a conversation in the terminal
    input_data: str | None = None  # a file of questions, a JSON object or a text a line
    output_data: str | None = None  # where their answers go, an object a line
    save_path: str | None = None  # also write here: a .jsonl of records, or the text as printed
    num_samples: int = 1  # outputs for each prompt
    batch_size: int = 16  # rows at once
    perplexity: bool = False  # of each output, in the model's own distribution
    quantize: Literal["int8"] | None = None  # weights of 8 bits, on a CPU
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there
    eval_mode: bool = False  # score the answers to FILE:... as evaluations.py does
    dataset: str | None = None  # with eval_mode: has the references that the file has not

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        if bool(self.input_data) != bool(self.output_data):
            raise UserError("--input_data= and --output_data= go together; one is missing")
        others = ("start", "interactive", "save_path", "eval_mode", "dataset")
        if self.input_data and (given := [name for name in others if getattr(self, name)]):
            raise UserError(f"--{given[0]} means nothing beside --input_data=; leave it out")


@dataclass
class Output:
    """One sample: its ids without the end token, its text, whether it ended by itself (an end
    token or a stop text came), and -log p of its tokens where they were asked for."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    nats: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp of the mean -log p, the end token's included."""
        return math.exp(sum(self.nats) / len(self.nats))


# --- prompts -----------------------------------------------------------------------------------


def default_temperature(checkpoint: Checkpoint, sampling: Sampling) -> Sampling:
    """The sampling with its temperature filled in."""
    if sampling.temperature is None:
        sampling.temperature = 0.0 if checkpoint.answers else 0.8
    return sampling


def prompt_ids(checkpoint: Checkpoint, text: str) -> list[int]:
    """A question in the chat format for a fine-tuned model, else the text to be continued, of which
    no more than the last block_size tokens are read. UserError for a question that is longer."""
    if checkpoint.answers:
        question = complete_question(checkpoint, text)
        return chat_prompt(checkpoint, [{"role": "user", "content": question}])
    ids = checkpoint.tokenizer.encode(text) or [checkpoint.tokenizer.end_of_text]
    return ids[-checkpoint.model.config.block_size :]


def chat_prompt(checkpoint: Checkpoint, messages: list[dict]) -> list[int]:
    """Ids that ask for the answer to the last message. The oldest turns are left out until a
    quarter of block_size is free for the answer. UserError where the last alone is too long."""
    block_size, render = checkpoint.model.config.block_size, checkpoint.tokenizer.render_prompt
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    if not turns or turns[-1]["role"] != "user":
        raise UserError("a conversation must end with a question of the user's")
    for first in [i for i, message in enumerate(turns) if message["role"] == "user"]:
        ids = render([*system, *turns[first:]])
        if len(ids) <= block_size - block_size // 4:
            return ids
    if len(ids) > block_size:
        longest = max(turns[-1]["content"], *(m["content"] for m in system), key=len)
        raise UserError(
            f"the prompt {longest[:20]!r}... has {len(ids)} tokens, longer than "
            f"block_size={block_size}; shorten it"
        )
    return ids


def complete_question(checkpoint: Checkpoint, text: str) -> str:
    """The question with the mark that ended the trained ones, where it ends in none."""
    bare = text.strip()
    return bare + checkpoint.question_end if bare and bare[-1].isalnum() else text


# --- outputs -----------------------------------------------------------------------------------


class TextStream:
    """Ids of one sample -> text as it comes: whole characters, up to the first stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self.decoder, self.stop = tokenizer.stream_decoder(), stop
        self.held, self.stopped = "", False

    def push(self, id: int) -> str:
        return self._release(self.decoder.push(id), keep=True)

    def flush(self) -> str:
        """What is left when no more ids come."""
        return self._release(self.decoder.flush(), keep=False)

    def _release(self, new: str, keep: bool) -> str:
        if self.stopped:
            return ""
        self.held += new
        found = [place for stop in self.stop if (place := self.held.find(stop)) >= 0]
        if found:
            end, self.stopped = min(found), True
        else:
            end = len(self.held) - (self._beginning() if keep else 0)
        text, self.held = self.held[:end], self.held[end:]
        return text

    def _beginning(self) -> int:
        """Characters at the end of what is held with which a stop text may begin."""
        longest = max(map(len, self.stop), default=0)
        sizes = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in sizes if any(s.startswith(self.held[-n:]) for s in self.stop)), 0)


def complete(
    checkpoint: Checkpoint,
    prompts: Iterable[list[int]],
    sampling: Sampling,
    num_samples: int = 1,
    batch_size: int = 16,
    first_prompt: int = 0,
    with_nats: bool = False,
) -> Iterator[list[Output]]:
    """The outputs of each prompt, in the prompts' order; batch_size samples are made at once, and
    prompts are taken as there is room. first_prompt: the index of the first, for its random
    stream."""
    tokenizer, prompts = checkpoint.tokenizer, enumerate(prompts)
    batch = Batch(checkpoint.model, tokenizer.stop_ids, batch_size, many=True)
    begun: dict[int, list[Output]] = {}  # by prompt, until it is yielded
    missing: dict[int, int] = {}  # samples of each that have not ended
    of: dict[Request, tuple[int, Output, TextStream]] = {}
    following = 0
    while True:
        # finished outputs wait for the slowest one; beyond AHEAD of them, all wait for it
        while len(batch.waiting) < batch_size and len(begun) < AHEAD * batch_size:
            if (following_prompt := next(prompts, None)) is None:
                break
            number, prompt = following_prompt
            begun[number], missing[number] = [Output() for _ in range(num_samples)], num_samples
            for sample, output in enumerate(begun[number]):
                request = Request(
                    prompt, sampling, first_prompt + number, sample, 0 if with_nats else None
                )
                of[request] = number, output, TextStream(tokenizer, sampling.stop)
                batch.add(request)
        if not begun:
            return
        for request, token in batch.step():
            number, output, stream = of[request]
            _add(output, token, stream, tokenizer)
            if stream.stopped:
                batch.cancel(request)
            if request.finish:
                output.text += stream.flush()
                missing[number] -= 1
                del of[request]
        while missing.get(following) == 0:
            del missing[following]
            yield begun.pop(following)
            following += 1


def _add(output: Output, token: Token, stream: TextStream, tokenizer: Tokenizer) -> None:
    if token.log_prob is not None:
        output.nats.append(-token.log_prob)
    if token.id in tokenizer.stop_ids:
        output.ended = True
    else:
        output.ids.append(token.id)
        output.text += stream.push(token.id)
        output.ended = stream.stopped


def stream(
    checkpoint: Checkpoint, prompt: list[int], sampling: Sampling, sample_index: int = 0
) -> Iterator[str]:
    """The text of one sample as it comes, in whole characters."""
    text = TextStream(checkpoint.tokenizer, sampling.stop)
    batch = Batch(checkpoint.model, checkpoint.tokenizer.stop_ids, size=1)
    batch.add(Request(prompt, sampling, 0, sample_index))
    while batch and not text.stopped:
        for _, token in batch.step():
            if token.id not in batch.stop_ids:
                yield text.push(token.id)
    yield text.flush()


def chat(
    checkpoint: Checkpoint, messages: list[dict], sampling: Sampling, sample_index: int = 0
) -> Iterator[str]:
    """The answer to the last of the messages {"role", "content"}, as it comes."""
    return stream(checkpoint, chat_prompt(checkpoint, messages), sampling, sample_index)


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


def load_for_sampling(out_dir: str, device: str = "auto", int8: bool = False) -> Checkpoint:
    """The best checkpoint of an out_dir, laid out for generation."""
    checkpoint = load_checkpoint(repo_path(out_dir), "best", pick_device(device))
    (quantize if int8 else pack)(checkpoint.model)
    return checkpoint


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if config.input_data:
        from answer_file import answer_file  # it imports this file

        return answer_file(config)
    checkpoint = load_for_sampling(config.out_dir, config.device, config.quantize == "int8")
    default_temperature(checkpoint, config)
    if config.interactive:
        return converse(checkpoint, config)
    records = read_start(config.start, checkpoint.answers)
    if config.eval_mode:
        from evaluations import evaluate_file  # evaluations.py imports this file

        return evaluate_file(checkpoint, config, records)
    if checkpoint.answers and not config.start.strip():
        raise UserError("what is the question? pass --start=TEXT or --start=FILE:questions.txt")
    prompts = [prompt_ids(checkpoint, record["Question"]) for record in records]
    if not checkpoint.answers:
        tell_of_cuts(checkpoint, [record["Question"] for record in records])
    lines = []
    if len(prompts) == config.num_samples == 1 and not config.perplexity:
        record, text = records[0], ""
        if not checkpoint.answers:
            print(record["Question"], end="", flush=True)
        for piece in stream(checkpoint, prompts[0], config):
            print(piece, end="", flush=True)
            text += piece
        print()
        lines.append((record["Question"], text))
    else:
        rest = config.num_samples, config.batch_size
        outputs = complete(checkpoint, prompts, config, *rest, with_nats=config.perplexity)
        shown = tqdm(outputs, total=len(prompts), unit="prompt", disable=len(prompts) == 1)
        for record, samples in zip(records, shown, strict=True):
            for output in samples:
                shown.write(show(checkpoint, record["Question"], output.text), file=sys.stdout)
                if config.perplexity:
                    shown.write(f"[perplexity {output.perplexity:.2f}]", file=sys.stdout)
                lines.append((record["Question"], output.text))
    if config.save_path:
        save(Path(config.save_path), checkpoint, lines)


def tell_of_cuts(checkpoint: Checkpoint, texts: list[str]) -> None:
    """Says of which texts a continuing model reads the end only."""
    block_size = checkpoint.model.config.block_size
    for text in texts:
        if (tokens := len(checkpoint.tokenizer.encode(text))) > block_size:
            print(
                f"note: {text[:20]!r}... has {tokens} tokens, of which the model reads the last "
                f"{block_size}",
                file=sys.stderr,
            )


def converse(checkpoint: Checkpoint, sampling: Sampling) -> None:
    """A conversation in the terminal; a continuing model continues each line by itself."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # keys that edit a line; Windows has its own
            import readline  # noqa: F401
    print("an empty line forgets what was said; Ctrl-C stops an answer; Ctrl-D, or Ctrl-Z, ends")
    messages = []
    for turn in itertools.count():  # each with its own random numbers
        try:
            text = input("问：" if checkpoint.answers else "> ").strip()
        except EOFError:
            print()
            return
        if not text:
            messages = []
            continue
        answer = ""
        try:
            if checkpoint.answers:
                text = complete_question(checkpoint, text)
                messages.append({"role": "user", "content": text})
                pieces = chat(checkpoint, messages, sampling, turn)
                print("答：", end="", flush=True)
            else:
                pieces = stream(checkpoint, prompt_ids(checkpoint, text), sampling, turn)
                print(text, end="", flush=True)
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except UserError as error:  # too long a question: the conversation goes on without it
            messages.pop()
            print(f"error: {error}")
            continue
        messages.append({"role": "assistant", "content": answer})
        print()


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
