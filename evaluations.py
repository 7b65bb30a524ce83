"""Scores of a model: perplexity, bits per byte; of answers ROUGE-L, of translations BLEU; reports.

    python evaluations.py --out_dir=out-sanguo
    python evaluations.py --out_dir=out-sanguo-sft --split=val
    python evaluations.py --out_dir=out-translate-sft --dataset=finance_sft --split=test
    python evaluations.py --compare=out-translate-sft,out-translate-lora

Writes evaluation.json to the out_dir and, for questions and translations, answers.jsonl, both with
a copy named after dataset and split; for questions also answers-seen.jsonl and histograms.
--compare reads the reports of several runs on the same test sentences, and writes one table.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from configurator import UserError, at_least, command, configure, repo_path, show_path
from data_utils import Dataset, Mixture, open_dataset
from miniglm import scoring
from miniglm.checkpoint import Checkpoint
from miniglm.comparison import compare
from miniglm.generation import Sampling
from miniglm.losses import split_sums
from miniglm.prep.writer import fit
from miniglm.text import check_answers, load_for_sampling
from visualize import draw_histogram

TRANSLATIONS = ["translation_sft", "finance_sft"]


@dataclass
class Settings(Sampling):
    out_dir: str = "out"  # of the model
    dataset: str | None = None  # a name under data/, or a path; None is what it was trained on
    split: str | None = None  # one that the dataset has; None is val, with compare test
    batch_size: Annotated[int, at_least(1)] = 32  # rows at once
    quantize: Literal["int8"] | None = None  # weights of 8 bits, on a CPU
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there
    compare: list[str] = field(default_factory=list)  # a translator's evaluated out_dirs, in order
    datasets: list[str] = field(default_factory=list)  # with compare; empty: both translation sets
    examples: Annotated[int, at_least(0)] = 3  # with compare: sentences of each dataset to show
    out: str = "out-comparison"  # with compare: directory for comparison.md and comparison.json


# --- a split of a dataset ----------------------------------------------------------------------


def dataset_of(checkpoint: Checkpoint, name: str | None) -> Dataset | Mixture:
    """The dataset of this name, else the one that the model was trained on."""
    name = name or checkpoint.run["settings"].get("dataset")
    if not name:
        raise UserError(f"{show_path(checkpoint.path)} names no dataset; pass --dataset=")
    return open_dataset(name)


def evaluate(
    checkpoint: Checkpoint, data: Dataset, split: str, sampling: Sampling, batch_size: int
) -> None:
    """Scores the whole split and writes the report."""
    began = time.perf_counter()
    report, asked, seen = {"dataset": data.name, "split": split}, [], None
    conversations = data.conversations(split) if data.kind == "sft" else []
    if conversations and data.languages:
        ask = scoring.in_chat if checkpoint.answers else scoring.in_text
        asked, sizes = scoring.answer_all(
            checkpoint, conversations, sampling, batch_size, split, ask
        )
        report |= sizes | scoring.score_translations(asked)
    else:
        device = str(checkpoint.model.wte.weight.device)
        report |= scoring.per_token(*split_sums(checkpoint.model, data, split, batch_size, device))
    if conversations and not data.languages:
        trained = data.conversations("train")
        count = min(len(conversations), len(trained))
        chosen = sorted(np.random.default_rng(0).choice(len(trained), count, replace=False))
        some = [trained[row] for row in chosen]
        asked, _ = scoring.answer_all(checkpoint, conversations, sampling, batch_size, split)
        seen, _ = scoring.answer_all(checkpoint, some, sampling, batch_size, "seen")
        report |= scoring.score_answers(asked, seen, pairs_of(data, "train"))
    report["seconds"] = round(time.perf_counter() - began, 1)
    write(checkpoint, report, asked, seen)


def pairs_of(data: Dataset, split: str) -> list[tuple[str, str]]:
    """The last question and answer of each conversation."""
    return [(m[-2]["content"], m[-1]["content"]) for m in data.conversations(split)]


# --- a file of questions -----------------------------------------------------------------------


def evaluate_file(
    checkpoint: Checkpoint,
    records: list[dict],
    name: str,
    dataset: str | None,
    sampling: Sampling,
    batch_size: int,
) -> None:
    """Scores the answers to a file's questions: `sample.py --eval_mode`. References come from the
    file, else from the dataset; questions that have neither are counted and left out."""
    check_answers(checkpoint)
    data = known_questions(checkpoint, dataset, records)
    splits = sorted(data.tokens, key=lambda split: split == "train") if data else []
    known = {split: pairs_of(data, split) for split in splits}
    reference_of = {q: a for pairs in known.values() for q, a in pairs}  # train's last, they win
    conversations, unmatched = with_references(checkpoint, records, reference_of)
    if not conversations:
        raise UserError(f"no question of {name} has a reference")
    asked, sizes = scoring.answer_all(checkpoint, conversations, sampling, batch_size, "file")
    report, seen = {"dataset": name, "split": "file", "unmatched": unmatched} | sizes, None
    if data and data.languages:
        report |= scoring.score_translations(asked)
    else:
        trained = {question for question, _ in known.get("train", [])}
        seen = [record for record in asked if record["question"] in trained]
        report |= scoring.score_answers(asked, seen, known.get("train", []))
    write(checkpoint, report, asked, seen)


def known_questions(
    checkpoint: Checkpoint, name: str | None, records: list[dict]
) -> Dataset | None:
    """The dataset of questions that references come from; None if there is none and the file has
    all references."""
    try:
        data = dataset_of(checkpoint, name)
        if data.kind != "sft":
            raise UserError(f"{show_path(data.path)} has no answers; pass --dataset= of questions")
        return data
    except UserError:
        if name or not all(record.get("Answer") for record in records):
            raise
        return None


def with_references(
    checkpoint: Checkpoint, records: list[dict], reference_of: dict[str, str]
) -> tuple[list[list[dict]], int]:
    """Conversations of question and reference, as long as the model can read; and how many records
    have no reference."""
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
    return conversations, unmatched


# --- reports -----------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, report: dict, asked: list[dict], seen: list[dict] | None) -> None:
    scoring.write_report(checkpoint, report, asked, seen)
    if seen is not None:
        draw_histograms(checkpoint.out_dir, report, asked, seen)


def draw_histograms(out_dir: Path, report: dict, asked: list[dict], seen: list[dict]) -> None:
    groups = {report["split"]: asked, "trained questions": seen}
    for key, label, log_x in (
        ("rouge_l", "ROUGE-L of each answer, over characters", False),
        ("perplexity", "perplexity of each reference answer", True),
    ):
        values = {group: [r[key] for r in records] for group, records in groups.items()}
        title = f"{out_dir.name} on {report['dataset']}"
        draw_histogram(values, out_dir / f"{key}.png", title, label, log_x=log_x)


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if config.compare:
        datasets, split = config.datasets or TRANSLATIONS, config.split or "test"
        return compare(config.compare, datasets, split, config.examples, repo_path(config.out))
    split = config.split or "val"
    checkpoint = load_for_sampling(config.out_dir, config.device, config.quantize == "int8")
    data = dataset_of(checkpoint, config.dataset)
    if data.kind == "dpo":
        raise UserError(
            f"{show_path(data.path)} holds preferences, which train.py's log scores; pass "
            "--dataset= of questions or of text"
        )
    data.check(checkpoint.model.config.block_size, split)
    data.check_tokenizer(checkpoint.tokenizer, checkpoint.path)
    # greedy, whatever sampling takes by default
    sampling = dataclasses.replace(config, temperature=config.temperature or 0.0)
    evaluate(checkpoint, data, split, sampling, config.batch_size)


if __name__ == "__main__":
    command(main)
