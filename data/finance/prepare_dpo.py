"""A translator's own translations of finance -> data/finance_dpo: of two, which is the better.

    python data/finance/prepare_dpo.py --out_dir=out-translate-lora

Samples the model's translations of some sentences and ranks them against the reference:
miniglm/prep/ranking.py. Pairs, marks of the chat page and answers that are ranked already:
data/custom/prepare_dpo.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep import ranking


@dataclass
class Settings(ranking.Settings):
    out: str = "data/finance_dpo"  # directory to write


def main(argv: list[str]) -> None:
    ranking.prepare(configure(Settings, argv))


if __name__ == "__main__":
    command(main)
