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
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, command, configure, expanded, is_text, show_path, user_path

# isort: split
from tqdm import tqdm

from miniglm import answer_file, jsonl
from miniglm.checkpoint import Checkpoint, check_writable
from miniglm.generation import Sampling
from miniglm.text import (
    chat_prompt,
    complete,
    complete_question,
    load_for_sampling,
    prompt_ids,
    show,
    stream,
)


@dataclass
class Settings(answer_file.Settings):
    start: str = ""  # a text or question; FILE:x.txt (a prompt, or a question a line); FILE:x.jsonl
    interactive: bool = False  # a conversation in the terminal
    save_path: str | None = None  # also write here: a .jsonl of records, or the text as printed
    eval_mode: bool = False  # score the answers to FILE:... as evaluations.py does
    dataset: str | None = None  # with eval_mode: has the references that the file lacks

    def __post_init__(self):
        super().__post_init__()
        if bool(self.input_data) != bool(self.output_data):
            raise UserError("--input_data= and --output_data= go together; one is missing")
        others = ("start", "interactive", "save_path", "eval_mode", "dataset")
        if self.input_data and (given := [name for name in others if getattr(self, name)]):
            raise UserError(f"--{given[0]} means nothing beside --input_data=; leave it out")
        if self.eval_mode and not self.start.startswith("FILE:"):
            raise UserError("--eval_mode takes questions from a file; pass --start=FILE:x.jsonl")


def read_start(start: str, answers: bool) -> list[dict]:
    """--start as records {"Question": text, "Answer": reference}, the latter where the file has
    one. answers: a .txt is a question a line, else one prompt."""
    if not start.startswith("FILE:"):
        return [{"Question": start}]
    path = user_path(start.removeprefix("FILE:"))
    remedy = "--start=FILE: takes a .txt or a .jsonl in UTF-8"
    if path.suffix == ".jsonl":
        return jsonl.read_records(path, ("Question",), remedy, optional=("Answer",))
    if answers:
        return [{"Question": line} for _, line in jsonl.read_lines(path, remedy)]
    return [{"Question": jsonl.read_text(path, remedy).rstrip("\n")}]


# --- one prompt, or several --------------------------------------------------------------------


def print_stream(pieces: Iterator[str], can_stop: bool = False) -> str:
    """Prints the pieces as they come and returns their text; can_stop: Ctrl-C ends only them."""
    text = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        if not can_stop:
            raise
    print()
    return text


def print_outputs(
    checkpoint: Checkpoint, config: Settings, texts: list[str]
) -> list[tuple[str, str]]:
    """Prints the outputs of each prompt, a single one as it comes; returns (prompt, output)."""
    texts, prompts = zip(*readable(checkpoint, texts), strict=True)
    if len(prompts) == config.num_samples == 1 and not config.perplexity:
        print("" if checkpoint.answers else texts[0], end="", flush=True)
        return [(texts[0], print_stream(stream(checkpoint, prompts[0], config)))]
    outputs = complete(
        checkpoint, prompts, config, config.num_samples, config.batch_size, nats=config.perplexity
    )
    shown = tqdm(outputs, total=len(prompts), unit="prompt", disable=len(prompts) == 1)
    pairs = []
    for text, samples in zip(texts, shown, strict=True):
        for output in samples:
            pairs.append((text, output.text))
            shown.write(show(checkpoint, text, output.text), file=sys.stdout)
            if config.perplexity:
                shown.write(f"[perplexity {output.perplexity:.2f}]", file=sys.stdout)
    return pairs


def readable(checkpoint: Checkpoint, texts: list[str]) -> list[tuple[str, list[int]]]:
    """The texts with the ids of their prompts; of several, those that are too long are named and
    left out. Raises UserError if none is left."""
    pairs = []
    for number, text in enumerate(texts, 1):
        try:
            pairs.append((text, prompt_ids(checkpoint, text)))
        except UserError as error:
            if number - len(pairs) == len(texts):
                raise
            print(f"left out: number {number}: {error}", file=sys.stderr)
    return pairs


def note_cuts(checkpoint: Checkpoint, texts: list[str]) -> None:
    """Says which texts are longer than a continuing model can read."""
    block_size = checkpoint.model.config.block_size
    for text in texts:
        if (tokens := len(checkpoint.tokenizer.encode(text))) > block_size:
            print(
                f"note: {text[:20]!r}... has {tokens} tokens; the model reads only the last "
                f"{block_size}",
                file=sys.stderr,
            )


def save(path: Path, checkpoint: Checkpoint, pairs: list[tuple[str, str]]) -> None:
    """Writes (prompt, output) to a file."""
    path = expanded(path).absolute()
    keys = ("question", "answer") if checkpoint.answers else ("prompt", "continuation")
    if path.suffix == ".jsonl":
        jsonl.write(path, (dict(zip(keys, pair, strict=True)) for pair in pairs))
    else:
        jsonl.write_text(path, "".join(show(checkpoint, *pair) + "\n" for pair in pairs))
    print(f"saved {len(pairs)} in {show_path(path)}", file=sys.stderr)


# --- a conversation ----------------------------------------------------------------------------


def converse(checkpoint: Checkpoint, sampling: Sampling) -> None:
    """A conversation in the terminal; a pretrained model continues each line on its own."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # keys that edit a line; Windows has its own
            import readline  # noqa: F401
    print("an empty line starts over; Ctrl-C stops an answer; Ctrl-D, or Ctrl-Z, ends")
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
        question = {"role": "user", "content": complete_question(checkpoint, text)}
        try:
            if not is_text(text):
                raise UserError("this line is not UTF-8 and was not read; the conversation goes on")
            if checkpoint.answers:
                prompt = chat_prompt(checkpoint, [*messages, question])
            else:
                prompt = prompt_ids(checkpoint, text)
        except UserError as error:
            print(f"error: {error}")
            continue
        print("答：" if checkpoint.answers else text, end="", flush=True)
        answer = print_stream(stream(checkpoint, prompt, sampling, turn), can_stop=True)
        messages += [question, {"role": "assistant", "content": answer}]


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if config.input_data:
        return answer_file.answer_file(config)
    if config.save_path:
        check_writable(expanded(config.save_path).parent, "--save_path=")
    checkpoint = load_for_sampling(config.out_dir, config.device, config.quantize == "int8")
    if config.interactive:
        return converse(checkpoint, config)
    records = read_start(config.start, checkpoint.answers)
    if config.eval_mode:
        from evaluations import evaluate_file  # it brings matplotlib, which takes half a second

        name = Path(config.start.removeprefix("FILE:")).stem
        return evaluate_file(checkpoint, records, name, config)
    texts = [record["Question"] for record in records]
    if checkpoint.answers and not config.start.strip():
        raise UserError("what is the question? pass --start=TEXT or --start=FILE:questions.txt")
    if not checkpoint.answers:
        note_cuts(checkpoint, texts)
    pairs = print_outputs(checkpoint, config, texts)
    if config.save_path:
        save(Path(config.save_path), checkpoint, pairs)


if __name__ == "__main__":
    command(main)
