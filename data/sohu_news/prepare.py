"""Sohu's news -> data/sohu_news: the text behind the last separator mark `1`2 of each line.

    python data/sohu_news/prepare.py --input='sohu/*.txt'

A line is an article: ```1`2title`1`2text``.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep import pipeline
from miniglm.prep.forms import BadRecord, interpret

MARK = re.compile(r"`\d")


@dataclass
class Settings(pipeline.Settings):
    out: str = "data/sohu_news"  # directory to write


def article(line: object) -> str:
    """The text behind the last mark. Raises BadRecord if there is none."""
    if not isinstance(line, str):
        raise BadRecord("wrong type", "a record is no line of text")
    *marks, text = MARK.split(line)
    if not marks:
        raise BadRecord("no separator mark", line)
    return interpret(text, {})


def main(argv: list[str]) -> None:
    pipeline.prepare_texts(configure(Settings, argv), article)


if __name__ == "__main__":
    command(main)
