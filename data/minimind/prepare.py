"""MiniMind's pretraining texts -> data/minimind: lines {"text"}.

    python data/minimind/prepare.py --input=pretrain_hq.jsonl --vocab_size=6400

The marks of its chat format, <|im_start|> and <|im_end|>, become line ends: kept as plain text, a
model would learn to write them.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep import pipeline
from miniglm.prep.forms import interpret

MARKS = re.compile(r"(?:\s*(?:<\|im_(?:start|end)\|>|</?s>)\s*)+")


@dataclass
class Settings(pipeline.Settings):
    out: str = "data/minimind"  # directory to write


def text_without_marks(value: object) -> str:
    return interpret(MARKS.sub("\n", interpret(value, {}, want=str)), {})


def main(argv: list[str]) -> None:
    pipeline.prepare_texts(configure(Settings, argv), text_without_marks)


if __name__ == "__main__":
    command(main)
