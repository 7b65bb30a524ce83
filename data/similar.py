"""Sentences that are the same, or nearly: by their letters, and by the n-grams they have in common.

    letters_of("No later than 5 p.m.!")                 nolaterthan5pm
    NearDuplicates().seen(...)                          whether an earlier one is nearly the same

For sets of pairs only: of ordinary text, exact duplicates go. What is written is not decided here.
"""

import unicodedata

import numpy as np

ALIKE = 0.8  # the share of n-grams in common (Jaccard) from which on two are nearly the same
BANDS, ROWS = 10, 3  # of the MinHash; two that have 0.8 in common share a band with p = 0.9992
ODD = np.random.default_rng(1).integers(2**63, size=8, dtype=np.uint64) * 2 + 1
LIMIT = 300_000  # sentences that later ones are compared with; bounds the memory, to some 1 GB


def letters_of(text: str) -> str:
    """A text's letters and digits, in small letters: what tells it from others."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(filter(str.isalnum, text))


class NearDuplicates:
    """Remembers sentences, and finds those like them (MinHash in bands, Broder 1997).

    MinHash proposes, and the n-grams themselves decide. `limit` sentences are remembered: later
    ones are compared with these, but not with each other.
    """

    def __init__(self, n: int = 5, limit: int = LIMIT):
        """n: characters of an n-gram; 5 for letters, 2 for Chinese."""
        draw = np.random.default_rng(0)
        self.n, self.limit = n, limit
        self.factors = draw.integers(2**63, size=(BANDS * ROWS, 1), dtype=np.uint64) * 2 + 1
        self.buckets: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]
        self.grams: list[np.ndarray] = []

    def seen(self, letters: str) -> float:
        """The share of n-grams in common with an earlier sentence, 1 for the same one, where it is
        ALIKE or more; else 0, and this sentence is remembered."""
        grams = ngrams(letters, self.n)
        smallest = (grams * self.factors).min(axis=1).reshape(BANDS, ROWS)
        keys = np.bitwise_xor.reduce(smallest * ODD[:ROWS], axis=1).tolist()
        pairs = list(zip(keys, self.buckets, strict=True))
        candidates = {place for key, bucket in pairs for place in bucket.get(key, ())}
        share = max((in_common(grams, self.grams[place]) for place in candidates), default=0)
        if share >= ALIKE:
            return share
        if len(self.grams) < self.limit:
            for key, bucket in pairs:
                bucket.setdefault(key, []).append(len(self.grams))
            self.grams.append(grams)
        return 0


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
    if not ALIKE <= len(one) / len(other) <= 1 / ALIKE:
        return 0.0  # or less than ALIKE
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
