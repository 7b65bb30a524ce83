"""Parallel text: English and its Chinese -> clean pairs in Traditional characters, in fixed roles.

    data/raw/hongkong/legislation.tsv, courts.tsv               general: data/translation
    data/raw/hongkong/speeches.tsv, press.tsv, offering.tsv     finance: data/finance

The rows of these files are shuffled, so no document can be held out whole. The role of a pair
(test, val or train) is a function of the letters and digits of its English. So a sentence has one
role, whatever its case, blanks and punctuation and whichever file it is in: a test sentence of one
domain is not trained in the other. Of near duplicates the first stays, and the sentences for tests
and validation, of both domains, come first, whichever domain is prepared. Nor is a Chinese sentence
of the tests trained as the translation of another English one.
"""

import functools
import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import opencc

from configurator import ROOT, UserError
from miniglm.prep import pipeline
from miniglm.prep.forms import BadRecord, Record, interpret, parse_fields
from miniglm.prep.readers import Source, Tally, converted, find_sources
from miniglm.prep.similar import key_of, letters_of, near_duplicates
from miniglm.prep.writer import Kind
from miniglm.tokenizer import load_tokenizer

RAW = "data/raw/hongkong"
GENERAL = [f"{RAW}/legislation.tsv", f"{RAW}/courts.tsv"]
FINANCE = [f"{RAW}/speeches.tsv", f"{RAW}/press.tsv", f"{RAW}/offering.tsv"]
SPLITS = ("train", "val", "test")
LANGUAGES = ["en", "zh-Hant"]  # of a pair; by them evaluations.py knows a translation
RATIO = (1.2, 6.0)  # characters of English per character of Chinese in a good pair,
SHORT = 20  # if its English has at least so many
MOST = 1200  # characters of a sentence
ALIKE, NGRAM = 0.8, 5  # with this share of n-grams of letters in common, two are near duplicates

HAN, LETTERS = re.compile("[\u3400-\u9fff]+"), re.compile(r"[^\W\d_]+")
TO_SIMPLIFIED, TO_HONGKONG = opencc.OpenCC("t2s"), opencc.OpenCC("s2hk")


@dataclass
class Settings(pipeline.Settings):
    target: list[str] = field(default_factory=list)  # translations of input, line by line
    val: float = 0.02  # share for validation, and as much for the test; the same for both domains
    vocab_size: int = 6400  # entries of a trained tokenizer, for both languages and domains


# --- a pair --------------------------------------------------------------------------------------


def traditional(text: str) -> str:
    """Chinese in Hong Kong's Traditional characters. All becomes Simplified first: OpenCC chooses
    characters by the words they stand in, and does not know words that mix both."""
    return TO_HONGKONG.convert(TO_SIMPLIFIED.convert(text))


def pair_of(value: object, fields: dict[str, str]) -> tuple[str, str]:
    """(English, Chinese) of a record, whichever of the two comes first. Raises BadRecord if they
    cannot be translations of each other."""
    turns = interpret(value, fields, want=list)
    english, chinese = (tidy(turn["content"]) for turn in turns[-2:])
    if han_share(english) > han_share(chinese):
        english, chinese = chinese, english
    check(english, chinese)
    return english, chinese


def tidy(text: str) -> str:
    r"""One line, without a literal `\n`, blanks inside brackets, or leading closing marks."""
    text = " ".join(text.replace("\\n", " ").split())
    return re.sub(r"(?<=[(（\[「]) | (?=[)）\]」])", "", text).lstrip("”」』）,，。; ")


def han_share(text: str) -> float:
    """The share of Chinese characters among the letters."""
    han, letters = (sum(map(len, runs.findall(text))) for runs in (HAN, LETTERS))
    return han / max(1, letters)


def check(english: str, chinese: str) -> None:
    if han_share(english) > 0.3 or not re.search("[A-Za-z]", english):
        raise BadRecord("no English", english)
    if han_share(chinese) < 0.3:
        raise BadRecord("too little Chinese", chinese)
    if max(len(english), len(chinese)) > MOST:
        raise BadRecord("too long", english)
    ratio = len(english) / len(chinese)
    if len(english) >= SHORT and not RATIO[0] <= ratio <= RATIO[1]:
        raise BadRecord("lengths do not match", f"{ratio:.1f}, {english} | {chinese}")


def role_of(letters: str, share: float) -> str:
    """test, val or train, by the letters of a sentence alone."""
    place = int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8]) / 2**64
    return "test" if place < share else "val" if place < 2 * share else "train"


# --- a dataset -----------------------------------------------------------------------------------


def find_repeated(
    own: list[Source], others: list[Source], fields: dict[str, str], share: float
) -> tuple[dict[int, float], set[int]]:
    """The pairs of all sources whose English repeats an earlier one, or nearly, as near_duplicates
    returns them; and answer_key of each Chinese test sentence. Of the other sources, only tests and
    validation count."""
    tested = set()

    def in_order() -> Iterator[tuple[str, tuple[str, str]]]:
        for roles in (["test", "val"], ["train"]):
            sources = own if roles == ["train"] else sorted([*own, *others], key=lambda s: s.path)
            for source in sources:
                record_of = functools.partial(pair_of, fields=fields if source in own else {})
                for pair in converted(source, Tally(quiet=True), record_of):
                    role = role_of(letters_of(pair[0]), share)
                    if role == "test":
                        tested.add(answer_key(traditional(pair[1])))
                    if role in roles:
                        yield pair[0], pair

    return near_duplicates(in_order(), NGRAM, ALIKE), tested


def answer_key(chinese: str) -> int:
    return key_of(letters_of(chinese))


def read(
    kind: Kind, known: tuple[dict, set], config: Settings, source: Source, tally: Tally
) -> pipeline.Reads:
    """The pairs that repeat no other, with their roles; `known` is what find_repeated returns."""
    repeated, tested = known
    pairs_of = functools.partial(pair_of, fields=parse_fields(config.fields))
    for pair in converted(source, tally, pairs_of):
        if likeness := repeated.get(key_of(pair)):
            how = "the same" if likeness == 1 else "nearly the same"
            tally.aside[f"English {how}"] += 1
            continue
        role, chinese = role_of(letters_of(pair[0]), config.val), traditional(pair[1])
        if role != "test" and answer_key(chinese) in tested:
            tally.aside["Chinese of a test"] += 1
        elif record := record_of(config, kind, pair[0], chinese):
            yield role, record
        else:
            tally.aside["longer than --max_tokens"] += 1


def record_of(config: Settings, kind: Kind, english: str, chinese: str) -> Record | None:
    """English alone asks, its Chinese answers: a model with one task needs no instruction."""
    if kind == "pretrain":
        return f"{english}\n{chinese}"
    turns = [{"role": "user", "content": english}, {"role": "assistant", "content": chinese}]
    rendered = _tokenizer(config.tokenizer).render(turns)[0]
    return turns if len(rendered) <= config.max_tokens else None  # half of one is no translation


_tokenizer = functools.lru_cache(load_tokenizer)


def prepare(config: Settings, kind: Kind) -> dict:
    """Prepares config.input. The tests of the files that are not in it stay unseen."""
    raw = [name for name in config.input if name.startswith(RAW)]
    if not all(glob.glob(name, root_dir=ROOT, recursive=True) for name in raw):  # noqa: PTH207
        raise UserError(f"{RAW} is not complete; run python data/fetch_data.py hongkong")
    own = find_sources(config.input, config.encoding, config.target)
    others = [name for name in GENERAL + FINANCE if name not in config.input]
    others = [name for name in others if (ROOT / name).is_file()]
    unseen = find_sources(others) if others else []
    known = find_repeated(own, unseen, parse_fields(config.fields), config.val)
    chosen = functools.partial(read, kind, known)
    splits = SPLITS if config.val else ("train",)
    return pipeline.prepare(config, chosen, kind, own, splits, {"languages": LANGUAGES})
