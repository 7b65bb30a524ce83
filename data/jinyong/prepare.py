"""Jin Yong's novels -> data/jinyong: one, several or all that are there.

    python data/jinyong/prepare.py --novels=shediao,shendiao,tianlong
    python data/jinyong/prepare.py --input='my/*.txt' --out=data/mine

The novels are under copyright, and yours to get: put each into data/raw/jinyong as NAME/input.txt,
whatever its encoding, or name another such folder, or files, by --input=. Passages of some 4,096
characters are validation by their hashes.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import ROOT, UserError, command, configure, nearest, show_path, user_path
from miniglm.prep import pipeline
from miniglm.prep.forms import parse_fields
from miniglm.prep.readers import find_sources

RAW = "data/raw/jinyong"
NOVELS = {
    "shediao": "射雕英雄传",
    "shendiao": "神雕侠侣",
    "tianlong": "天龙八部",
    "yitian": "倚天屠龙记",
    "xiaoao": "笑傲江湖",
    "luding": "鹿鼎记",
    "shujian": "书剑恩仇录",
    "bixue": "碧血剑",
    "xueshan": "雪山飞狐",
    "feihu": "飞狐外传",
    "liancheng": "连城诀",
    "xiake": "侠客行",
    "baima": "白马啸西风",
    "yuanyang": "鸳鸯刀",
    "yuenv": "越女剑",
}


@dataclass
class Settings(pipeline.Settings):
    input: list[str] = field(default_factory=lambda: [RAW])  # a folder of novels, or files: a,b
    novels: list[str] = field(default_factory=list)  # short names, as shediao; none: all there are
    out: str = "data/jinyong"  # directory to write


def find_novels(folder: Path, novels: list[str]) -> list[str]:
    """The files of the novels in a folder. UserError where one that is asked for is not there."""
    for name in novels:
        if name not in NOVELS:
            known = nearest(name, NOVELS) or f"; it is one of {', '.join(NOVELS)}"
            raise UserError(f"unknown novel {name!r}{known}")
    files = {name: folder / name / "input.txt" for name in novels or NOVELS}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing and (novels or len(missing) == len(NOVELS)):
        raise UserError(
            f"no {missing[0]}/input.txt ({NOVELS[missing[0]]}) in {show_path(folder)}; the novels "
            "are under copyright and yours to get: put them there, or name files by --input="
        )
    return [str(file) for file in files.values() if file.is_file()]


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    folder, *others = map(user_path, config.input or [RAW])
    if config.novels and (others or folder.is_file()):
        raise UserError("--novels= goes with one folder in --input=")
    is_layout = config.novels or folder == ROOT / RAW or any(folder.glob("*/input.txt"))
    words = find_novels(folder, config.novels) if is_layout else config.input
    fields = parse_fields(config.fields)
    read = partial(pipeline.read_records, fields=fields, want=str, val=config.val)
    pipeline.prepare(config, find_sources(words, config.encoding), read, "pretrain")


if __name__ == "__main__":
    command(main)
