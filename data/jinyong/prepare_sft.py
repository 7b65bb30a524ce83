"""Questions and answers about the novels -> data/jinyong_sft: lines {"Question", "Answer"}.

python data/jinyong/prepare_sft.py --input=sft_data.jsonl
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep.similar import QuestionSettings, prepare_questions


@dataclass
class Settings(QuestionSettings):
    input: list[str] = field(default_factory=lambda: ["data/raw/jinyong/sft_data.jsonl"])  # files
    out: str = "data/jinyong_sft"  # directory to write
    tokenizer: str = "data/jinyong"  # gpt2, or a path: the pretrained model's


def main(argv: list[str]) -> None:
    prepare_questions(configure(Settings, argv))


if __name__ == "__main__":
    command(main)
