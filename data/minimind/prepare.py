"""MiniMind's pretraining texts -> data/minimind: lines {"text"}.

    python data/minimind/prepare.py --input=pretrain_hq.jsonl --vocab_size=6400

The marks of its chat format, <|im_start|> and <|im_end|>, become line ends: here they would be
plain text, which a model would learn to write.
"""

import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from data import pipeline
from data.forms import BadRecord, Record, interpret
from data.readers import find_sources

MARKS = re.compile(r"(?:\s*(?:<\|im_(?:start|end)\|>|</?s>)\s*)+")


@dataclass
class Settings(pipeline.Settings):
    out: str = "data/minimind"  # directory to write


def text_without_marks(value: object) -> Record:
    text = interpret(value, {})
    if not isinstance(text, str):
        raise BadRecord("no text")
    return interpret(MARKS.sub("\n", text), {})


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    sources = find_sources(config.input, config.encoding)
    read = partial(pipeline.read_records, record_of=text_without_marks, val=config.val)
    pipeline.prepare(config, sources, read, "pretrain")


if __name__ == "__main__":
    command(main)
