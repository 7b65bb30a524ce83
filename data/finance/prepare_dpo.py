"""Preferences of finance's translations -> data/finance_dpo: of two, which is the better.

    python data/finance/prepare_dpo.py --out_dir=out-translate-lora
    python data/finance/prepare_dpo.py --ranked=scored.jsonl
    python data/finance/prepare_dpo.py --input=out-translate-lora/marks.jsonl

The first samples the model's own translations of some sentences, and ranks them against the
reference: ranking.py. The others take answers that someone else has ranked, and pairs or marks
of the chat page: miniglm/prep/preferences.py says which records they are.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep import preferences, ranking


@dataclass
class Settings(ranking.Settings):
    name: str = "finance_dpo"  # the dataset's name under data/
    tokenizer: str = "data/translation"  # with files: that of the model to train


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if config.out_dir:
        ranking.prepare(config)
    elif config.ranked:
        read = functools.partial(preferences.read_ranked, margin=config.margin or 0.0)
        preferences.prepare(config, config.ranked, read)
    else:
        preferences.prepare(config, config.input, preferences.read_pairs)


if __name__ == "__main__":
    command(main)
