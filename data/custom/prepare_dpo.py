"""Preferences of one's own -> data/NAME: which of two answers to the same prompt is better.

    python data/custom/prepare_dpo.py --input=pairs.jsonl --name=mine_dpo --tokenizer=data/mine_sft
    python data/custom/prepare_dpo.py --input=out-sanguo-sft/marks.jsonl --name=marks_dpo

A record is {"prompt", "chosen", "rejected"}, texts or messages, or MiniMind's {"chosen": messages,
"rejected": messages}. The chat page's marks have one of both: the first chosen and the first
rejected answer to a prompt are a pair, then the second ones; what stays alone is counted. A pair is
validation by the hash of its first question. What training does with pairs is in objectives.py.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, command, configure, repo_path, show_path
from data.forms import Preference, is_validation
from data.readers import Tally, find_sources, preferences
from data_utils import Pair, write_dpo
from tokenizer import load_tokenizer


@dataclass
class Settings:
    input: list[str] = field(default_factory=list)  # files, folders, globs: a,b
    val: float = 0.1  # share of the prompts for validation
    name: str = "mine_dpo"  # the dataset's name under data/
    out: str = ""  # directory to write; empty: data/NAME
    tokenizer: str = "data/sanguo_sft"  # where one lies: that of the model to train
    max_tokens: int = 256  # longest conversation; a model's block_size must not be smaller
    encoding: str = "auto"  # of all files: utf-8, gb18030, big5, utf-16
    strict: bool = False  # stop at the first bad record

    def __post_init__(self):
        if not 0 < self.val < 1:
            raise UserError(f"val={self.val} must lie between 0 and 1")


class Matcher:
    """Preferences -> pairs: an answer that is marked alone waits for one of the other kind."""

    def __init__(self):
        self.waiting = {}  # prompt -> answers, chosen and rejected

    def add(self, found: Preference) -> Iterator[Pair]:
        prompt, *answers = found
        if None not in answers:
            yield prompt, *answers
            return
        side = answers.index(None)  # the one that is wanted
        waiting = self.waiting.setdefault(json.dumps(prompt), ([], []))
        if not waiting[side]:
            waiting[1 - side].append(answers[1 - side])
            return
        answers[side] = waiting[side].pop(0)
        yield prompt, *answers

    def alone(self) -> int:
        return sum(len(answers) for sides in self.waiting.values() for answers in sides)


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    sources = find_sources(config.input, config.encoding)
    tokenizer = load_tokenizer(config.tokenizer)
    matchers = {"train": Matcher(), "val": Matcher()}

    def read(split: str, tally: Tally) -> Iterator[Pair]:
        found = 0
        for source in sources:
            for one in preferences(source, tally):
                if is_validation(one[0], config.val) == (split == "val"):
                    for pair in matchers[split].add(one):
                        found += 1
                        yield pair
        if not found:
            raise UserError(f"no pair is for {split}; change --val=, or add to the input")

    def about() -> dict:
        return tally.meta() | {"alone": sum(matcher.alone() for matcher in matchers.values())}

    tally = Tally(config.strict)
    splits = {"train": read("train", tally), "val": read("val", Tally(show=0))}
    out = repo_path(config.out or f"data/{config.name}")
    names = [source.name for source in sources]
    meta = write_dpo(out, tokenizer, splits, names, config.max_tokens, about)
    alone = f"; {meta['alone']:,} answers without a counterpart" if meta["alone"] else ""
    print(f"{tally.good:,} good records{tally.summary()}{alone}")
    for split, sizes in meta["splits"].items():
        sizes = ", ".join(f"{n:,} {what}" for what, n in sizes.items() if what != "fingerprint")
        print(f"{show_path(out)}/{split}.bin: {sizes}")


if __name__ == "__main__":
    command(main)
