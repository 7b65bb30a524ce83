"""Preferences of one's own -> data/NAME: which of two answers to the same prompt is better.

    python data/custom/prepare_dpo.py --input=pairs.jsonl --name=mine_dpo --tokenizer=data/mine_sft
    python data/custom/prepare_dpo.py --input=out-sanguo-sft/marks.jsonl --name=marks_dpo

Which records it takes is told in miniglm/prep/preferences.py. Marks that stay alone are counted.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep import preferences


@dataclass
class Settings(preferences.Settings):
    name: str = "mine_dpo"  # the dataset's name under data/
    tokenizer: str = "data/sanguo_sft"  # where one lies: that of the model to train


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    preferences.prepare(config, config.input, preferences.read_pairs)


if __name__ == "__main__":
    command(main)
