"""Multiple choice: C-Eval's and CMMLU's csv files, a subject a file, scored by log-likelihood.

    letter                   the options stand in the question; log p of " A" .. " D"
    option                   only the question is asked; log p of each option's whole text
    option_per_character     the same, divided by the option's length

Prompts, tokens and scores are those of lm-evaluation-harness 0.4.13 (ceval-valid, cmmlu; acc, and
acc_norm per character). A model that answers is asked in its chat format (--apply_chat_template):
the line that names the subject is the system message, examples are turns.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import ROOT, UserError, show_path
from miniglm.checkpoint import Checkpoint
from miniglm.metrics import mean, wilson
from miniglm.prep.readers import Tally, source_of, values
from miniglm.scoring import answer_nats

LETTERS = "ABCD"
SCORES = ["letter", "option", "option_per_character"]
SUBJECTS = tomllib.loads((ROOT / "miniglm" / "subjects.toml").read_text(encoding="utf-8"))
LINES = {  # in front of a subject's questions
    "ceval": "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n",
    "cmmlu": "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n",
}
Pair = tuple[list[int], list[int]]  # ids of a prompt and of its continuation


@dataclass
class Question:
    place: str  # file and row
    subject: str
    line: str  # that names the subject; "" if it is unknown
    text: str
    options: list[str]  # of LETTERS
    answer: int
    examples: list["Question"]  # that stand before it

    def continuations(self, way: str) -> list[str]:
        return [*LETTERS] if way == "letter" else self.options

    def ask(self, way: str) -> str:
        listed = [f"{a}. {text}\n" for a, text in zip(LETTERS, self.options, strict=True)]
        return f"{self.text}\n{''.join(listed) if way == 'letter' else ''}答案："


# --- files -------------------------------------------------------------------------------------


def is_choices(path: Path) -> bool:
    """Whether a dataset's path is a csv file, or a folder of csv files."""
    is_folder = any(path.glob("*.csv")) and not (path / "meta.json").is_file()
    return is_folder or (path.suffix.lower() == ".csv" and not path.is_dir())


def files_of(path: Path) -> list[Path]:
    return sorted(path.glob("*.csv")) if path.is_dir() else [path]


def subject_of(file: Path) -> str:
    return re.sub(r"_(val|dev|test)$", "", file.stem)


def rows_of(file: Path) -> list[tuple[int, dict]]:
    """(row, fields) of a file. Raises UserError if there is none, or at the first damaged one."""
    tally = Tally(strict=True)
    tally.begin(source := source_of(file))
    rows = list(values(source, tally))
    if not rows:
        raise UserError(f"{source.name} is empty; get it again, or leave it out")
    return rows


def with_answers(path: Path) -> Path:
    """The path, or the one beside it in val/ if its questions have no answers: C-Eval's test."""
    first = files_of(path)[0]
    if any(not {"id", "question"} <= {*row} or row.get("answer") for _, row in rows_of(first)):
        return path
    val = path.parent / "val"
    if not path.is_dir():
        val = path.parent.parent / "val" / f"{subject_of(path)}_val.csv"
    if not val.exists():
        raise UserError(f"{show_path(path)} has no answers, and there is no {show_path(val)}")
    print(f"{show_path(path)} has no answers, as C-Eval's test; {show_path(val)} is scored")
    return val


def read_questions(file: Path, examples: list[Question]) -> list[Question]:
    return [question_of(file, number, fields, examples) for number, fields in rows_of(file)]


def question_of(file: Path, number: int, fields: dict, examples: list[Question]) -> Question:
    """Raises UserError if a field is missing, empty or damaged, or the answer no letter."""
    place, subject = f"{show_path(file)}, line {number}", subject_of(file)
    kind, names = "ceval", ["question", *LETTERS, "answer"]
    if "question" not in fields:
        kind, names = "cmmlu", ["Question", *LETTERS, "Answer"]
    for name in names:
        if not fields.get(name, "").strip():
            raise UserError(f"{place}: no {name}; columns are {', '.join(names)}")
    text, *options, answer = (fields[name] for name in names)
    if answer.strip() not in [*LETTERS]:
        raise UserError(f"{place}: the answer {answer!r} is none of {', '.join(LETTERS)}")
    line = LINES[kind].format(SUBJECTS[kind][subject]) if subject in SUBJECTS[kind] else ""
    index = LETTERS.index(answer.strip())
    return Question(place, subject, line, text.strip(), options, index, examples)


def examples_for(file: Path, shots: int) -> list[Question]:
    """The first questions of the subject's dev file."""
    if not shots:
        return []
    subject, dev = subject_of(file), file.parent.parent / "dev"
    found = [dev / name for name in (f"{subject}_dev.csv", f"{subject}.csv")]
    path = next((path for path in found if path.is_file()), None)
    if not path:
        raise UserError(f"--shots={shots}: no file {show_path(found[0])}, nor {found[1].name}")
    examples = read_questions(path, [])[:shots]
    if len(examples) < shots:
        raise UserError(f"--shots={shots}: {show_path(path)} has only {len(examples)} questions")
    return examples


# --- log-likelihoods ---------------------------------------------------------------------------


def pairs_of(checkpoint: Checkpoint, question: Question, way: str) -> list[Pair]:
    """The prompt with each continuation."""
    tokenizer, continuations = checkpoint.tokenizer, question.continuations(way)
    shown = [(e.ask(way), e.continuations(way)[e.answer]) for e in question.examples]
    if not checkpoint.answers:
        examples = "".join(f"{asked} {answer}\n\n" for asked, answer in shown)
        text = question.line + examples + question.ask(way)
        prompt = tokenizer.encode(text)
        return [(prompt, tokenizer.encode(f"{text} {c}")[len(prompt) :]) for c in continuations]
    turns = [("system", question.line)] if question.line else []
    for asked, answer in [*shown, (question.ask(way), "")]:
        turns += [("user", asked), ("assistant", answer)]
    messages = [{"role": role, "content": text} for role, text in turns[:-1]]
    prompt = tokenizer.render_prompt(messages)
    end = len(prompt)
    while tokenizer.bytes_of[prompt[end - 1]].isspace():  # the harness scores line ends, too
        end -= 1
    return [(prompt[:end], prompt[end:] + tokenizer.encode(text)) for text in continuations]


def log_likelihoods(
    checkpoint: Checkpoint, questions: list[Question], way: str, batch_size: int
) -> np.ndarray:
    """Of each question's continuations, (N, 4). Prompts are cut on the left to what the model
    reads, and counted. Raises UserError if a continuation alone is longer."""
    block_size, pairs, cut = checkpoint.model.config.block_size, [], 0
    for question in questions:
        own = pairs_of(checkpoint, question, way)
        longest = max(len(answer) for _, answer in own)
        if longest > block_size:
            raise UserError(
                f"{question.place}: an option of {longest} tokens is longer than the model's "
                f"block_size={block_size}; leave the question out"
            )
        excess = [max(0, len(prompt) + len(answer) - block_size - 1) for prompt, answer in own]
        cut += any(excess)
        pairs += [(prompt[n:], answer) for n, (prompt, answer) in zip(excess, own, strict=True)]
    if cut:
        print(f"{way}: {cut} of {len(questions)} prompts were cut to the last {block_size} tokens")
    return -np.array(answer_nats(checkpoint, pairs, batch_size)).reshape(-1, len(LETTERS))


# --- scores ------------------------------------------------------------------------------------


def evaluate(
    checkpoint: Checkpoint, path: Path, shots: int, batch_size: int
) -> tuple[dict, list[dict]]:
    """The report of a csv file or a folder of them, and a record for each question."""
    path = with_answers(path)
    files = files_of(path)
    questions = [q for f in files for q in read_questions(f, examples_for(f, shots))]
    ways = [log_likelihoods(checkpoint, questions, way, batch_size) for way in ("letter", "option")]
    records = [record_of(*row) for row in zip(questions, *ways, strict=True)]
    name = "/".join(path.with_suffix("").parts[-2:])
    report = {"dataset": name, "split": f"{shots}-shot", "in_chat": checkpoint.answers}
    subjects = {
        name: figures([record for record in records if record["subject"] == name])
        for name in dict.fromkeys(question.subject for question in questions)
    }
    return report | figures(records) | {"subjects": subjects}, records


def record_of(question: Question, letter: np.ndarray, option: np.ndarray) -> dict:
    """letter, option: log-likelihoods (4,)."""
    lengths = [len(text) for text in question.options]
    scores = zip(SCORES, (letter, option, option / lengths), strict=True)
    record = {"subject": question.subject, "question": question.text}
    record |= {"answer": LETTERS[question.answer], "letter_log_likelihoods": letter.tolist()}
    record |= {"option_log_likelihoods": option.tolist()}
    return record | {name: LETTERS[int(score.argmax())] for name, score in scores}


def figures(records: list[dict]) -> dict:
    """Of each score the accuracy and the ends of its 95 % interval; chance is what guesses get."""
    report = {"n": len(records), "chance": 1 / len(LETTERS)}
    for name in SCORES:
        right = [record[name] == record["answer"] for record in records]
        low, high = wilson(sum(right), len(right))
        report |= {name: mean(right), f"{name}_low": low, f"{name}_high": high}
    return report


def table(report: dict) -> list[str]:
    """A line for each subject and one for all, in percent, with 95 % intervals."""
    rows = report["subjects"] | {"all": report}
    cells = [["subject", "n", "chance", *SCORES]]
    for subject, row in rows.items():
        percent = {k: f"{100 * v:.1f}" for k, v in row.items() if isinstance(v, float)}
        spans = [f"{percent[s]} [{percent[f'{s}_low']}, {percent[f'{s}_high']}]" for s in SCORES]
        cells.append([subject, str(row["n"]), percent["chance"], *spans])
    width = max(map(len, [*rows, "subject"]))
    return [f"{a:<{width}} {n:>6} {c:>7}  {x:<19} {y:<19} {z}" for a, n, c, x, y, z in cells]
