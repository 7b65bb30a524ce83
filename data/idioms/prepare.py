"""Idioms -> data/idioms: what each means and where it comes from, as texts.

    python data/fetch_data.py idioms
    python data/idioms/prepare.py --tokenizer=data/sanguo

A text is an idiom with its meaning and, if the table has one, the quotation it comes from. The
same idioms are validation as in prepare_sft.py, so that a model which learns both has not read what
it will be asked.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from data.idioms.prepare_sft import RAW, find_idioms, idiom_of
from miniglm.prep import pipeline
from miniglm.prep.forms import split_of
from miniglm.prep.readers import Source, Tally, converted


@dataclass
class Settings(pipeline.Settings):
    input: list[str] = field(default_factory=lambda: [RAW])  # the table
    out: str = "data/idioms"  # directory to write
    val: float = 0.1  # share of the idioms for validation


def read(groups: dict[str, str], config: Settings, source: Source, tally: Tally) -> pipeline.Reads:
    for idiom in converted(source, tally, idiom_of):
        lines = filter(None, [f"{idiom.word}：{idiom.meaning}", idiom.origin])
        yield split_of(groups[idiom.word], config.val), "\n".join(lines)


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    sources, groups = find_idioms(config)
    splits = pipeline.splits_of(config.val)  # idioms are split, not rows
    pipeline.prepare(config, partial(read, groups), "pretrain", sources, splits)


if __name__ == "__main__":
    command(main)
