"""Preferences -> a dataset: two answers to one prompt, of which one is the better.

    {"prompt", "chosen", "rejected"}               a pair; texts or messages
    {"chosen": messages, "rejected": messages}     MiniMind's form of it
    {"prompt", "chosen"} or {"prompt", "rejected"} a mark of the chat page: the first chosen and the
                                                   first rejected answer to a prompt are a pair,
                                                   then the second ones
    {"prompt", "ranked": [best, ..., worst]}       answers in their order: the first and the last
    {"prompt", "samples": [...], "scores": [...]}  answers with scores, higher is better

The last two are for `read_ranked`, where "source" serves as "prompt", "ended" says of each answer
whether it is whole, and "split" is train or val. Other pairs are validation by the hash of their
first question. What training does with pairs is in miniglm/objectives.py.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from configurator import UserError, repo_path
from miniglm.prep.forms import BadRecord, Preference, is_validation, is_whole, preference
from miniglm.prep.pipeline import print_meta
from miniglm.prep.readers import Source, Tally, converted, find_sources
from miniglm.prep.writer import Form, Pair, merge, working_folder, write_unit
from miniglm.tokenizer import Tokenizer, load_tokenizer

SHOWN = 3  # pairs


@dataclass
class Settings:
    input: list[str] = field(default_factory=list)  # files, folders, globs: a,b
    val: float = 0.1  # share of the prompts for validation
    name: str = ""  # the dataset's name under data/
    out: str = ""  # directory to write; empty: data/NAME
    tokenizer: str = ""  # where one lies: that of the model to train
    max_tokens: int = 256  # longest conversation; a model's block_size must not be smaller
    encoding: str = "auto"  # of all files: utf-8, gb18030, big5, utf-16
    strict: bool = False  # stop at the first bad record

    def __post_init__(self):
        if not 0 < self.val < 1:
            raise UserError(f"val={self.val} must lie between 0 and 1")

    @property
    def folder(self) -> Path:
        """Where the dataset goes."""
        return repo_path(self.out or f"data/{self.name}")


Records = Iterable[tuple[str, Pair]]  # (split, pair)
Read = Callable[[Settings, list[Source], Tokenizer, Tally], Records]


def prepare(config: Settings, words: list[str], read: Read) -> None:
    """Files -> the dataset. All is read in one process, since marks that belong together may lie
    in several files."""
    sources = find_sources(words, config.encoding)
    tokenizer, tally = load_tokenizer(config.tokenizer), Tally(config.strict)
    records = read(config, sources, tokenizer, tally)

    def more_meta() -> dict:
        return {"sources": [source.name for source in sources]} | tally.meta()

    meta = write(config.folder, config.max_tokens, records, tokenizer, more_meta)
    print(f"{tally.good:,} good records{tally.summary()}")
    print_meta(config.folder, meta)


def write(
    out: Path,
    max_tokens: int,
    records: Records,
    tokenizer: Tokenizer,
    more_meta: Callable[[], dict],
) -> dict:
    """Writes (split, pair), shows the first ones, and returns meta.json. more_meta: what else that
    says, once all are read."""
    form, shown = Form("dpo", max_tokens), []

    def seen() -> Records:
        for split, pair in records:
            if split == "train" and len(shown) < SHOWN:
                shown.append(pair)
            yield split, pair

    with working_folder(out) as folder:
        unit = folder / "unit"
        skipped = write_unit(unit, seen(), tokenizer, form)
        meta = merge(out, [unit], skipped, tokenizer, form, more_meta())
    for prompt, chosen, rejected in shown:
        print(f"{prompt[-1]['content']}\n    better: {chosen}\n    worse:  {rejected}")
    return meta


def split_of(prompt: list[dict], share: float) -> str:
    return "val" if is_validation(prompt, share) else "train"


# --- pairs, and marks that become pairs ----------------------------------------------------------


def read_pairs(config: Settings, sources: list[Source], _: Tokenizer, tally: Tally) -> Records:
    found = (one for source in sources for one in converted(source, tally, preference))
    for pair in matched(found, tally):
        yield split_of(pair[0], config.val), pair


def matched(found: Iterable[Preference], tally: Tally) -> Iterator[Pair]:
    """Preferences -> pairs: an answer that is marked alone waits for one of the other kind."""
    waiting = {}  # prompt -> answers, chosen and rejected
    for prompt, *answers in found:
        if None in answers:
            side = answers.index(None)  # the one that is wanted
            sides = waiting.setdefault(json.dumps(prompt), ([], []))
            if not sides[side]:
                sides[1 - side].append(answers[1 - side])
                continue
            answers[side] = sides[side].pop(0)
        yield prompt, *answers
    alone = sum(len(answers) for sides in waiting.values() for answers in sides)
    if alone:
        tally.aside["without a counterpart"] += alone


# --- several answers to one prompt ---------------------------------------------------------------


@dataclass
class Ranked:
    prompt: list[dict]
    texts: list[str]
    ended: list[bool]
    scores: list[float]
    scored: bool  # else the scores are places, and no margin is asked of them
    split: str | None = None


def read_ranked(
    config: Settings, sources: list[Source], tokenizer: Tokenizer, tally: Tally, margin: float = 0.0
) -> Records:
    """The first and the last of each record's answers, where their scores differ by margin."""
    for source in sources:
        for one in converted(source, tally, ranked):
            texts, faults = usable(one.prompt, one.texts, one.ended, tokenizer, config.max_tokens)
            score_of = dict(zip(reversed(one.texts), reversed(one.scores), strict=True))
            scores = {text: score_of[text] for text in texts}
            pair, why = best_and_worst(scores, faults, margin if one.scored else 0.0)
            if pair:
                yield one.split or split_of(one.prompt, config.val), (one.prompt, *pair)
            else:
                tally.aside[why] += 1


def ranked(value: object) -> Ranked:
    """What a record says of several answers to a prompt. BadRecord where it says no order."""
    if not isinstance(value, dict):
        raise BadRecord("wrong type", f"{type(value).__name__}, not an object")
    record = {str(key).strip().lower(): part for key, part in value.items()}
    asked = record.get("prompt", record.get("source"))
    texts = record.get("ranked", record.get("samples"))
    if asked is None or texts is None:
        raise BadRecord("missing field", f"it has {', '.join(record) or 'none'}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRecord("wrong type", "the answers are no list of texts")
    if len(texts) < 2:
        raise BadRecord("fewer than two answers")
    if "scores" not in record and "ranked" not in record:
        raise BadRecord("no scores", "samples are in no order")  # as a sampler has left them
    scores = record.get("scores", [*range(len(texts), 0, -1)])
    ended = record.get("ended", [True] * len(texts))
    for name, values, kind in (("scores", scores, (int, float)), ("ended", ended, bool)):
        if not isinstance(values, list) or len(values) != len(texts):
            raise BadRecord("wrong type", f"{name} are not one for each answer")
        if not all(isinstance(v, kind) and isinstance(v, bool) == (kind is bool) for v in values):
            raise BadRecord("wrong type", f"{name} are {values}")
    try:
        scores = [float(score) for score in scores]
    except OverflowError:
        raise BadRecord("wrong type", "a score is too large") from None
    if any(score != score for score in scores):
        raise BadRecord("wrong type", "a score is no number")
    if record.get("split", "train") not in ("train", "val"):
        raise BadRecord("unknown split", record["split"])
    prompt, *_ = preference({"prompt": asked, "chosen": "."})  # its messages, whatever its form
    texts = [text.replace("\r\n", "\n").strip() for text in texts]
    return Ranked(prompt, texts, ended, scores, "scores" in record, record.get("split"))


def usable(
    prompt: list[dict], texts: list[str], ended: list[bool], tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[str], Counter]:
    """The different answers that can be a side of a pair, and how many cannot, by reason.

    An unfinished one is no side at all: as an answer it would be given an end that it never had.
    Nor is one cut to fit, since half a translation is none."""
    good, faults = {}, Counter()
    for text, has_ended in zip(texts, ended, strict=True):
        if not has_ended:
            faults["unfinished"] += 1
        elif not text.strip():
            faults["empty"] += 1
        elif "\ufffd" in text or not is_whole(text):
            faults["broken characters"] += 1
        elif text not in good:
            answer = {"role": "assistant", "content": text}
            if len(tokenizer.render([*prompt, answer])[0]) <= max_tokens:
                good[text] = None
            else:
                faults["longer than --max_tokens"] += 1
    return [*good], faults


def best_and_worst(
    scores: dict[str, float], faults: Counter, margin: float
) -> tuple[tuple[str, str] | None, str]:
    """The answers with the highest and the lowest score, if they differ by margin; else None, and
    why. faults: of the answers that have no score."""
    if len(scores) < 2:
        return None, faults.most_common(1)[0][0] if faults else "equal"
    best, worst = max(scores, key=scores.get), min(scores, key=scores.get)
    gap = scores[best] - scores[worst]
    return ((best, worst), "") if gap >= margin and gap > 0 else (None, "too alike")
