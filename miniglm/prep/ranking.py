"""A model's own answers -> preferences: several to a source, ranked, the best against the worst.

    samples.jsonl   in the dataset's folder: a header that describes the run, then a line a source,
                    {"split", "source", "reference", "samples", "ended"}
    scores.jsonl    with --rank=comet: the same header, then COMET's {"scores"} of each line

Training pairs come from sources of the training split, held-out ones from the validation split.
The model was fine-tuned on the former, so pairs from there would say too little about other
sentences; of the latter it has read none, at most they have chosen its `best`. The test split is
not touched. Both files are appended to; an interrupted command resumes and ends in the same bytes.
A sample's random numbers depend on the seed, its source's place and its own number; rounding also
depends on the rows beside it, so sources are sampled in rounds; an unfinished round starts over.
"""

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm

from configurator import UserError, above, at_least, locked, repo_path, show_path
from data_utils import Dataset
from miniglm import comet, jsonl
from miniglm.checkpoint import Checkpoint
from miniglm.generation import Sampling
from miniglm.metrics import sentence
from miniglm.prep import preferences
from miniglm.prep.preferences import best_and_worst, usable
from miniglm.prep.writer import Form, Records
from miniglm.text import check_answers, complete, dataset_of, fingerprint, load_for_sampling
from miniglm.tokenizer import Tokenizer

ROUND = 16  # batches of samples that are begun together; at their end rows stay empty
CHUNK = 64  # sources whose samples COMET scores before they are written down


@dataclass
class Settings(Sampling):
    out_dir: str = "out"  # the model whose answers are ranked
    out: str = ""  # directory to write
    dataset: str | None = None  # of questions with references; None is what it was trained on
    max_tokens: int = 256  # longest conversation; the model's block_size if that is smaller
    n_sources: Annotated[int, at_least(1)] = 2000  # of the training split, for training pairs
    n_val: Annotated[int, at_least(1)] = 200  # of the validation split, for held-out pairs
    num_samples: Annotated[int, at_least(2)] = 4  # answers to each source
    # a translator of 4 million parameters had 7.4 chrF++ on average at 0.7, 5.4 at 1.0
    temperature: Annotated[float, above(0)] = 0.7  # of the samples
    seed: int = 1337  # of the samples, and of the choice of sources
    batch_size: Annotated[int, at_least(1)] = 64  # rows at once
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there
    rank: Literal["chrf", "comet"] = "chrf"  # by what
    model: str = comet.MODEL  # COMET's: a name on the hub, or a checkpoint
    # by 10 chrF++ 8 % of 511 sources gave a pair, by 5 25 %, by 3 53 %, of that translator
    margin: Annotated[float, at_least(0)] = 5.0  # points of score, of 100, between the two

    @property
    def folder(self) -> Path:
        return repo_path(self.out)

    @property
    def by(self) -> str:
        """Whose scores they are."""
        model = Path(self.model)  # of a file only its name: meta.json may be public
        name = model.name if model.exists() else self.model
        return f"COMET {name}" if self.rank == "comet" else "chrF++"


def prepare(config: Settings) -> None:
    """Samples the model of out_dir, ranks its answers, and writes the dataset."""
    # first, since it says at once what is missing
    model = comet.load_comet(config.model) if config.rank == "comet" else None
    checkpoint = load_for_sampling(config.out_dir, config.device)
    data, tokenizer = open_data(config, checkpoint), checkpoint.tokenizer
    sources, header = choose_sources(config, data), header_of(config, checkpoint, data)
    max_tokens = min(config.max_tokens, checkpoint.model.config.block_size)
    with locked(config.folder / "samples.jsonl"):
        lines = sample_all(config, checkpoint, sources, header)
        scores = comet_scores(config, model, lines, header) if model else chrf_scores(lines)
    pairs, counts = rank(config, tokenizer, lines, scores, max_tokens)
    # the texts' own sources and languages: their terms hold for what is made of them, too
    more_meta = {name: data.meta[name] for name in ("sources", "languages") if name in data.meta}
    more_meta |= {
        "dataset": show_path(data.path),
        "model": show_path(checkpoint.path),
        "samples": header,
        "rank": config.by,
        "margin": config.margin,
        "pairs_from": counts,
    }
    form = Form("dpo", max_tokens)
    preferences.write(config.folder, tokenizer, pairs, form, lambda: more_meta)


def prompt_of(line: dict) -> list[dict]:
    return [{"role": "user", "content": line["source"]}]


# --- sources -------------------------------------------------------------------------------------


def open_data(config: Settings, checkpoint: Checkpoint) -> Dataset:
    """The questions to ask, if the model can answer them."""
    check_answers(checkpoint)
    data = dataset_of(checkpoint, config.dataset)
    if data.kind != "sft":
        raise UserError(
            f"{show_path(data.path)} has no questions with references; pass --dataset=, such as "
            "finance_sft"
        )
    for split in ("train", "val"):
        data.check(checkpoint.model.config.block_size, split)
    data.check_tokenizer(checkpoint.tokenizer, checkpoint.path)
    return data


def choose_sources(config: Settings, data: Dataset) -> list[dict]:
    """Lines {"split", "source", "reference"}: n_val of the validation split, then n_sources of the
    training split, each time those with the smallest hashes, in their order."""
    trained, held_out = (references(data, split) for split in ("train", "val"))
    held_out = {source: held_out[source] for source in held_out if source not in trained}
    if not (trained and held_out):
        raise UserError(
            f"{show_path(data.path)} has no question of one turn in train, or none in val that is "
            "not in train, too; pass another --dataset="
        )

    def place(source: str) -> bytes:
        return hashlib.sha256(f"{config.seed} {source}".encode()).digest()

    splits = [("val", held_out, config.n_val), ("train", trained, config.n_sources)]
    return [
        {"split": split, "source": source, "reference": reference_of[source]}
        for split, reference_of, count in splits
        for source in heapq.nsmallest(count, reference_of, key=place)
    ]


def references(data: Dataset, split: str) -> dict[str, str]:
    """Source -> reference of a split's conversations of one turn."""
    conversations = data.conversations(split)
    pairs = [turns for turns in conversations if len(turns) == 2]
    if len(pairs) < len(conversations):
        print(f"{split}: {len(conversations) - len(pairs):,} conversations of several turns unused")
    return {ask["content"]: answer["content"] for ask, answer in reversed(pairs)}


# --- samples -------------------------------------------------------------------------------------


def sample_all(
    config: Settings, checkpoint: Checkpoint, sources: list[dict], header: dict
) -> list[dict]:
    """The sources with their samples: those of samples.jsonl, to which the missing ones are
    appended. Raises UserError if it was begun with other settings or another model."""
    path = config.folder / "samples.jsonl"
    lines = jsonl.resume(path, header)
    size = max(1, ROUND * config.batch_size // config.num_samples)
    if len(lines) < len(sources):
        del lines[len(lines) // size * size :]
        jsonl.write(path, [header, *lines])
    bar = tqdm(desc="sampling", total=len(sources), initial=len(lines), unit="source")
    for first in range(len(lines), len(sources), size):
        part = sources[first : first + size]
        prompts = [checkpoint.tokenizer.render_prompt(prompt_of(line)) for line in part]
        outputs = complete(
            checkpoint, prompts, config, config.num_samples, config.batch_size, first
        )
        for line, samples in zip(part, outputs, strict=True):
            # stripped, as all messages are kept
            texts, ended = [s.text.strip() for s in samples], [s.ended for s in samples]
            lines.append(line | {"samples": texts, "ended": ended})
            jsonl.append(path, lines[-1:])
            bar.update()
    bar.close()
    return lines


def header_of(config: Settings, checkpoint: Checkpoint, data: Dataset) -> dict:
    """What the samples depend on. On batch_size, too: rows of another batch are rounded a little
    differently, by which 8 of 1,440 samples of a translator took another turn."""
    names, splits = ("n_val", "n_sources", "num_samples", "batch_size"), data.meta["splits"]
    settings = {name: getattr(config, name) for name in names}
    fingerprints = [splits[split]["fingerprint"] for split in ("train", "val")]
    return fingerprint(checkpoint, config) | settings | {"dataset_fingerprints": fingerprints}


# --- pairs ---------------------------------------------------------------------------------------


def comet_scores(config: Settings, model: object, lines: list[dict], header: dict) -> list[list]:
    """COMET's scores of each line's samples, of 100: those of scores.jsonl, to which the missing
    ones are appended."""
    path = config.folder / "scores.jsonl"
    scored = jsonl.resume(path, header | {"rank": config.by})
    for first in tqdm(range(len(scored), len(lines), CHUNK), "COMET"):
        part = lines[first : first + CHUNK]
        texts = [
            (line["source"], text, line["reference"]) for line in part for text in line["samples"]
        ]
        scores = iter(comet.predict(model, texts, config.batch_size, progress_bar=False))
        new = [{"scores": [round(100 * next(scores), 4) for _ in line["samples"]]} for line in part]
        jsonl.append(path, new)
        scored += new
    return [line["scores"] for line in scored]


def chrf_scores(lines: list[dict]) -> list[list[float]]:
    """chrF++ of each line's samples, of 100."""
    return [[round(sentence("chrf", s, x["reference"]), 4) for s in x["samples"]] for x in lines]


def rank(
    config: Settings, tokenizer: Tokenizer, lines: list[dict], scores: list[list], max_tokens: int
) -> tuple[Records, dict[str, dict]]:
    """(split, pair) of the sources that give one; and for meta.json, by split, how many do and why
    the others do not. Raises UserError if a split has no pair."""
    pairs, counts = [], {"train": Counter(), "val": Counter()}
    for line, line_scores in zip(lines, scores, strict=True):
        prompt = prompt_of(line)
        answers = zip(line["samples"], line_scores, line["ended"], strict=True)
        pair, why = best_and_worst(*usable(prompt, answers, tokenizer, max_tokens), config.margin)
        counts[line["split"]][why or "pairs"] += 1
        if pair:
            pairs.append((line["split"], (prompt, *pair)))
    for split, count in counts.items():
        words = ", ".join(f"{n:,} {what}" for what, n in count.most_common())
        print(f"{split}: {count.total():,} sources: {words}")
        if not count["pairs"]:
            raise UserError(
                f"no source of the {split} split gave a pair; lower --margin=, or raise "
                "--num_samples= or --temperature="
            )
    return pairs, {split: {"sources": c.total()} | c for split, c in counts.items()}
