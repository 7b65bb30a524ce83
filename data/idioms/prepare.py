"""Idioms -> data/idioms: what each means and where it comes from, as texts.

    python data/fetch_data.py idioms
    python data/idioms/prepare.py --tokenizer=data/sanguo

A text is an idiom with its meaning and, where the table has one, a quotation that it comes from.
Validation has the idioms that it has in prepare_sft.py, so that a model which learns both has not
read what it will be asked.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from data.idioms.prepare_sft import RAW, find_table, groups_of, idiom_of
from miniglm.prep import pipeline
from miniglm.prep.forms import Record, is_validation
from miniglm.prep.readers import Source, Tally, converted


@dataclass
class Settings(pipeline.Settings):
    input: list[str] = field(default_factory=lambda: [RAW])  # the table
    out: str = "data/idioms"  # directory to write
    val: float = 0.1  # share of the idioms for validation


def read(
    source: Source, tally: Tally, groups: dict[str, str], val: float
) -> Iterator[tuple[str, Record]]:
    for idiom in converted(source, tally, idiom_of):
        split = "val" if is_validation(groups[idiom.word], val) else "train"
        yield split, "\n".join(filter(None, [f"{idiom.word}：{idiom.meaning}", idiom.origin]))


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    sources, tally = find_table(config), Tally(show=0)
    groups = groups_of([one for source in sources for one in converted(source, tally, idiom_of)])
    pipeline.prepare(config, sources, partial(read, groups=groups, val=config.val), "pretrain")


if __name__ == "__main__":
    command(main)
