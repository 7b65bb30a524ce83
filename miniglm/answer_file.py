"""A file of questions -> a file of answers, a line each: sample.py's --input_data, --output_data.

    {"question": "孔明是谁？"}    ->    {"question": "孔明是谁？", "answer": "诸葛亮的字。"}

A line may also name its text "Question" or "prompt", or be the plain text. Answers are appended to
OUTPUT.part behind a header that describes the run, and renamed at the end; an interrupted run
resumes when the command is repeated. A bad line keeps its place, with an "error" instead of an
answer.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm

from configurator import UserError, at_least, expanded, locked, printable, show_path, user_path
from miniglm import jsonl
from miniglm.checkpoint import Checkpoint
from miniglm.generation import Sampling
from miniglm.text import complete, fingerprint, load_for_sampling, prompt_ids

KEYS = ("question", "Question", "prompt")


@dataclass
class Settings(Sampling):
    """What sample.py and a file of answers have in common."""

    out_dir: str = "out"  # of the model
    input_data: str | None = None  # a file of questions, a JSON object or a text a line
    output_data: str | None = None  # where their answers go, an object a line
    num_samples: Annotated[int, at_least(1)] = 1  # outputs for each prompt
    batch_size: Annotated[int, at_least(1)] = 16  # rows at once
    perplexity: bool = False  # of each output, in the model's own distribution
    quantize: Literal["int8"] | None = None  # weights of 8 bits, on a CPU
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there


def answer_file(config: Settings) -> None:
    source, target = user_path(config.input_data), expanded(config.output_data).absolute()
    questions = jsonl.read_lines(source, "--input_data= takes a file of questions in UTF-8")
    with locked(target):
        if target.exists():
            raise UserError(f"{show_path(target)} exists; delete it, or pass another")
        checkpoint = load_for_sampling(config.out_dir, config.device, config.quantize == "int8")
        records = [check(checkpoint, line, number) for number, line in questions]
        bad = [record["error"] for record, _ in records if "error" in record]
        for error in bad[:5]:
            print(f"bad line: {error}")
        if len(bad) == len(records):
            raise UserError(f"no line of {show_path(source)} is a question; the first: {bad[0]}")
        part = target.with_name(target.name + ".part")
        done = jsonl.resume(part, header(config, checkpoint, source))
        new = answers(checkpoint, config, records, len(done))
        name = printable(target.name)
        for record in tqdm(new, name, len(records), initial=len(done), unit="question"):
            jsonl.append(part, [record])
            done.append(record)
        jsonl.write(target, done)
        part.unlink()
    print(f"{len(records) - len(bad)} answers, {len(bad)} bad lines, in {show_path(target)}")


def check(checkpoint: Checkpoint, line: str, number: int) -> tuple[dict, list[int]]:
    """A line as {"question"}, with "error" if it cannot be answered; and the ids of its prompt."""
    question = line
    try:
        if line.startswith("{"):
            record = json.loads(line)
            texts = [record[key] for key in KEYS if key in record]
            if not (texts and isinstance(texts[0], str) and texts[0].strip()):
                raise ValueError(f"it has no text under {', '.join(KEYS)}")
            question = texts[0]
        question.encode()  # half of a surrogate pair is no text
        return {"question": question}, prompt_ids(checkpoint, question)
    except (ValueError, RecursionError, UserError) as error:
        shown = question.encode(errors="replace").decode()
        return {"question": shown, "error": f"line {number}: {error}"}, []


def answers(
    checkpoint: Checkpoint, config: Settings, records: list[tuple[dict, list[int]]], done: int
) -> Iterator[dict]:
    """The lines of the output after the first `done`."""
    waiting = [prompt for record, prompt in records[done:] if "error" not in record]
    first = sum("error" not in record for record, _ in records) - len(waiting)
    n, rows = config.num_samples, config.batch_size
    outputs = complete(checkpoint, waiting, config, n, rows, first, nats=config.perplexity)
    for record, _ in records[done:]:
        if "error" in record:
            yield record
            continue
        samples = next(outputs)
        values = {"answer" if n == 1 else "answers": [output.text for output in samples]}
        if config.perplexity:
            name = "perplexity" if n == 1 else "perplexities"
            values[name] = [round(output.perplexity, 4) for output in samples]
        yield record | (values if n > 1 else {name: value for name, [value] in values.items()})


def header(config: Settings, checkpoint: Checkpoint, source: Path) -> dict:
    """What the answers depend on."""
    names = ["num_samples", "perplexity", *(["quantize", "batch_size"] if config.quantize else [])]
    settings = {name: getattr(config, name) for name in names}
    settings["question_end"] = checkpoint.question_end
    settings["input_sha256"] = hashlib.sha256(source.read_bytes()).hexdigest()
    return fingerprint(checkpoint, config) | settings
