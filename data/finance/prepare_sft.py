"""English and Chinese of finance: Hong Kong's speeches, press, funds -> data/finance_sft, as pairs.

    python data/finance/prepare_sft.py

English alone is the question, without an instruction; Chinese in Traditional characters is the
answer. A pair longer than --max_tokens is left out, not cut.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep import parallel


@dataclass
class Settings(parallel.Settings):
    input: list[str] = field(default_factory=lambda: parallel.FINANCE)  # files: a,b
    out: str = "data/finance_sft"  # directory to write
    tokenizer: str = "data/translation"  # gpt2, or a path: the pretrained model's


def main(argv: list[str]) -> None:
    parallel.prepare(configure(Settings, argv), "sft")


if __name__ == "__main__":
    command(main)
