"""MiniMind's conversations -> data/minimind_sft: {"conversations": [{"role", "content"}]}.

    python data/minimind/prepare_sft.py --input=sft_mini_512.jsonl --max_tokens=512

Tools, their calls and results, and reasoning_content are taken; with --tokenizer= of MiniMind's own
model they have its chat format. Without roles, user and assistant alternate. Older csv files have
q, a and history.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from miniglm.prep.similar import QuestionSettings, prepare_questions


@dataclass
class Settings(QuestionSettings):
    out: str = "data/minimind_sft"  # directory to write
    tokenizer: str = "data/minimind"  # gpt2, or a path: the pretrained model's


def main(argv: list[str]) -> None:
    prepare_questions(configure(Settings, argv))


if __name__ == "__main__":
    command(main)
