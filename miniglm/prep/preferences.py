"""Preferences -> a dataset: two answers to one prompt, one of them the better.

    {"prompt", "chosen", "rejected"}               a pair; texts or messages
    {"chosen": messages, "rejected": messages}     MiniMind's form of it
    {"conversations", "chosen", "rejected"}        LLaMA-Factory's: the prompt's turns, two more
    {"instruction", "output": [best, ..., worst]}  the first and the last
    {"prompt", "chosen"} or {"prompt", "rejected"} a mark of the chat page: the first chosen and the
                                                   first rejected answer to a prompt are a pair,
                                                   then the second ones
    {"prompt", "completion", "label": true}        a mark, too; false: rejected
    {"prompt", "ranked": [best, ..., worst]}       answers in their order: the first and the last
    {"prompt", "samples": [...], "scores": [...]}  answers with scores, higher is better

The last two are for `read_ranked`; there "source" is another name of "prompt", "ended" says of each
answer whether it is complete, and "split" is train or val. Other pairs are split by the hash of
their first question. How training uses pairs is in miniglm/objectives.py.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from configurator import UserError, at_least, below, repo_path
from miniglm.prep.forms import BadRecord, Preference, fields_of, is_whole, preference, split_of
from miniglm.prep.pipeline import print_meta, splits_of
from miniglm.prep.readers import Source, Tally, converted, find_sources
from miniglm.prep.writer import Form, Kind, Pair, Records
from miniglm.prep.writer import write as write_dataset
from miniglm.tokenizer import Tokenizer, load_tokenizer

SHOWN = 3  # pairs


@dataclass
class Settings:
    input: list[str] = field(default_factory=list)  # files, folders, globs: a,b
    val: Annotated[float, at_least(0), below(1)] = 0.1  # share of the prompts for validation
    name: str = "mine_dpo"  # the dataset's name under data/
    out: str = ""  # directory to write; empty: data/NAME
    tokenizer: str = "data/sanguo_sft"  # a path: that of the model to train
    max_tokens: Annotated[int, at_least(1)] = 256  # of a conversation; at most block_size
    encoding: str = "auto"  # of all files: utf-8, gb18030, big5, utf-16
    strict: bool = False  # stop at the first bad record


Read = Callable[[Settings, list[Source], Tokenizer, Tally], Records]


def prepare(config: Settings, words: list[str], read: Read, kind: Kind = "dpo") -> None:
    """Files -> the dataset. They are all read in one process, since marks that belong together may
    lie in several files."""
    sources = find_sources(words, config.encoding)
    tokenizer, tally = load_tokenizer(config.tokenizer), Tally(config.strict)
    records = read(config, sources, tokenizer, tally)
    names = [source.name for source in sources]
    form = Form(kind, config.max_tokens, splits=splits_of(config.val), is_share=True)
    out = repo_path(config.out or f"data/{config.name}")
    write(out, tokenizer, records, form, lambda: {"sources": names} | tally.meta())
    print(f"{tally.good:,} good records{tally.summary()}")


def write(
    out: Path, tokenizer: Tokenizer, pairs: Records, form: Form, more_meta: Callable[[], dict]
) -> None:
    """Writes the pairs, and prints the first ones and what the dataset holds. more_meta: called
    when all are read, for what else goes into meta.json."""
    shown = []

    def noted() -> Records:
        for split, pair in pairs:
            if split == "train" and len(shown) < SHOWN:
                shown.append(pair)
            yield split, pair

    meta = write_dataset(out, tokenizer, noted(), form, more_meta)
    for prompt, *answers in shown:
        print(prompt[-1]["content"])
        for word, answer in zip(("better:", "worse: "), answers, strict=True):
            if answer is not None:
                print(f"    {word} {answer}")
    print_meta(out, meta)


# --- pairs, and marks that become pairs ----------------------------------------------------------


def read_pairs(config: Settings, sources: list[Source], _: Tokenizer, tally: Tally) -> Records:
    values = (value for source in sources for value in converted(source, tally, preference))
    for pair in matched(values, tally):
        yield split_of(pair[0], config.val), pair


def read_marks(config: Settings, sources: list[Source], _: Tokenizer, tally: Tally) -> Records:
    """Each answer by itself; a pair has two."""
    for source in sources:
        for prompt, good, bad in converted(source, tally, preference):
            marks = (prompt, good, None), (prompt, None, bad)
            yield from ((split_of(prompt, config.val), mark) for mark in marks if any(mark[1:]))


def matched(preferences: Iterable[Preference], tally: Tally) -> Iterator[Pair]:
    """Preferences -> pairs: an answer that is marked alone waits for one of the other kind."""
    waiting, paired = {}, False  # prompt -> chosen answers, rejected answers
    for prompt, *answers in preferences:
        if None in answers:
            side = answers.index(None)  # the one that is missing
            sides = waiting.setdefault(json.dumps(prompt), ([], []))
            if not sides[side]:
                sides[1 - side].append(answers[1 - side])
                continue
            answers[side] = sides[side].pop(0)
        yield prompt, *answers
        paired = True
    alone = sum(len(answers) for sides in waiting.values() for answers in sides)
    if alone and not paired:
        raise UserError(
            f"no pair: no prompt of the {alone} marked answers has a good and a bad one; "
            "--one_sided takes each by itself"
        )
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
    """The best and the worst of each record's answers, if their scores differ by margin."""
    for item in (item for source in sources for item in converted(source, tally, ranked)):
        answers = zip(item.texts, item.scores, item.ended, strict=True)
        scores, faults = usable(item.prompt, answers, tokenizer, config.max_tokens)
        pair, why = best_and_worst(scores, faults, margin if item.scored else 0.0)
        split = item.split or split_of(item.prompt, config.val)
        if pair and split in splits_of(config.val):
            yield split, (item.prompt, *pair)
        else:
            tally.aside[why or "held out by their split"] += 1


def ranked(value: object) -> Ranked:
    """Several answers to a prompt, and their order. Raises BadRecord if a record has none."""
    record = fields_of(value)
    prompt = record.get("prompt", record.get("source"))
    texts = record.get("ranked", record.get("samples"))
    if prompt is None or texts is None:
        raise BadRecord("missing field", f"it has {', '.join(record) or 'none'}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRecord("wrong type", "the answers are no list of texts")
    if len(texts) < 2:
        raise BadRecord("fewer than two answers")
    if "scores" not in record and "ranked" not in record:
        raise BadRecord("no scores", "samples are in no order")  # just as they were sampled
    scores = record.get("scores", [*range(len(texts), 0, -1)])
    ended = record.get("ended", [True] * len(texts))
    for name, values, types in (("scores", scores, (int, float)), ("ended", ended, (bool,))):
        if not isinstance(values, list) or len(values) != len(texts):
            raise BadRecord("wrong type", f"{name} are not one for each answer")
        # nan and inf are no scores either
        if not all(type(v) in types and abs(v) <= sys.float_info.max for v in values):
            raise BadRecord("wrong type", f"{name} are {values}")
    if record.get("split", "train") not in ("train", "val"):
        raise BadRecord("unknown split", record["split"])
    prompt, *_ = preference({"prompt": prompt, "chosen": "."})  # its messages, in any form
    texts = [text.replace("\r\n", "\n").strip() for text in texts]
    scores = [float(score) for score in scores]
    return Ranked(prompt, texts, ended, scores, "scores" in record, record.get("split"))


def usable(
    prompt: list[dict], answers: Iterable[tuple], tokenizer: Tokenizer, max_tokens: int
) -> tuple[dict[str, float], Counter]:
    """Of answers (text, score, whether it ended) the scores of the distinct texts that can be a
    side of a pair, and how many cannot, by reason.

    An unfinished one cannot: training would give it an end that it never had. Nor is one cut to
    fit, since half a translation is no translation."""
    good, faults = {}, Counter()
    for text, score, has_ended in answers:
        if not has_ended:
            faults["unfinished"] += 1
        elif not text.strip():
            faults["empty"] += 1
        elif "\ufffd" in text or not is_whole(text):
            faults["broken characters"] += 1
        elif text not in good:
            answer = {"role": "assistant", "content": text}
            if len(tokenizer.render([*prompt, answer])[0]) <= max_tokens:
                good[text] = score
            else:
                faults["longer than --max_tokens"] += 1
    return good, faults


def best_and_worst(
    scores: dict[str, float], faults: Counter, margin: float
) -> tuple[tuple[str, str] | None, str]:
    """The answers with the highest and the lowest score, if these differ by margin; else None, and
    why. faults: of the answers without a score."""
    if len(scores) < 2:
        return None, faults.most_common(1)[0][0] if faults else "equal"
    best, worst = max(scores, key=scores.get), min(scores, key=scores.get)
    gap = scores[best] - scores[worst]
    return ((best, worst), "") if gap >= margin and gap > 0 else (None, "too alike")
