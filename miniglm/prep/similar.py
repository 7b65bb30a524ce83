"""Questions or sentences that are equal, or nearly: by the n-grams they have in common.

    letters_of("No later than 5 p.m.!")         nolaterthan5pm
    near_duplicates(pairs, 5, 0.8)              which pairs nearly repeat an earlier one

For questions and parallel sentences only; of other texts only exact duplicates go (writer.py).
A prepare script for questions calls `prepare_questions`.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from miniglm.prep import pipeline
from miniglm.prep.forms import Record, first_question
from miniglm.prep.readers import Source, Tally, find_sources

BANDS, ROWS = 10, 3  # of the MinHash; two texts with 0.8 in common share a band with p = 0.9992
ODD = np.random.default_rng(1).integers(2**63, size=8, dtype=np.uint64) * 2 + 1
LIMIT = 300_000  # sentences that later ones are compared with; bounds the memory, to some 1 GB
QUESTIONS_ALIKE = 0.9  # of questions: one other character in forty, or a 呢 at the end


def letters_of(text: str) -> str:
    """A text's letters and digits in lower case, by which it is compared."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(filter(str.isalnum, text))


def key_of(record: Record) -> int:
    """64 bits of a record's hash."""
    text = json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


class NearDuplicates:
    """Remembers sentences, and finds those like them (MinHash in bands, Broder 1997).

    MinHash proposes candidates, their n-grams decide. `limit` sentences are remembered: later ones
    are compared with these, but not with each other.
    """

    def __init__(self, n: int, alike: float, limit: int = LIMIT):
        """n: characters of an n-gram; alike: two texts with this share of n-grams in common
        (Jaccard) or more are near duplicates."""
        draw = np.random.default_rng(0)
        self.n, self.alike, self.limit = n, alike, limit
        self.factors = draw.integers(2**63, size=(BANDS * ROWS, 1), dtype=np.uint64) * 2 + 1
        self.buckets: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]
        self.grams: list[np.ndarray] = []

    def like(self, letters: str) -> tuple[float, int]:
        """The share of n-grams in common with the most similar earlier sentence, 1 if it is equal,
        and its place; or (0, own place) if none is alike, and this one is remembered."""
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
    """The distinct n-grams of a text as sorted hashes, uint64; a shorter text is one itself."""
    codes = np.frombuffer(letters.encode("utf-32-le") or bytes(4), np.uint32).astype(np.uint64)
    n = min(n, len(codes))
    length = len(codes) - n + 1
    hashes = np.zeros(length, np.uint64)
    for place in range(n):
        hashes += codes[place : place + length] * ODD[place]  # modulo 2**64
    return np.unique(hashes ^ hashes >> np.uint64(32))


def in_common(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of two sets of n-grams."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


# --- datasets of pairs ---------------------------------------------------------------------------


def near_duplicates(pairs: Iterable[tuple[str, Record]], n: int, alike: float) -> dict[int, float]:
    """The pairs (question, record) whose question nearly repeats an earlier one: the key of the
    record -> the share of n-grams in common.

    Records that repeat an earlier one in full are not among them; the writer leaves those out."""
    known, keys, repeated = NearDuplicates(n, alike), [], {}
    for question, record in pairs:
        key = key_of(record)
        share, place = known.like(letters_of(question))
        if not share:
            if len(keys) == place:
                keys.append(key)
        elif keys[place] != key:
            repeated.setdefault(key, share)
    if len(known.grams) == known.limit:
        print(f"note: only near duplicates of the first {known.limit:,} are found")
    return repeated


@dataclass
class QuestionSettings(pipeline.Settings):
    near: bool = True  # leave out questions that are nearly the same as an earlier one


read_questions = partial(pipeline.read_records, want=list)


def prepare_questions(
    config: QuestionSettings,
    read: pipeline.Read = read_questions,
    sources: list[Source] | None = None,
    splits: tuple[str, ...] | None = None,
    more_meta: dict | None = None,
) -> dict:
    """pipeline.prepare for conversations, without near duplicates of their first questions."""
    sources = sources or find_sources(config.input, config.encoding)
    if config.near:
        reads = pipeline.read_unit(config, read, sources, Tally(quiet=True))
        pairs = ((first_question(turns), turns) for _, turns in reads)
        read = partial(without, read, {*near_duplicates(pairs, 2, QUESTIONS_ALIKE)})
    return pipeline.prepare(config, read, "sft", sources, splits, more_meta)


def without(
    read: pipeline.Read, dropped: set[int], config: QuestionSettings, source: Source, tally: Tally
) -> pipeline.Reads:
    """The records that `read` yields, but those whose keys are dropped; they are counted."""
    for split, record in read(config, source, tally):
        if key_of(record) in dropped:
            tally.aside["question nearly the same as an earlier one"] += 1
        else:
            yield split, record
