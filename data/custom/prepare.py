"""Files of one's own -> data/NAME: text for pretraining, or conversations, whichever they hold.

    python data/custom/prepare.py --input='my/*.txt' --name=mine
    python data/custom/prepare.py --input=qa.jsonl --name=mine_sft --tokenizer=data/mine
    python data/custom/prepare.py --input=talk.en --target=talk.zh --name=mine_pairs

The forms of files are told in readers.py, those of records in forms.py. The first good
record says whether all are texts or conversations. A .txt file is cut into documents of some 4,096
characters at line ends. A document is validation by its hash, a conversation by that of its first
question: so the split stays when other records are added, and equal questions lie on one side.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, command, configure
from miniglm.prep import pipeline
from miniglm.prep.forms import Record, parse_fields
from miniglm.prep.readers import Source, Tally, find_sources, is_text, records


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
    source: Source, tally: Tally, fields: dict, want: type, val: float, val_paths: set
) -> Iterator[tuple[str, Record]]:
    """val_paths: the files that are for validation; where there are none, a share is."""
    if not val_paths:
        yield from pipeline.read_records(source, tally, fields, want, val)
        return
    split = "val" if source.path in val_paths else "train"
    yield from ((split, record) for record in records(source, tally, fields, want))


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    fields = parse_fields(config.fields)
    sources = find_sources(config.input, config.encoding, config.target)
    val_sources = find_sources(config.val_input, config.encoding) if config.val_input else []
    val_paths = {source.path for source in val_sources}
    sources = [source for source in sources if source.path not in val_paths]
    texts = is_text([*sources, *val_sources], fields)
    chosen = partial(
        read, fields=fields, want=str if texts else list, val=config.val, val_paths=val_paths
    )
    kind = "pretrain" if texts else "sft"
    pipeline.prepare(config, [*sources, *val_sources], chosen, kind)


if __name__ == "__main__":
    command(main)
