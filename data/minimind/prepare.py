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
from miniglm.prep import pipeline
from miniglm.prep.forms import BadRecord, Record, interpret, parse_fields

MARKS = re.compile(r"(?:\s*(?:<\|im_(?:start|end)\|>|</?s>)\s*)+")


@dataclass
class Settings(pipeline.Settings):
    out: str = "data/minimind"  # directory to write


def text_without_marks(value: object, fields: dict[str, str]) -> Record:
    text = interpret(value, fields)
    if not isinstance(text, str):
        raise BadRecord("no text")
    return interpret(MARKS.sub("\n", text), {})


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    fields = parse_fields(config.fields)
    pipeline.prepare_texts(config, partial(text_without_marks, fields=fields))


if __name__ == "__main__":
    command(main)
