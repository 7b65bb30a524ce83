"""Parallel text: English and its Chinese -> clean pairs in Traditional characters, in fixed roles.

    data/raw/hongkong/legislation.tsv, courts.tsv               general: data/translation
    data/raw/hongkong/speeches.tsv, press.tsv, offering.tsv     finance: data/finance

The rows of these files are shuffled, so no document can be held out whole. The role of a pair
(test, val or train) is that of its English, by the hash of its letters and digits alone. So a
sentence has one role, whatever its case, blanks and punctuation, and in whichever file it stands:
what is tested in one domain is trained in no other. Of sentences that are nearly the same the first
stays, and those for tests and validation, of both domains, come first, whatever is prepared. A
Chinese sentence of the tests is not trained as the answer to another English one, either.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import opencc

from configurator import ROOT, UserError
from miniglm.prep import pipeline
from miniglm.prep.forms import BadRecord, Record, interpret, parse_fields
from miniglm.prep.readers import Source, Tally, converted, find_sources
from miniglm.prep.similar import key_of, letters_of, near_duplicates
from miniglm.tokenizer import load_tokenizer

RAW = "data/raw/hongkong"
GENERAL = [f"{RAW}/legislation.tsv", f"{RAW}/courts.tsv"]
FINANCE = [f"{RAW}/speeches.tsv", f"{RAW}/press.tsv", f"{RAW}/offering.tsv"]
SPLITS = ("train", "val", "test")
LANGUAGES = ["en", "zh-Hant"]  # of a pair; by them evaluations.py knows a translation
RATIO = (1.2, 6.0)  # characters of English for one of Chinese: what a good pair has,
SHORT = 20  # if its English has so many at least
MOST = 1200  # characters of a sentence
ALIKE, NGRAM = 0.8, 5  # share of n-grams of letters in common from which on two are nearly the same

HAN, LETTERS = re.compile("[\u3400-\u9fff]+"), re.compile(r"[^\W\d_]+")
TO_SIMPLIFIED, TO_HONGKONG = opencc.OpenCC("t2s"), opencc.OpenCC("s2hk")


@dataclass
class Settings(pipeline.Settings):
    target: list[str] = field(default_factory=list)  # translations of input, line by line
    val: float = 0.02  # share for validation, and as much for the test; the same for both domains
    vocab_size: int = 6400  # entries of a trained tokenizer, for both languages and domains


# --- a pair --------------------------------------------------------------------------------------


def traditional(text: str) -> str:
    """Chinese in Hong Kong's Traditional characters. What is Traditional already goes back first:
    OpenCC chooses between characters by the words they stand in, which are whole only then."""
    return TO_HONGKONG.convert(TO_SIMPLIFIED.convert(text))


def pair_of(value: object, fields: dict[str, str]) -> tuple[str, str]:
    """(English, Chinese) of a record, whichever of the two comes first. BadRecord where they cannot
    be translations of each other."""
    turns = interpret(value, fields)
    if not isinstance(turns, list):
        raise BadRecord("no pair")
    english, chinese = (tidy(turn["content"]) for turn in turns[-2:])
    if han_share(english) > han_share(chinese):
        english, chinese = chinese, english
    check(english, chinese)
    return english, chinese


def tidy(text: str) -> str:
    r"""One line without `\n` written out, blanks inside brackets, and closing marks in front."""
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
        raise BadRecord("no Chinese", chinese)
    if max(len(english), len(chinese)) > MOST:
        raise BadRecord("too long", english)
    ratio = len(english) / len(chinese)
    if len(english) >= SHORT and not RATIO[0] <= ratio <= RATIO[1]:
        raise BadRecord("lengths do not match", f"{ratio:.1f}, {english} | {chinese}")


def role_of(letters: str, share: float) -> str:
    """test, val or train: a pure function of a sentence's letters."""
    place = int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8]) / 2**64
    return "test" if place < share else "val" if place < 2 * share else "train"


# --- a dataset -----------------------------------------------------------------------------------


def pairs_of(source: Source, tally: Tally, fields: dict[str, str]) -> Iterator[tuple[str, str]]:
    return converted(source, tally, functools.partial(pair_of, fields=fields))


def find_repeated(
    own: list[Source], others: list[Source], fields: dict[str, str], share: float
) -> tuple[dict[int, tuple[float, str, str]], frozenset[int]]:
    """The pairs of all sources whose English repeats that of an earlier one, or nearly: as
    near_duplicates. Of the others the tests and validation count. And answer_key of each Chinese
    sentence of the tests."""
    tested = set()

    def in_order() -> Iterator[tuple[str, tuple[str, str]]]:
        for roles in (["test", "val"], ["train"]):
            sources = own if roles == ["train"] else sorted([*own, *others], key=lambda s: s.path)
            for source in sources:
                names = fields if source in own else {}
                for pair in pairs_of(source, Tally(show=0), names):
                    role = role_of(letters_of(pair[0]), share)
                    if role == "test":
                        tested.add(answer_key(traditional(pair[1])))
                    if role in roles:
                        yield pair[0], pair

    return near_duplicates(in_order(), NGRAM, ALIKE), frozenset(tested)


def answer_key(chinese: str) -> int:
    return key_of(letters_of(chinese))


def read(
    source: Source,
    tally: Tally,
    fields: dict[str, str],
    share: float,
    repeated: dict[int, float],
    tested: frozenset[int],
    record_of: Callable[[str, str], Record | None],
) -> Iterator[tuple[str, Record]]:
    """The pairs that are not repeated, with their roles. record_of: None where it is too long."""
    for english, chinese in pairs_of(source, tally, fields):
        if likeness := repeated.get(key_of((english, chinese))):
            tally.aside["English the same" if likeness == 1 else "English nearly the same"] += 1
            continue
        role, chinese = role_of(letters_of(english), share), traditional(chinese)
        if role != "test" and answer_key(chinese) in tested:
            tally.aside["Chinese of a test"] += 1
        elif record := record_of(english, chinese):
            yield role, record
        else:
            tally.aside["longer than --max_tokens"] += 1


def as_text(english: str, chinese: str) -> str:
    return f"{english}\n{chinese}"


def as_conversation(tokenizer: str, max_tokens: int, english: str, chinese: str) -> Record | None:
    """English alone is asked, its Chinese answers: a model of one task needs no instruction."""
    turns = [{"role": "user", "content": english}, {"role": "assistant", "content": chinese}]
    rendered = _tokenizer(tokenizer).render(turns)[0]
    return turns if len(rendered) <= max_tokens else None  # half a sentence is no translation


_tokenizer = functools.lru_cache(load_tokenizer)


def prepare(config: Settings, kind: str, others: list[str]) -> dict:
    """Prepares config.input. others: files of the other domain, whose tests must stay unseen."""
    if not all((ROOT / name).is_file() for name in config.input if name.startswith(RAW)):
        raise UserError(f"{RAW} is not complete; run python data/fetch_data.py hongkong")
    fields = parse_fields(config.fields)
    own = find_sources(config.input, config.encoding, config.target)
    there = [name for name in others if (ROOT / name).is_file()]
    unseen = find_sources(there) if there else []
    found, tested = find_repeated(own, unseen, fields, config.val)
    near = [one for one in found.values() if one[0] < 1 and one[1]]
    for share, later, earlier in near[:: max(1, len(near) // 3)][:3]:
        print(f"left out: {later}\n    which has {share:.2f} in common with: {earlier}")
    record_of = as_text
    if kind == "sft":
        record_of = functools.partial(as_conversation, config.tokenizer, config.max_tokens)
    likeness = {key: share for key, (share, *_) in found.items()}
    chosen = functools.partial(
        read,
        fields=fields,
        share=config.val,
        repeated=likeness,
        tested=tested,
        record_of=record_of,
    )
    meta = pipeline.prepare(config, own, chosen, kind, SPLITS, {"languages": LANGUAGES})
    show_examples(own[0], chosen)
    return meta


def show_examples(source: Source, chosen: pipeline.Read, count: int = 3) -> None:
    for number, (split, record) in enumerate(chosen(source, Tally(show=0))):
        if number == count:
            break
        pair = record.split("\n") if isinstance(record, str) else [t["content"] for t in record]
        print(f"{split}: {pair[0]}\n    {pair[1]}")
