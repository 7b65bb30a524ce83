"""Files of one's own -> data/NAME: text for pretraining, or conversations, whichever they hold.

    python data/custom/prepare.py --input='my/*.txt' --name=mine
    python data/custom/prepare.py --input=qa.jsonl --name=mine_sft --tokenizer=data/mine
    python data/custom/prepare.py --input=talk.en --target=talk.zh --name=mine_pairs

The forms of files are told in data/readers.py, those of records in data/forms.py. The first good
record says whether all are texts or conversations. A .txt file is cut into documents of some 4,096
characters at line ends. A document is validation by its hash, a conversation by that of its first
question: so the split stays when other records are added, and equal questions lie on one side.
The files are read anew for each split, which costs less than keeping them.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, command, configure, repo_path, show_path
from data.forms import Record, is_validation, parse_fields, text_of
from data.readers import Tally, find_sources, is_text, records
from data_utils import Mask, write_pretrain, write_sft
from tokenizer import load_tokenizer, sample, train_tokenizer


@dataclass
class Settings:
    input: list[str] = field(default_factory=list)  # files, folders, globs: a,b
    target: list[str] = field(default_factory=list)  # translations of input, line by line
    val_input: list[str] = field(default_factory=list)  # files for validation; none: a share
    val: float = 0.05  # share of the records for validation
    name: str = "mine"  # the dataset's name under data/
    out: str = ""  # directory to write; empty: data/NAME
    tokenizer: str = "train"  # train: on the training records; gpt2; or where one lies
    vocab_size: int = 4096  # entries of a trained tokenizer
    max_tokens: int = 256  # longest conversation; a model's block_size must not be smaller
    mask: Mask = "answer"  # trained: answer and its end token; no_end without; padding: end tokens
    encoding: str = "auto"  # of all files: utf-8, gb18030, big5, utf-16
    fields: str = ""  # as question=ask,answer=reply, or text=body: what the fields are called
    strict: bool = False  # stop at the first bad record

    def __post_init__(self):
        if not 0 < self.val < 1:
            raise UserError(f"val={self.val} must lie between 0 and 1")
        if self.target and (self.val_input or self.fields):
            raise UserError("--target= goes with neither --val_input= nor --fields=")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    fields = parse_fields(config.fields)
    sources = find_sources(config.input, config.encoding, config.target)
    val_sources = find_sources(config.val_input, config.encoding) if config.val_input else []
    texts = is_text(sources, fields)

    def read(split: str, tally: Tally) -> Iterator[Record]:
        found = 0
        for source in val_sources if val_sources and split == "val" else sources:
            for record in records(source, tally, fields, str if texts else list):
                if val_sources or is_validation(record, config.val) == (split == "val"):
                    found += 1
                    yield record
        if not found:
            raise UserError(f"no record is for {split}; change --val=, or pass --val_input=")

    tally, again = Tally(config.strict), Tally(show=0)  # records are counted as first read
    if config.tokenizer == "train":
        tokenizer = train_tokenizer(sample(map(text_of, read("train", tally))), config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    splits = {
        "train": read("train", again if config.tokenizer == "train" else tally),
        "val": read("val", tally if val_sources else again),
    }
    out = repo_path(config.out or f"data/{config.name}")
    names = [file.name for one in [*sources, *val_sources] for file in (one, one.target) if file]
    if texts:
        meta = write_pretrain(out, tokenizer, splits, names, tally.meta)
    else:
        limits = config.max_tokens, config.mask
        meta = write_sft(out, tokenizer, splits, names, *limits, tally.meta)
    print(f"{tally.good:,} good records{tally.summary()}")
    for split, sizes in meta["splits"].items():
        sizes = ", ".join(f"{n:,} {what}" for what, n in sizes.items() if what != "fingerprint")
        print(f"{show_path(out)}/{split}.bin: {sizes}")


if __name__ == "__main__":
    command(main)
