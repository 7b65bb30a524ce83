"""Zhihu's questions and answers -> data/zhihu_sft, as conversations.

python data/zhihu/prepare_sft.py --input='zhihu/*.parquet'
python data/zhihu/prepare_sft.py --input='zhihu/*.parquet' --keywords=金庸,武侠
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import command, configure
from data.zhihu.prepare import read_conversations
from miniglm.prep.similar import QuestionSettings, prepare_questions


@dataclass
class Settings(QuestionSettings):
    out: str = "data/zhihu_sft"  # directory to write
    tokenizer: str = "data/zhihu"  # gpt2, or a path: the pretrained model's
    keywords: list[str] = field(default_factory=list)  # a record has one of them; none: all


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    prepare_questions(config, read_conversations, more_meta={"keywords": config.keywords})


if __name__ == "__main__":
    command(main)
