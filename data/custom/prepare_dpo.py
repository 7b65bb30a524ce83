"""Your own preferences -> data/NAME: which of two answers is better, or which ones are good.

    python data/custom/prepare_dpo.py --input=pairs.jsonl --name=mine_dpo --tokenizer=data/mine_sft
    python data/custom/prepare_dpo.py --input=out-x/marks.jsonl --name=marks_dpo
    python data/custom/prepare_dpo.py --input=out-x/marks.jsonl --name=marks_kto --one_sided
    python data/custom/prepare_dpo.py --ranked=scored.jsonl --margin=5

miniglm/prep/preferences.py lists the records it takes. Marks without a counterpart are counted;
with --one_sided each is taken by itself, and trained by KTO.
"""

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, at_least, command, configure
from miniglm.prep import preferences


@dataclass
class Settings(preferences.Settings):
    one_sided: bool = False  # each marked answer by itself, for KTO; else pairs, for DPO
    ranked: list[str] = field(default_factory=list)  # or files of several ranked answers: a,b
    margin: Annotated[float, at_least(0)] = 0.0  # with ranked: least difference of two scores

    def __post_init__(self):
        if (self.input or self.one_sided) and self.ranked:
            raise UserError("--ranked= does not go with --input= or --one_sided; pass one of them")
        if self.margin and not self.ranked:
            raise UserError("--margin= needs scores; pass --ranked= with it")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if config.ranked:
        read = functools.partial(preferences.read_ranked, margin=config.margin)
        preferences.prepare(config, config.ranked, read)
    elif config.one_sided:
        preferences.prepare(config, config.input, preferences.read_marks, "kto")
    else:
        preferences.prepare(config, config.input, preferences.read_pairs)


if __name__ == "__main__":
    command(main)
