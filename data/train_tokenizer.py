"""Trains a vocabulary on files, or shows how one splits a text.

    python data/train_tokenizer.py train --out=data/vocab/tokenizer.json 'my/*.txt'
    python data/train_tokenizer.py show --tokenizer=data/vocab --text=孔明是谁？

Training reads a sample of the files: passages chosen by their hashes.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import UserError, command, configure, repo_path, show_path, written_aside
from miniglm.prep.forms import parse_fields, text_of
from miniglm.prep.readers import Tally, find_sources, records
from miniglm.tokenizer import load_tokenizer, sample, train_tokenizer


@dataclass
class Settings:
    names: list[str] = field(default_factory=list)  # train and its files, or show
    vocab_size: int = 4096  # entries to train
    out: str = "tokenizer.json"  # file to write, relative to the repository
    encoding: str = "auto"  # of the files: utf-8, gb18030, big5, utf-16
    fields: str = ""  # as text=body: which field of a record is its text
    tokenizer: str = "data/sanguo"  # what to show: gpt2, or a path
    text: str = ""  # what to show it on


def texts_of_files(words: list[str], config: Settings) -> Iterator[str]:
    """The text of each record of the files; prints at the end what was left out."""
    tally, fields = Tally(), parse_fields(config.fields)
    for source in find_sources(words, config.encoding):
        yield from map(text_of, records(source, tally, fields))
    print(f"{tally.good:,} good records{tally.summary()}")


def train(config: Settings, words: list[str]) -> None:
    """Trains on files and writes --out."""
    out = repo_path(config.out)
    out = out / "tokenizer.json" if out.is_dir() else out
    if out.with_name("meta.json").is_file():
        folder = show_path(out.parent)
        raise UserError(f"{folder} is a dataset with a tokenizer of its own; name another --out=")
    passages = sample(texts_of_files(words, config))
    if not passages:
        raise UserError("there is no text in the files")
    tokenizer = train_tokenizer(passages, config.vocab_size)
    with written_aside(out) as aside:
        tokenizer.save(aside)
    characters = sum(map(len, passages))
    print(f"{show_path(out)}: {tokenizer.n_vocab} entries, from {characters:,} characters")


def show(config: Settings, words: list[str]) -> None:
    """Prints how a vocabulary splits a text."""
    tokenizer = load_tokenizer(config.tokenizer)
    ids = tokenizer.encode(config.text)
    if words or not ids:
        raise UserError("show takes no files; pass --tokenizer= and --text=")
    print(" ".join(map(tokenizer.entry, ids)))
    characters = len(config.text)
    print(f"{characters:,} characters, {len(ids):,} tokens: {characters / len(ids):.2f} a token")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    part, *words = config.names or [""]
    if part not in ("train", "show"):
        raise UserError(f"unknown part {part!r}; write train FILES, or show")
    (train if part == "train" else show)(config, words)


if __name__ == "__main__":
    command(main)
