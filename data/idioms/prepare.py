"""Idioms -> data/idioms: what each means and where it comes from, as texts.

    python data/fetch_data.py idioms
    python data/idioms/prepare.py --tokenizer=data/sanguo

A text is an idiom with its meaning and, where the table has one, a quotation that it comes from.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from data import pipeline
from data.forms import Record, is_validation
from data.idioms.prepare_sft import RAW, find_table, idiom_of
from data.readers import Source, Tally, converted


@dataclass
class Settings(pipeline.Settings):
    input: list[str] = field(default_factory=lambda: [RAW])  # the table
    out: str = "data/idioms"  # directory to write


def read(source: Source, tally: Tally, val: float) -> Iterator[tuple[str, Record]]:
    for idiom in converted(source, tally, idiom_of):
        split = "val" if is_validation(idiom.word, val) else "train"
        yield split, "\n".join(filter(None, [f"{idiom.word}：{idiom.meaning}", idiom.origin]))


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    pipeline.prepare(config, find_table(config), partial(read, val=config.val), "pretrain")


if __name__ == "__main__":
    command(main)
