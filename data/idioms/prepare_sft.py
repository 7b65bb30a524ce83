"""Idioms -> data/idioms_sft: what does it mean, where is it from, which one has this meaning?

    python data/fetch_data.py idioms
    python data/idioms/prepare_sft.py --tokenizer=data/sanguo
    python data/idioms/prepare_sft.py --n_idioms=None --val=0.02

An idiom and its variants (the same characters in another order, or named by its explanation: 同…)
lie in one split, so that no validation question is about what is trained. The table has lost the
opening quotation marks and the colons behind titles; they are restored, or the closing ones go.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import ROOT, UserError, at_least, command, configure
from miniglm.prep import pipeline
from miniglm.prep.forms import BadRecord, is_whole, split_of
from miniglm.prep.readers import Source, Tally, converted, find_sources
from miniglm.prep.similar import QuestionSettings, key_of, prepare_questions

NUMBER = "[一二三四五六七八九十百〇零]+"
ORIGIN = re.compile(rf"([^《》“”]*(?:《[^《》“”]+》)+(?:第{NUMBER}[回章折出卷]|卷{NUMBER})?)(.+)")
VARIANT = re.compile(r"(?:同|作|犹|犹言|见)([\u4e00-\u9fff]{4})(?=$|[。、，])")
RAW = "data/raw/idioms/idiom.csv"
COLUMNS = ("word", "explanation", "derivation")


@dataclass
class Settings(QuestionSettings):
    input: list[str] = field(default_factory=lambda: [RAW])  # the table
    out: str = "data/idioms_sft"  # directory to write
    tokenizer: str = "data/sanguo"  # gpt2, or a path: the pretrained model's
    val: float = 0.1  # share of the idioms for validation
    n_idioms: Annotated[int | None, at_least(1)] = 400  # evenly over the table; None: all


@dataclass(frozen=True)
class Idiom:
    word: str
    meaning: str
    origin: str = ""  # a title and a quotation from it


def idiom_of(row: object) -> Idiom:
    """The idiom of a row. Raises BadRecord if it has none, or no explanation."""
    if not isinstance(row, dict) or not {*COLUMNS} <= {*row}:
        raise BadRecord("missing field", f"it has no {' or '.join(COLUMNS)}")
    if not all(isinstance(row[name], str) and is_whole(row[name]) for name in COLUMNS):
        raise BadRecord("wrong type", f"not all of {', '.join(COLUMNS)} are intact texts")
    word, meaning, origin = (row[name].strip().removeprefix("无") for name in COLUMNS)
    if not word or not meaning:
        raise BadRecord("no idiom" if not word else "no explanation", word)
    return Idiom(word, clean(meaning), quotation(origin))


def clean(text: str) -> str:
    """Drops closing quotation marks that were never opened; ◇ begins a later meaning."""
    return text.replace("◇", "。") if "“" in text else text.replace("”", "").replace("◇", "。")


def quotation(origin: str) -> str:
    """《史记》沛公军霸上！” -> 《史记》：“沛公军霸上！”; "" if it is no quotation."""
    match = ORIGIN.fullmatch(origin)
    if not match or "《" in match[2] or "“" in match[2] or match[2].count("”") > 1:
        return ""
    text = match[2].replace("”", "")
    return f"{match[1]}：“{text}”" + ("" if text[-1:] in "。！？" else "。")


def groups_of(idioms: list[Idiom]) -> dict[str, str]:
    """word -> the first of its variants, for each idiom."""
    first = {idiom.word: idiom.word for idiom in idioms}

    def root(word: str) -> str:
        while first[word] != word:
            first[word] = word = first[first[word]]
        return word

    same = defaultdict(list)
    for idiom in idioms:
        same["".join(sorted(idiom.word))].append(idiom.word)
        same[idiom.meaning].append(idiom.word)
        for other in VARIANT.findall(idiom.meaning):
            if other in first:
                same[other] += [other, idiom.word]
    for words in same.values():
        for word in words[1:]:
            first[root(word)] = root(words[0])
    return {word: root(word) for word in first}


def questions(idiom: Idiom) -> Iterator[list[dict]]:
    pairs = [(f"“{idiom.word}”是什么意思？", f"“{idiom.word}”的意思是：{idiom.meaning}")]
    if idiom.origin:
        pairs.append((f"“{idiom.word}”出自哪里？", f"“{idiom.word}”出自{idiom.origin}"))
    if idiom.word not in idiom.meaning:
        pairs.append((f"哪个成语的意思是“{idiom.meaning}”？", f"这个成语是“{idiom.word}”。"))
    for question, answer in pairs:
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read(groups: dict[str, str], config: Settings, source: Source, tally: Tally) -> pipeline.Reads:
    """The questions about the idioms in groups, in the split of their first variant."""
    for idiom in converted(source, tally, idiom_of):
        if idiom.word in groups:
            split = split_of(groups[idiom.word], config.val)
            yield from ((split, turns) for turns in questions(idiom))
        else:
            tally.aside["beyond --n_idioms"] += 1


def find_idioms(config: pipeline.Settings) -> tuple[list[Source], dict[str, str]]:
    """The tables, and the groups of their idioms."""
    pipeline.refuse_fields(config)
    if config.input == [RAW] and not (ROOT / RAW).is_file():
        raise UserError(f"{RAW} is missing; run python data/fetch_data.py idioms")
    sources, tally = find_sources(config.input, config.encoding), Tally(quiet=True)
    idioms = (idiom for source in sources for idiom in converted(source, tally, idiom_of))
    return sources, groups_of([*idioms])


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    sources, groups = find_idioms(config)
    if config.n_idioms is not None:
        chosen = sorted(groups, key=lambda word: key_of(groups[word]))[: config.n_idioms]
        groups = {word: groups[word] for word in chosen}
    splits = pipeline.splits_of(config.val)  # idioms are split, not rows
    prepare_questions(config, partial(read, groups), sources, splits)


if __name__ == "__main__":
    command(main)
