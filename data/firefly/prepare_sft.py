"""Firefly's instructions -> data/firefly_sft: lines {"kind", "input", "target"}.

python data/firefly/prepare_sft.py --input=firefly-train-1.1M.jsonl --tokenizer=data/zhihu
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep.similar import QuestionSettings, prepare_questions


@dataclass
class Settings(QuestionSettings):
    out: str = "data/firefly_sft"  # directory to write


def main(argv: list[str]) -> None:
    prepare_questions(configure(Settings, argv))


if __name__ == "__main__":
    command(main)
