"""Pairs whose questions or sentences are the same, or nearly: by the n-grams they have in common.

    letters_of("No later than 5 p.m.!")         nolaterthan5pm
    near_duplicates(pairs, 5, 0.8)              which pairs come after one that is nearly the same

For questions and parallel sentences only: of ordinary text, exact duplicates go (writer.py).
`prepare_questions` is what a prepare script for questions calls.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from miniglm.prep import pipeline
from miniglm.prep.forms import Record, parse_fields
from miniglm.prep.readers import Source, Tally, find_sources

BANDS, ROWS = 10, 3  # of the MinHash; two with 0.8 in common share a band with p = 0.9992
ODD = np.random.default_rng(1).integers(2**63, size=8, dtype=np.uint64) * 2 + 1
LIMIT = 300_000  # sentences that later ones are compared with; bounds the memory, to some 1 GB
EXAMPLES = 10_000  # near duplicates whose texts are kept, to be shown
QUESTIONS_ALIKE = 0.9  # of questions: one other character in forty, or a 呢 at the end


def letters_of(text: str) -> str:
    """A text's letters and digits, in small letters: what tells it from others."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(filter(str.isalnum, text))


def key_of(record: Record) -> int:
    """64 bits that tell a record from others."""
    text = json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


class NearDuplicates:
    """Remembers sentences, and finds those like them (MinHash in bands, Broder 1997).

    MinHash proposes, and the n-grams themselves decide. `limit` sentences are remembered: later
    ones are compared with these, but not with each other.
    """

    def __init__(self, n: int, alike: float, limit: int = LIMIT):
        """n: characters of an n-gram; alike: the share of n-grams in common (Jaccard) from which
        on two are nearly the same."""
        draw = np.random.default_rng(0)
        self.n, self.alike, self.limit = n, alike, limit
        self.factors = draw.integers(2**63, size=(BANDS * ROWS, 1), dtype=np.uint64) * 2 + 1
        self.buckets: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]
        self.grams: list[np.ndarray] = []

    def like(self, letters: str) -> tuple[float, int]:
        """The share of n-grams in common with the most similar earlier sentence, 1 for the same
        one, and the place of that; (0, place) where none is alike, and this one is remembered."""
        grams = ngrams(letters, self.n)
        smallest = (grams * self.factors).min(axis=1).reshape(BANDS, ROWS)
        keys = np.bitwise_xor.reduce(smallest * ODD[:ROWS], axis=1).tolist()
        pairs = list(zip(keys, self.buckets, strict=True))
        candidates = {place for key, bucket in pairs for place in bucket.get(key, ())}
        shares = ((in_common(grams, self.grams[place]), place) for place in candidates)
        share, place = max(shares, default=(0, 0))
        if share >= self.alike:
            return share, place
        if len(self.grams) < self.limit:
            for key, bucket in pairs:
                bucket.setdefault(key, []).append(len(self.grams))
            self.grams.append(grams)
        return 0, len(self.grams) - 1


def ngrams(letters: str, n: int) -> np.ndarray:
    """The different n-grams of a text as sorted hashes, uint64; a shorter text is one itself."""
    codes = np.frombuffer(letters.encode("utf-32-le") or bytes(4), np.uint32).astype(np.uint64)
    n = min(n, len(codes))
    length = len(codes) - n + 1
    hashes = np.zeros(length, np.uint64)
    for place in range(n):
        hashes += codes[place : place + length] * ODD[place]  # modulo 2**64
    return np.unique(hashes ^ hashes >> np.uint64(32))


def in_common(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard index of two sets of n-grams."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


# --- datasets of pairs ---------------------------------------------------------------------------


def near_duplicates(
    pairs: Iterable[tuple[str, Record]], n: int, alike: float
) -> dict[int, tuple[float, str, str]]:
    """Of pairs (question, record) those that come behind one whose question is nearly the same: the
    key of the record -> how much they have in common, its question, and the earlier one; of more
    than EXAMPLES, whose texts would fill the memory, "" in the place of both.

    A record that repeats an earlier one whole is none of these; the writer leaves it out."""
    known, keys, questions, found = NearDuplicates(n, alike), [], [], {}
    for question, record in pairs:
        key = key_of(record)
        share, place = known.like(letters_of(question))
        if not share:
            if len(keys) == place:
                keys.append(key)
                questions.append(question)
        elif keys[place] != key:
            texts = (question, questions[place]) if len(found) < EXAMPLES else ("", "")
            found.setdefault(key, (share, *texts))
    if len(known.grams) == known.limit:
        print(f"note: near duplicates of the first {known.limit:,} are found, of later ones not")
    return found


@dataclass
class QuestionSettings(pipeline.Settings):
    near: bool = True  # leave out questions that are nearly the same as an earlier one


def prepare_questions(
    config: QuestionSettings,
    read: pipeline.Read | None = None,
    sources: list[Source] | None = None,
    about: dict | None = None,
) -> dict:
    """pipeline.prepare for conversations, without near duplicates of their first questions.

    read: None is pipeline.read_records. sources: None is the files of config.input."""
    if read is None:
        fields = parse_fields(config.fields)
        read = partial(pipeline.read_records, fields=fields, want=list, val=config.val)
    sources = sources or find_sources(config.input, config.encoding)
    if config.near:
        tally = Tally(show=0)
        found = (pair for source in sources for pair in _questions(read(source, tally)))
        dropped = near_duplicates(found, 2, QUESTIONS_ALIKE)
        read = partial(without, read=read, dropped=frozenset(dropped))
    return pipeline.prepare(config, sources, read, "sft", about=about)


def _questions(found: Iterator[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    for _, turns in found:
        yield next(turn["content"] for turn in turns if turn["role"] == "user"), turns


def without(
    source: Source, tally: Tally, read: pipeline.Read, dropped: frozenset[int]
) -> Iterator[tuple[str, Record]]:
    """What `read` yields but the dropped records, which are counted."""
    for split, record in read(source, tally):
        if key_of(record) in dropped:
            tally.aside["question nearly the same as an earlier one"] += 1
        else:
            yield split, record
