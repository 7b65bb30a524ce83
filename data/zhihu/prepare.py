"""Questions of Zhihu and their answers -> data/zhihu: as texts, the question before the answer.

    python data/zhihu/prepare.py --input='zhihu/*.parquet'
    python data/zhihu/prepare.py --input='zhihu/*.parquet' --keywords=金庸,武侠

A record is {"INSTRUCTION", "RESPONSE"}. With --keywords= only those that have one of them.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep import pipeline
from miniglm.prep.forms import Record, is_validation, parse_fields, text_of
from miniglm.prep.readers import Source, Tally, find_sources, records


@dataclass
class Settings(pipeline.Settings):
    out: str = "data/zhihu"  # directory to write
    keywords: list[str] = field(default_factory=list)  # a record has one of them; none: all


def read_conversations(
    source: Source, tally: Tally, fields: dict[str, str], keywords: list[str], val: float
) -> Iterator[tuple[str, Record]]:
    """Those with a keyword, if there are any; of one question all lie on one side."""
    for turns in records(source, tally, fields, want=list):
        text = text_of(turns)
        if keywords and not any(word in text for word in keywords):
            tally.aside["without a keyword"] += 1
            continue
        yield ("val" if is_validation(turns, val) else "train"), turns


def read(
    source: Source, tally: Tally, fields: dict[str, str], keywords: list[str], val: float
) -> Iterator[tuple[str, Record]]:
    for split, turns in read_conversations(source, tally, fields, keywords, val):
        yield split, text_of(turns)


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    sources = find_sources(config.input, config.encoding)
    fields = parse_fields(config.fields)
    chosen = partial(read, fields=fields, keywords=config.keywords, val=config.val)
    pipeline.prepare(config, sources, chosen, "pretrain", about={"keywords": config.keywords})


if __name__ == "__main__":
    command(main)
