"""English and Chinese of finance: Hong Kong's speeches, press, funds -> data/finance, as texts.

    python data/fetch_data.py hongkong
    python data/finance/prepare.py --tokenizer=data/translation

A text is a sentence and, on the next line, its Chinese in Traditional characters. parallel.py says
what is left out, and which sentences are validation and test. --input= takes your own files: pairs
in lines, TMX, records {"translation": {"en", "zh"}}, or with --target= aligned lines.
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
    out: str = "data/finance"  # directory to write


def main(argv: list[str]) -> None:
    parallel.prepare(configure(Settings, argv), "pretrain")


if __name__ == "__main__":
    command(main)
