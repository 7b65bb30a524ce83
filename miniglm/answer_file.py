"""A file of questions -> a file of answers, a line each: sample.py's --input_data, --output_data.

    {"question": "孔明是谁？"}    ->    {"question": "孔明是谁？", "answer": "诸葛亮的字。"}

A line may also name its text "Question" or "prompt", or be the plain text. Answers are appended to
OUTPUT.part, whose first line says of what run they are, and renamed at the end: interrupted, the
same command goes on. A bad line keeps its place, with an "error" in the place of an answer.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import sample
from configurator import UserError, locked, show_path, user_path, written_aside
from miniglm.checkpoint import Checkpoint, weights_sha256
from miniglm.generation import Sampling
from miniglm.text import complete, default_temperature, load_for_sampling, prompt_ids

KEYS = ("question", "Question", "prompt")
DEPEND = [*(field.name for field in dataclasses.fields(Sampling)), "num_samples", "perplexity"]


def answer_file(config: sample.Settings) -> None:
    source, target = user_path(config.input_data), Path(config.output_data).expanduser().absolute()
    part = target.with_name(target.name + ".part")
    if not source.is_file():
        raise UserError(f"no file {show_path(source)}; --input_data= takes a file of questions")
    if target.exists():
        raise UserError(f"{show_path(target)} is there already; delete it, or name another")
    questions = read_questions(source)
    checkpoint = load_for_sampling(config.out_dir, config.device, config.quantize == "int8")
    default_temperature(checkpoint, config)
    records = [check(checkpoint, line, number) for number, line in questions]
    bad = [record["error"] for record, _ in records if "error" in record]
    for error in bad[:5]:
        print(f"bad line: {error}")
    if len(bad) == len(records):
        raise UserError(f"no line of {show_path(source)} is a question; the first: {bad[0]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target):
        done = resume(part, header(config, checkpoint, source))
        with part.open("a", encoding="utf-8", newline="\n") as file:
            bar = tqdm(total=len(records), initial=done, unit="question", desc=target.name)
            for line in answers(checkpoint, config, records, done):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                bar.update()
            bar.close()
        publish(part, target)
    print(f"{len(records) - len(bad)} answers, {len(bad)} bad lines, in {show_path(target)}")


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """UserError where another run, which still lives, writes the same file, or has just done so."""
    with locked(target):
        if target.exists():
            raise UserError(f"{show_path(target)} is there already; delete it, or name another")
        yield


def read_questions(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{show_path(path)} is not UTF-8 ({error}); convert it first") from None
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{show_path(path)} is empty")
    return lines


def check(checkpoint: Checkpoint, line: str, number: int) -> tuple[dict, list[int]]:
    """A line as {"question"}, with "error" where it cannot be answered, and its prompt's ids."""
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
    checkpoint: Checkpoint,
    config: sample.Settings,
    records: list[tuple[dict, list[int]]],
    done: int,
) -> Iterator[dict]:
    """The lines of the output after the first `done`."""
    prompts = [prompt for record, prompt in records[done:] if "error" not in record]
    before = sum("error" not in record for record, _ in records[:done])
    outputs = complete(
        checkpoint,
        prompts,
        config,
        config.num_samples,
        config.batch_size,
        first_prompt=before,
        with_nats=config.perplexity,
    )
    for record, _ in records[done:]:
        if "error" in record:
            yield record
            continue
        samples = next(outputs)
        texts = [output.text for output in samples]
        found = {"answer": texts[0]} if config.num_samples == 1 else {"answers": texts}
        if config.perplexity:
            values = [round(output.perplexity, 4) for output in samples]
            name = "perplexity" if config.num_samples == 1 else "perplexities"
            found[name] = values[0] if config.num_samples == 1 else values
        yield record | found


def header(config: sample.Settings, checkpoint: Checkpoint, source: Path) -> dict:
    """What answers depend on."""
    names = [*DEPEND, *(["quantize", "batch_size"] if config.quantize else [])]
    return {
        "settings": {name: getattr(config, name) for name in names},
        "question_end": checkpoint.question_end,
        "tokenizer_sha256": checkpoint.tokenizer.sha256,
        "weights_sha256": weights_sha256(checkpoint.path),
        "input_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }


def resume(part: Path, wanted: dict) -> int:
    """How many answers are there already; begins the file where there is none. A line that a kill
    cut short is taken away. UserError where the file is of another run."""
    if not part.is_file() or b"\n" not in part.read_bytes():
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(wanted) + "\n")
        return 0
    content = part.read_bytes()
    whole = content[: content.rindex(b"\n") + 1]
    first, *lines = whole.split(b"\n")[:-1]
    try:
        before = json.loads(first)
    except ValueError:
        before = {}
    if before != wanted:
        differs = [key for key in wanted if before.get(key) != wanted[key]]
        raise UserError(
            f"{show_path(part)} was begun with other {', '.join(differs)}; delete it to begin anew"
        )
    if len(whole) < len(content):
        with part.open("r+b") as file:
            file.truncate(len(whole))
    return len(lines)


def publish(part: Path, target: Path) -> None:
    """The answers without the first line, under their own name."""
    with written_aside(target) as aside, part.open("rb") as source, aside.open("wb") as file:
        source.readline()
        shutil.copyfileobj(source, file)
    part.unlink()
