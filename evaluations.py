"""Scores of a model: perplexity, bits per byte; of answers ROUGE-L, of translations BLEU; multiple
choice; reports.

    python evaluations.py --out_dir=out-sanguo
    python evaluations.py --out_dir=out-sanguo-sft --split=val
    python evaluations.py --out_dir=out-translate-sft --dataset=finance_sft --split=test
    python evaluations.py --out_dir=out-sanguo-sft --dataset=data/raw/ceval-exam/val --shots=5
    python evaluations.py --compare=out-translate-sft,out-translate-lora

Writes evaluation.json to the out_dir and, for questions and translations, answers.jsonl, both with
a copy named after dataset and split; for questions also answers-seen.jsonl and histograms.
--compare reads the reports of several runs on the same test sentences, and writes one table.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from configurator import UserError, at_least, command, configure, repo_path, show_path

# isort: split
import numpy as np

from data_utils import Dataset, Mixture
from miniglm import choices, jsonl, scoring
from miniglm.checkpoint import Checkpoint, check_writable
from miniglm.comparison import compare, report_name
from miniglm.generation import Sampling
from miniglm.losses import split_sums
from miniglm.prep.writer import fit
from miniglm.text import check_answers, dataset_of, load_for_sampling
from visualize import draw_histogram

TRANSLATIONS = ["translation_sft", "finance_sft"]
WINDOW = 1024  # tokens
HISTOGRAMS = {
    "rouge_l": "ROUGE-L of each answer, over characters",
    "perplexity": "perplexity of each reference answer",
}


@dataclass
class Settings(Sampling):
    out_dir: str = "out"  # of the model
    dataset: str | None = None  # a name under data/, or a path; None is what it was trained on
    split: str | None = None  # one that the dataset has; None is val, with compare test
    batch_size: Annotated[int, at_least(1)] = 32  # rows at once
    shots: Annotated[int, at_least(0)] = 0  # of multiple choice: examples before each question
    quantize: Literal["int8"] | None = None  # weights of 8 bits, on a CPU
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there
    compare: list[str] = field(default_factory=list)  # a translator's evaluated out_dirs, in order
    datasets: list[str] = field(default_factory=list)  # with compare; empty: both translation sets
    examples: Annotated[int, at_least(0)] = 3  # with compare: sentences of each dataset to show
    out: str = "out-comparison"  # with compare: directory for comparison.md and comparison.json


# --- a split of a dataset ----------------------------------------------------------------------


def evaluate(checkpoint: Checkpoint, data: Dataset, split: str, config: Settings) -> None:
    """Scores the whole split and writes the report."""
    check_writable(checkpoint.out_dir, "--out_dir=")
    report, asked, seen = {"dataset": data.name, "split": split}, [], None
    conversations = data.conversations(split) if data.kind == "sft" else []
    if conversations and data.languages:
        ask = scoring.in_chat if checkpoint.answers else scoring.in_text
        asked, sizes = scoring.answer_all(checkpoint, conversations, config, ask)
        report |= sizes | scoring.score_translations(asked)
    else:
        window = window_of(checkpoint, data)
        sums = split_sums(checkpoint.model, data, split, config.batch_size, block_size=window)
        report |= scoring.per_token(*sums)
    if conversations and not data.languages:
        trained = data.conversations("train")
        count = min(len(conversations), len(trained))
        chosen = sorted(np.random.default_rng(0).choice(len(trained), count, replace=False))
        asked, _ = scoring.answer_all(checkpoint, conversations, config)
        seen, _ = scoring.answer_all(checkpoint, [trained[row] for row in chosen], config)
        report |= scoring.score_answers(asked, seen, pairs_of(data, "train"))
    write(checkpoint, report, asked, seen)


def window_of(checkpoint: Checkpoint, data: Dataset | Mixture) -> int:
    """Tokens of the windows that a text is read in: published models take up to 131,072, which
    would need a text and a memory of that size."""
    block_size = checkpoint.model.config.block_size
    return min(block_size, WINDOW) if data.kind == "pretrain" else block_size


def pairs_of(data: Dataset, split: str) -> list[tuple[str, str]]:
    """The last question and answer of each conversation; none of data without conversations."""
    conversations = data.conversations(split) if data.kind == "sft" else []
    return [(m[-2]["content"], m[-1]["content"]) for m in conversations]


# --- a file of questions -----------------------------------------------------------------------


def evaluate_file(checkpoint: Checkpoint, records: list[dict], name: str, config) -> None:
    """Scores the answers to a file's questions: `sample.py --eval_mode`, whose Settings config is.
    References come from the file, else from the dataset; questions that have neither are counted
    and left out."""
    check_answers(checkpoint)
    check_writable(checkpoint.out_dir, "--out_dir=")
    try:
        data = dataset_of(checkpoint, config.dataset)
    except UserError:
        if config.dataset or not all(record.get("Answer") for record in records):
            raise
        data = None
    splits = sorted(data.tokens, key=lambda split: split == "train") if data else []
    known = {split: pairs_of(data, split) for split in splits}
    reference_of = {q: a for pairs in known.values() for q, a in pairs}  # train's last, they win
    conversations = with_references(checkpoint, records, reference_of)
    if not conversations:
        raise UserError(f"no question of {name} has a reference; pass --dataset= of questions")
    asked, sizes = scoring.answer_all(checkpoint, conversations, config)
    report, seen = {"dataset": name, "split": "file"} | sizes, None
    if data and data.languages:
        report |= scoring.score_translations(asked)
    else:
        trained = {question for question, _ in known.get("train", [])}
        seen = [record for record in asked if record["question"] in trained]
        report |= scoring.score_answers(asked, seen, known.get("train", []))
    write(checkpoint, report, asked, seen)


def with_references(
    checkpoint: Checkpoint, records: list[dict], reference_of: dict[str, str]
) -> list[list[dict]]:
    """Conversations of question and reference, as long as the model can read; says how many records
    have no reference, or do not fit."""
    conversations, unmatched, too_long = [], 0, 0
    for record in records:
        answer = record.get("Answer") or reference_of.get(record["Question"], "")
        if not answer.strip():
            unmatched += 1
            continue
        messages = [
            {"role": "user", "content": record["Question"]},
            {"role": "assistant", "content": answer},
        ]
        fitted, cut = fit(checkpoint.tokenizer, messages, checkpoint.model.config.block_size)
        too_long += bool(cut)
        conversations += [fitted] if fitted else []
    print(f"{len(conversations)} questions; {unmatched} without a reference were left out")
    if too_long:
        print(f"{too_long} longer than block_size were cut or left out")
    return conversations


# --- reports -----------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, report: dict, asked: list[dict], seen: list[dict] | None) -> None:
    """Writes and prints the report. asked: empty if there are no answers. seen: None if there are
    no questions."""
    out_dir, dataset, split = checkpoint.out_dir, report["dataset"], report["split"]
    report = {"checkpoint": checkpoint.path.name} | report
    for suffix in ("", f"-{report_name(dataset, split)}"):
        jsonl.write_report(out_dir / f"evaluation{suffix}.json", report)
        if asked:
            jsonl.write(out_dir / f"answers{suffix}.jsonl", asked)
    if seen is not None:
        jsonl.write(out_dir / "answers-seen.jsonl", seen)
        groups, title = {split: asked, "trained questions": seen}, f"{out_dir.name} on {dataset}"
        for key, label in HISTOGRAMS.items():
            values = {group: [r[key] for r in records] for group, records in groups.items()}
            path, log_x = out_dir / f"{key}.png", key == "perplexity"
            draw_histogram(values, path, title, label, log_x=log_x)
    if "subjects" in report:
        print("\n".join(choices.table(report)))
    else:
        for key, value in report.items():
            print(f"{key:<20}  {value:.4g}" if isinstance(value, float) else f"{key:<20}  {value}")
    print(f"written to {show_path(out_dir)}/evaluation.json")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if config.compare:
        datasets, split = config.datasets or TRANSLATIONS, config.split or "test"
        check_writable(repo_path(config.out), "--out=")
        return compare(config.compare, datasets, split, config.examples, repo_path(config.out))
    split = config.split or "val"
    checkpoint = load_for_sampling(config.out_dir, config.device, config.quantize == "int8")
    if config.dataset and choices.is_choices(path := repo_path(config.dataset)):
        check_writable(checkpoint.out_dir, "--out_dir=")
        report, asked = choices.evaluate(checkpoint, path, config.shots, config.batch_size)
        return write(checkpoint, report, asked, None)
    data = dataset_of(checkpoint, config.dataset)
    if data.kind in ("dpo", "kto"):
        raise UserError(f"{show_path(data.path)} has no questions or text; pass another --dataset=")
    data.check(window_of(checkpoint, data), split)
    data.check_tokenizer(checkpoint.tokenizer, checkpoint.path)
    # greedy, whatever sampling takes by default
    config = dataclasses.replace(config, temperature=config.temperature or 0.0)
    evaluate(checkpoint, data, split, config)


if __name__ == "__main__":
    command(main)
