"""Trains a vocabulary on files, or shows how one splits a text.

    python data/train_tokenizer.py train --out=data/vocab/tokenizer.json 'my/*.txt'
    python data/train_tokenizer.py show --tokenizer=data/vocab --text=孔明是谁？
    python data/train_tokenizer.py show --tokenizer=data/vocab --text=FILE:my/a.txt

Training reads a sample of the files: passages chosen by their hashes.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import (
    UserError,
    command,
    configure,
    repo_path,
    run_part,
    show_path,
    written_aside,
)
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
    text: str = ""  # what to show it on, or FILE:NAME; nothing: its entries


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
    """Prints the entries as text, or how they split a text."""
    if words:
        raise UserError(f"show takes no {words[0]}; pass --tokenizer= and --text=")
    tokenizer = load_tokenizer(config.tokenizer)
    if not config.text:
        for id in range(tokenizer.n_vocab):
            print(id, tokenizer.entry(id), sep="\t")
        return
    if config.text.startswith("FILE:"):
        texts = texts_of_files([config.text.removeprefix("FILE:")], config)
    else:
        texts = [config.text]
        print(" ".join(map(tokenizer.entry, tokenizer.encode(config.text))))
    characters = size = tokens = 0
    for text in texts:
        characters, size = characters + len(text), size + len(text.encode())
        tokens += len(tokenizer.encode(text))
    if not tokens:
        raise UserError("there is no text to show it on")
    print(
        f"{characters:,} characters, {size:,} bytes, {tokens:,} tokens: "
        f"{characters / tokens:.2f} characters a token"
    )


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    run_part(config, {"train": train, "show": show}, "train FILES, or show")


if __name__ == "__main__":
    command(main)
