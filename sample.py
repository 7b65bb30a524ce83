"""The command line of generation: a prompt, a conversation, or a file of questions.

    python sample.py --out_dir=out-sanguo --start="却说曹操"
    python sample.py --out_dir=out-sanguo-sft --start="孔明是谁？"
    python sample.py --out_dir=out-sanguo-sft --interactive
    python sample.py --out_dir=out-sanguo-sft --input_data=asked.jsonl --output_data=answers.jsonl

A fine-tuned model is asked in the chat format and answers; a pretrained one continues the text.
The functions are miniglm/text.py's, files of questions miniglm/answer_file.py's.
"""

import contextlib
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from configurator import (
    UserError,
    command,
    configure,
    show_path,
    user_path,
    written_aside,
)
from miniglm.checkpoint import Checkpoint
from miniglm.generation import Sampling
from miniglm.text import (
    chat,
    complete,
    complete_question,
    default_temperature,
    load_for_sampling,
    prompt_ids,
    show,
    stream,
)


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
    if config.input_data:
        from miniglm.answer_file import answer_file  # it imports this file

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
