"""Preferences of one's own -> data/NAME: which of two answers to the same prompt is better.

    python data/custom/prepare_dpo.py --input=pairs.jsonl --name=mine_dpo --tokenizer=data/mine_sft
    python data/custom/prepare_dpo.py --input=out-sanguo-sft/marks.jsonl --name=marks_dpo

A record is {"prompt", "chosen", "rejected"}, texts or messages, or MiniMind's {"chosen": messages,
"rejected": messages}. The chat page's marks have one of both: the first chosen and the first
rejected answer to a prompt are a pair, then the second ones; what stays alone is counted. They may
lie in several files, so all is read in one process. A pair is validation by the hash of its first
question. What training does with pairs is in objectives.py.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, command, configure, repo_path
from data.forms import Preference, is_validation, preference
from data.pipeline import print_meta
from data.readers import Tally, converted, find_sources
from data_writer import Form, Pair, merge, working_folder, write_unit
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


def matched(found: Iterable[Preference], tally: Tally) -> Iterator[Pair]:
    """Preferences -> pairs: an answer that is marked alone waits for one of the other kind."""
    waiting = {}  # prompt -> answers, chosen and rejected
    for prompt, *answers in found:
        if None in answers:
            side = answers.index(None)  # the one that is wanted
            sides = waiting.setdefault(json.dumps(prompt), ([], []))
            if not sides[side]:
                sides[1 - side].append(answers[1 - side])
                continue
            answers[side] = sides[side].pop(0)
        yield prompt, *answers
    alone = sum(len(answers) for sides in waiting.values() for answers in sides)
    if alone:
        tally.aside["without a counterpart"] += alone


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    sources = find_sources(config.input, config.encoding)
    tokenizer = load_tokenizer(config.tokenizer)
    tally, form = Tally(config.strict), Form("dpo", config.max_tokens)
    found = (one for source in sources for one in converted(source, tally, preference))
    records = (
        ("val" if is_validation(pair[0], config.val) else "train", pair)
        for pair in matched(found, tally)
    )
    out = repo_path(config.out or f"data/{config.name}")
    with working_folder(out) as folder:
        unit = folder / "unit"
        skipped = write_unit(unit, records, tokenizer, form)
        about = {"sources": [source.name for source in sources]} | tally.meta()
        meta = merge(out, [unit], skipped, tokenizer, form, about)
    print(f"{tally.good:,} good records{tally.summary()}")
    print_meta(out, meta)


if __name__ == "__main__":
    command(main)
