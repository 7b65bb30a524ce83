"""Your own files -> data/NAME: texts for pretraining or conversations, whichever they hold.

    python data/custom/prepare.py --input='my/*.txt' --name=mine
    python data/custom/prepare.py --input=qa.jsonl --name=mine_sft --tokenizer=data/mine
    python data/custom/prepare.py --input=talk.en --target=talk.zh --name=mine_pairs

Which files it takes is told in miniglm/prep/readers.py, which records in forms.py. The first good
record decides whether all are texts or conversations. A .txt file is cut into documents of about
4,096 characters at line ends. A document is validation by its hash, a conversation by that of its
first question: so the split stays when records are added, and equal questions lie in one split.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, command, configure
from miniglm.prep import pipeline
from miniglm.prep.forms import parse_fields
from miniglm.prep.readers import Source, Tally, find_sources, is_text


@dataclass
class Settings(pipeline.Settings):
    target: list[str] = field(default_factory=list)  # translations of input, line by line
    val_input: list[str] = field(default_factory=list)  # files for validation; none: a share
    name: str = "mine"  # the dataset's name under data/
    out: str = ""  # directory to write; empty: data/NAME

    def __post_init__(self):
        super().__post_init__()
        self.out = self.out or f"data/{self.name}"
        if self.target and (self.val_input or self.fields):
            raise UserError("--target= goes with neither --val_input= nor --fields=")


def read(
    want: type, val_paths: set[Path], config: Settings, source: Source, tally: Tally
) -> pipeline.Reads:
    """val_paths: the files for validation; if there are none, a share of the records is."""
    for split, record in pipeline.read_records(config, source, tally, want):
        if val_paths:
            split = "val" if source.path in val_paths else "train"
        yield split, record


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    sources = find_sources(config.input, config.encoding, config.target)
    val_sources = find_sources(config.val_input, config.encoding) if config.val_input else []
    val_paths = {source.path for source in val_sources}
    sources = [source for source in sources if source.path not in val_paths] + val_sources
    texts = is_text(sources, parse_fields(config.fields))
    chosen = partial(read, str if texts else list, val_paths)
    splits = ("train", "val") if val_paths else None
    pipeline.prepare(config, chosen, "pretrain" if texts else "sft", sources, splits)


if __name__ == "__main__":
    command(main)
