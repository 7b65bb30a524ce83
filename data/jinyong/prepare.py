"""Jin Yong's novels -> data/jinyong: one, several or all that are there.

    python data/jinyong/prepare.py --novels=shediao,shendiao,tianlong
    python data/jinyong/prepare.py --input='my/*.txt' --out=data/mine

The novels are under copyright, and yours to get: put each into data/raw/jinyong as NAME/input.txt,
in any encoding, or name other files by --input=. Any NAME will do; courses use shediao, shendiao,
tianlong, yitian, xiaoao, luding, shujian, bixue, xueshan, feihu, liancheng, xiake, baima, yuanyang
and yuenv. Passages of about 4,096 characters are split by their hashes.
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, command, configure
from miniglm.prep import pipeline

RAW = "data/raw/jinyong"


@dataclass
class Settings(pipeline.Settings):
    input: list[str] = field(default_factory=list)  # files: a,b; none: those of data/raw/jinyong
    novels: list[str] = field(default_factory=list)  # their names, as shediao; none: all there are
    out: str = "data/jinyong"  # directory to write


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if config.novels and config.input:
        raise UserError("--novels= goes without --input=")
    if not config.input:
        files = [f"{RAW}/{name}/input.txt" for name in config.novels or ["*"]]
        config = replace(config, input=files)
    pipeline.prepare(config, partial(pipeline.read_records, want=str), "pretrain")


if __name__ == "__main__":
    command(main)
