"""Zhihu's questions and answers -> data/zhihu, as texts: the question before the answer.

    python data/zhihu/prepare.py --input='zhihu/*.parquet'
    python data/zhihu/prepare.py --input='zhihu/*.parquet' --keywords=金庸,武侠

A record is {"INSTRUCTION", "RESPONSE"}. --keywords= keeps those with one of the words.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep import pipeline
from miniglm.prep.forms import text_of
from miniglm.prep.readers import Source, Tally


@dataclass
class Settings(pipeline.Settings):
    out: str = "data/zhihu"  # directory to write
    keywords: list[str] = field(default_factory=list)  # a record has one of them; none: all


def read_conversations(config: Settings, source: Source, tally: Tally) -> pipeline.Reads:
    """The conversations with a keyword, if any are given."""
    for split, turns in pipeline.read_records(config, source, tally, want=list):
        text = text_of(turns)
        if not config.keywords or any(word in text for word in config.keywords):
            yield split, turns
        else:
            tally.aside["without a keyword"] += 1


def read(config: Settings, source: Source, tally: Tally) -> pipeline.Reads:
    """The same as texts, in the split of their question."""
    for split, turns in read_conversations(config, source, tally):
        yield split, text_of(turns)


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    pipeline.prepare(config, read, "pretrain", more_meta={"keywords": config.keywords})


if __name__ == "__main__":
    command(main)
