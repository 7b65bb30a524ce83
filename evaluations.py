"""Scores of a model: perplexity, bits per byte; of answers ROUGE-L, of translations BLEU; reports.

    python evaluations.py --out_dir=out-sanguo
    python evaluations.py --out_dir=out-sanguo-sft --split=val
    python evaluations.py --out_dir=out-translate-sft --dataset=finance_sft --split=test

Into the out_dir go evaluation.json and, of questions and translations, answers.jsonl, both with a
copy named after dataset and split; of questions also answers-seen.jsonl and histograms. Scores of
translations are miniglm/translation_scores.py's, drawing is visualize.py's.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rouge import Rouge
from tqdm import tqdm

import sample
from configurator import UserError, command, configure, show_path, written_aside
from data_utils import IGNORE, Dataset, collate, open_dataset
from miniglm.checkpoint import Checkpoint
from miniglm.devices import to_device
from miniglm.generation import Sampling
from miniglm.losses import split_sums, target_losses
from miniglm.prep.writer import fit
from miniglm.text import complete, load_for_sampling
from miniglm.tokenizer import Tokenizer
from miniglm.translation_scores import corpus_scores, report_name
from model import pick_device
from visualize import draw_histogram

ROUGE = Rouge(metrics=["rouge-l"], exclusive=False)  # its default counts unique characters only
LONGEST_FOR_ROUGE = 400  # characters of both texts; the package recurses once for each
FULL_STOP = "\ue000"  # the package would split sentences at "."


@dataclass
class Settings(Sampling):
    out_dir: str = "out"  # of the model
    dataset: str | None = None  # a name under data/, or a path; None is what it was trained on
    split: str = "val"  # val, train, or what else the dataset has, as test
    batch_size: int = 32  # rows at once
    quantize: Literal["int8"] | None = None  # weights of 8 bits, on a CPU
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be 1 or more")


# --- scores of texts ---------------------------------------------------------------------------


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of characters, white space left out; 0 where one is
    empty (Lin, ROUGE, 2004)."""
    a, b = ("".join(text.split()).replace(".", FULL_STOP) for text in (answer, reference))
    if not a or not b:
        return 0.0
    if len(a) + len(b) <= LONGEST_FOR_ROUGE:
        return ROUGE.get_scores(" ".join(a), " ".join(b))[0]["rouge-l"]["f"]
    return 2 * lcs_length(a, b) / (len(a) + len(b))


def lcs_length(a: str, b: str) -> int:
    """Length of the longest common subsequence, a row of the table as the bits of an integer
    (Hyyrö, Bit-parallel LCS-length computation revisited, 2004)."""
    places = {}
    for i, char in enumerate(a):
        places[char] = places.get(char, 0) | 1 << i
    row = all_ones = (1 << len(a)) - 1
    for char in b:
        matches = row & places.get(char, 0)
        row = (row + matches | row - matches) & all_ones
    return len(a) - row.bit_count()


def ngrams(text: str, n: int) -> list[str]:
    return [text[i : i + n] for i in range(len(text) - n + 1)]


def distinct(texts: list[str], n: int = 2) -> float:
    """Share of the texts' character n-grams that are different (arXiv 1510.03055)."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def repeated(texts: list[str], n: int = 4) -> float:
    """Share of character n-grams that stood in the same text before."""
    grams = [ngrams(text, n) for text in texts]
    total = sum(map(len, grams))
    return (total - sum(len(set(g)) for g in grams)) / max(1, total)


def look_up(questions: list[str], known: list[tuple[str, str]]) -> list[str]:
    """For each question the answer of the known question that shares most character pairs."""
    exact = dict(reversed(known))
    known_pairs = [set(ngrams(question, 2)) for question, _ in known]

    def nearest(question: str) -> str:
        pairs = set(ngrams(question, 2))
        overlaps = [len(pairs & other) / max(1, len(pairs | other)) for other in known_pairs]
        return known[int(np.argmax(overlaps))][1]

    return [exact[q] if q in exact else nearest(q) for q in questions]


# --- scores of a model -------------------------------------------------------------------------


Ask = Callable[[Tokenizer, list[dict]], tuple[list[int], list[int]]]


def in_chat(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Ids that ask for the last answer, and those of the answer with its end token."""
    ids, prompt = tokenizer.render(messages)[0], tokenizer.render_prompt(messages[:-1])
    return prompt, ids[len(prompt) :]


def in_text(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """The same for a model that only continues texts and so has not learnt the chat format: as
    miniglm/prep/parallel.py writes them, the source in a line and its translation in the next."""
    source, target = (message["content"] for message in messages)
    prompt = [tokenizer.end_of_text, *tokenizer.encode(f"{source}\n")]
    return prompt, [*tokenizer.encode(target), tokenizer.end_of_text]


def reference_losses(
    checkpoint: Checkpoint, conversations: list[list[dict]], batch_size: int, ask: Ask = in_chat
) -> list[tuple[float, int, int]]:
    """For each conversation's last answer, its end token included: the sum of -log p in nats, its
    tokens, its UTF-8 bytes."""
    tokenizer, device = checkpoint.tokenizer, str(checkpoint.model.wte.weight.device)
    losses = []
    for first in range(0, len(conversations), batch_size):
        rendered = []
        for messages in conversations[first : first + batch_size]:
            prompt, answer = ask(tokenizer, messages)
            rendered.append((prompt + answer, [0] * len(prompt) + [1] * len(answer)))
        batch = collate(rendered)
        nats = target_losses(checkpoint.model, *to_device(batch, device)).cpu().double()
        for row, targets in zip(nats.sum(dim=1).tolist(), batch[1], strict=True):
            trained = targets[targets != IGNORE]
            losses.append((row, len(trained), int(tokenizer.bytes_per_id[trained].sum())))
    return losses


def answer_all(
    checkpoint: Checkpoint,
    conversations: list[list[dict]],
    config: Sampling,
    name: str,
    ask: Ask = in_chat,
) -> tuple[list[dict], dict]:
    """A record for each conversation: question, reference, the model's answer, the reference's
    perplexity; and per_token of all the references."""
    prompts = [ask(checkpoint.tokenizer, messages)[0] for messages in conversations]
    outputs = complete(checkpoint, prompts, config, 1, config.batch_size)
    answers = [out for [out] in tqdm(outputs, name, total=len(prompts), unit="answer")]
    losses = reference_losses(checkpoint, conversations, config.batch_size, ask)
    records = [
        {
            "question": messages[-2]["content"],
            "reference": messages[-1]["content"],
            "answer": answer.text,
            "perplexity": math.exp(nats / tokens),
            "ended": answer.ended,
        }
        for messages, answer, (nats, tokens, _) in zip(conversations, answers, losses, strict=True)
    ]
    return records, per_token(*(sum(column) for column in zip(*losses, strict=True)))


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def per_token(nats: float, tokens: int, n_bytes: int) -> dict[str, float]:
    """What evaluation.json says of the tokens scored, from the sum of their -log p."""
    return {
        "tokens": tokens,
        "bytes": n_bytes,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / n_bytes,
    }


def score_answers(asked: list[dict], seen: list[dict], known: list[tuple[str, str]]) -> dict:
    """What evaluation.json says of answers: asked is what was asked for, seen are trained ones.
    Each record gets its rouge_l."""
    for record in asked + seen:
        record["rouge_l"] = rouge_l(record["answer"], record["reference"])
    looked_up = look_up([r["question"] for r in asked], known) if known else []
    return {
        "n": len(asked),
        "rouge_l": mean([record["rouge_l"] for record in asked]),
        "n_seen": len(seen),
        "rouge_l_seen": mean([record["rouge_l"] for record in seen]),
        "rouge_l_lookup": mean(
            [rouge_l(text, r["reference"]) for text, r in zip(looked_up, asked, strict=bool(known))]
        ),
        "ended": mean([record["ended"] for record in asked]),
    } | lengths_and_repetition(asked)


def score_translations(asked: list[dict]) -> dict:
    """What evaluation.json says of translations. A look-up among tens of thousands of sentences
    would take minutes, and a sentence of the training set is no translation of another one."""
    return corpus_scores(asked) | lengths_and_repetition(asked)


def lengths_and_repetition(asked: list[dict]) -> dict:
    texts = [record["answer"] for record in asked]
    return {
        "distinct_2": distinct(texts),
        "repeated_4grams": repeated(texts),
        "answer_characters": mean([len(text) for text in texts]),
        "reference_characters": mean([len(record["reference"]) for record in asked]),
    }


def evaluate(checkpoint: Checkpoint, data: Dataset, config: Settings, device: str) -> None:
    """Scores the whole split and writes the reports."""
    began = time.perf_counter()
    report, asked, seen = {"dataset": data.name, "split": config.split}, [], None
    conversations = data.conversations(config.split) if data.kind == "sft" else []
    if conversations and data.languages:
        ask = in_chat if checkpoint.answers else in_text
        asked, sizes = answer_all(checkpoint, conversations, config, config.split, ask)
        report |= sizes | score_translations(asked)
    else:
        sums = split_sums(checkpoint.model, data, config.split, config.batch_size, device)
        report |= per_token(*sums)
        if conversations:
            trained = data.conversations("train")
            count = min(len(conversations), len(trained))
            chosen = sorted(np.random.default_rng(0).choice(len(trained), count, replace=False))
            asked, _ = answer_all(checkpoint, conversations, config, config.split)
            seen, _ = answer_all(checkpoint, [trained[row] for row in chosen], config, "seen")
            known = [(m[-2]["content"], m[-1]["content"]) for m in trained]
            report |= score_answers(asked, seen, known)
    report["seconds"] = round(time.perf_counter() - began, 1)
    write_reports(checkpoint, report, asked, seen)


def known_pairs(data: Dataset) -> dict[str, list[tuple[str, str]]]:
    """The last question and answer of each conversation of a dataset, train first."""
    if data.kind != "sft":
        raise UserError(f"{show_path(data.path)} has no answers; pass --dataset= of questions")
    splits = ("train", *(set(data.tokens) - {"train"}))
    return {
        split: [(m[-2]["content"], m[-1]["content"]) for m in data.conversations(split)]
        for split in splits
    }


def dataset_of(checkpoint: Checkpoint, config: sample.Settings) -> str:
    """The dataset that config names, else the one that the model was trained on."""
    name = config.dataset or checkpoint.run["settings"].get("dataset")
    if not name:
        raise UserError(f"{show_path(checkpoint.path)} names no dataset; pass --dataset=")
    return name


def evaluate_file(checkpoint: Checkpoint, config: sample.Settings, records: list[dict]) -> None:
    """Scores the answers to a file's questions. References come from the file, else from the
    dataset; questions that have neither are counted and left out."""
    if not config.start.startswith("FILE:"):
        raise UserError("--eval_mode takes its questions from a file; pass --start=FILE:x.jsonl")
    if not checkpoint.answers:
        raise UserError(
            f"{show_path(checkpoint.out_dir)} continues texts, it has learnt no answers; "
            "pass a fine-tuned model's --out_dir="
        )
    try:
        data = open_dataset(dataset_of(checkpoint, config))
        known, languages = known_pairs(data), data.languages
    except UserError:
        if config.dataset or not all(record["Answer"] for record in records):
            raise
        known, languages = {}, []  # the file has all references
    reference_of = {q: a for pairs in reversed(known.values()) for q, a in pairs}
    trained = {question for question, _ in known.get("train", [])}
    conversations, unmatched, too_long = [], 0, 0
    for record in records:
        answer = record["Answer"] or reference_of.get(record["Question"])
        if not (answer and answer.strip()):
            unmatched += 1
            continue
        messages = [
            {"role": "user", "content": record["Question"]},
            {"role": "assistant", "content": answer},
        ]
        fitted, how = fit(checkpoint.tokenizer, messages, checkpoint.model.config.block_size)
        too_long += bool(how)
        conversations += [fitted] if fitted else []
    print(f"{len(conversations)} questions; {unmatched} without a reference were left out")
    if too_long:
        print(f"{too_long} longer than block_size were cut, or left out")
    if not conversations:
        raise UserError(f"no question of {config.start} has a reference")
    asked, sizes = answer_all(checkpoint, conversations, config, "file")
    name = Path(config.start.removeprefix("FILE:")).stem
    report = {"dataset": name, "split": "file", "unmatched": unmatched} | sizes
    if languages:
        return write_reports(checkpoint, report | score_translations(asked), asked)
    seen = [record for record in asked if record["question"] in trained]
    report |= score_answers(asked, seen, known.get("train", []))
    write_reports(checkpoint, report, asked, seen)


# --- reports -----------------------------------------------------------------------------------


def write_reports(
    checkpoint: Checkpoint, report: dict, asked: list[dict], seen: list[dict] | None = None
) -> None:
    """evaluation.json and answers as JSON lines, each with a copy of its own name, and histograms;
    printed in short. asked: no answers where it is empty. seen: trained questions; None where
    there are no questions."""
    out_dir = checkpoint.out_dir
    report = {"checkpoint": checkpoint.path.name} | report
    name = report_name(report["dataset"], report["split"])
    answers, own = json_lines(asked), json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    texts = {"answers.jsonl": answers, f"answers-{name}.jsonl": answers} if asked else {}
    if seen is not None:
        texts["answers-seen.jsonl"] = json_lines(seen)
    for file, text in (texts | {"evaluation.json": own, f"evaluation-{name}.json": own}).items():
        with written_aside(out_dir / file) as path:
            path.write_text(text, encoding="utf-8")
    for key, value in report.items():
        print(f"{key:<20}  {value:.4g}" if isinstance(value, float) else f"{key:<20}  {value}")
    if seen is not None:
        draw_histograms(out_dir, report, asked, seen)
    print(f"written to {show_path(out_dir)}/evaluation.json")


def json_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def draw_histograms(out_dir: Path, report: dict, asked: list[dict], seen: list[dict]) -> None:
    groups = {str(report["split"]): asked, "trained questions": seen}
    for key, label, log_x in (
        ("rouge_l", "ROUGE-L of each answer, over characters", False),
        ("perplexity", "perplexity of each reference answer", True),
    ):
        values = {group: [r[key] for r in records] for group, records in groups.items()}
        title = f"{out_dir.name} on {report['dataset']}"
        draw_histogram(values, out_dir / f"{key}.png", title, label, log_x=log_x)


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    device = pick_device(config.device)
    checkpoint = load_for_sampling(config.out_dir, device, config.quantize == "int8")
    config.temperature = config.temperature or 0.0  # greedy, whatever sampling takes by default
    data = open_dataset(dataset_of(checkpoint, config))
    if data.kind == "dpo":
        raise UserError(
            f"{show_path(data.path)} holds preferences, which train.py's log scores; pass "
            "--dataset= of questions or of text"
        )
    data.check(checkpoint.model.config.block_size, config.split)
    data.check_tokenizer(checkpoint.tokenizer, checkpoint.path)
    evaluate(checkpoint, data, config, device)


if __name__ == "__main__":
    command(main)
