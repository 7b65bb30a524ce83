"""Scores of texts, from the texts alone: ROUGE-L, BLEU, chrF++, diversity.

BLEU and chrF++ of a corpus are sacrebleu's. It counts n-grams sentence by sentence, and the sums of
these counts give the score; so sentences are drawn or exchanged by their counts alone:

    interval   scores of as many sentences, drawn with replacement, 1,000 times: the middle 95 %
    p          two systems exchange sentences by the toss of a coin, 10,000 times: how often their
               scores lie as far apart as they really do (approximate randomization, Riezler and
               Maxwell, 2005)
"""

import math

import numpy as np
from rouge import Rouge
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric

ROUGE = Rouge(metrics=["rouge-l"], exclusive=False)  # its default counts unique characters only
LONGEST_FOR_ROUGE = 400  # characters of both texts; the package recurses once for each
FULL_STOP = "\ue000"  # the package would split sentences at "."
# BLEU counts Chinese characters and English words. chrF++ counts runs of characters, and words
# between blanks: in Chinese, which has few blanks, whole clauses, so it lies below plain chrF
METRICS = {"bleu": BLEU(tokenize="zh"), "chrf": CHRF(word_order=2)}
OF_SENTENCE = METRICS | {"bleu": BLEU(tokenize="zh", effective_order=True)}
NAMES = {"bleu": "BLEU", "chrf": "chrF++"}
RESAMPLES = 1000  # of an interval
EXCHANGES = 10_000  # of a p
SEED = 12345  # sacrebleu's own, so that its intervals are these


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share hits / n (Wilson, 1927)."""
    z2 = 1.959964**2
    center, half = hits + z2 / 2, math.sqrt(z2 * (hits * (n - hits) / n + z2 / 4))
    return max(0.0, (center - half) / (n + z2)), min(1.0, (center + half) / (n + z2))


# --- answers -----------------------------------------------------------------------------------


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of characters, white space left out; 0 if a text is
    empty (Lin, ROUGE, 2004)."""
    a, b = ("".join(text.split()).replace(".", FULL_STOP) for text in (answer, reference))
    if not a or not b:
        return 0.0
    if len(a) + len(b) <= LONGEST_FOR_ROUGE:
        return ROUGE.get_scores(" ".join(a), " ".join(b))[0]["rouge-l"]["f"]
    return 2 * lcs_length(a, b) / (len(a) + len(b))


def lcs_length(a: str, b: str) -> int:
    """Length of the longest common subsequence, a row of the table as the bits of an integer
    (Hyyrö, Bit-parallel LCS-length computation revisited, 2004)."""
    places = {}
    for i, char in enumerate(a):
        places[char] = places.get(char, 0) | 1 << i
    row = all_ones = (1 << len(a)) - 1
    for char in b:
        matches = row & places.get(char, 0)
        row = (row + matches | row - matches) & all_ones
    return len(a) - row.bit_count()


def ngrams(text: str, n: int) -> list[str]:
    return [text[i : i + n] for i in range(len(text) - n + 1)]


def distinct(texts: list[str], n: int = 2) -> float:
    """Share of the texts' character n-grams that are different (arXiv 1510.03055)."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def repeated(texts: list[str], n: int = 4) -> float:
    """Share of character n-grams that occurred earlier in the same text."""
    grams = [ngrams(text, n) for text in texts]
    total = sum(map(len, grams))
    return (total - sum(len(set(g)) for g in grams)) / max(1, total)


def look_up(questions: list[str], known: list[tuple[str, str]]) -> list[str]:
    """For each question the answer of the known question that shares most character pairs."""
    exact = dict(reversed(known))
    known_pairs = [set(ngrams(question, 2)) for question, _ in known]

    def nearest(question: str) -> str:
        pairs = set(ngrams(question, 2))
        overlaps = [len(pairs & other) / max(1, len(pairs | other)) for other in known_pairs]
        return known[int(np.argmax(overlaps))][1]

    return [exact[q] if q in exact else nearest(q) for q in questions]


# --- translations: BLEU and chrF++ -------------------------------------------------------------


def sentence(key: str, answer: str, reference: str) -> float:
    """BLEU or chrF++ of one sentence (bleu, chrf), 0 to 100; BLEU by the n-grams that it has room
    for, up to four."""
    return OF_SENTENCE[key].sentence_score(answer, [reference]).score


def score(metric: Metric, answers: list[str], references: list[str]) -> tuple[float, float, float]:
    """The corpus' score, 0 to 100, and the ends of its 95 % interval, by a percentile bootstrap."""
    counts = _counts(metric, answers, references)
    draw, n = np.random.default_rng(SEED), len(counts)
    resampled = (counts[draw.integers(n, size=n)].sum(axis=0) for _ in range(RESAMPLES))
    scores = sorted(_score_of(metric, total) for total in resampled)
    outside = RESAMPLES // 40
    return _score_of(metric, counts.sum(axis=0)), scores[outside], scores[-1 - outside]


def p_value(metric: Metric, a: list[str], b: list[str], references: list[str]) -> float:
    """The two-sided p of the difference between two systems' scores on the same sentences.

    An exchange that leaves the difference as large as it is counts, too. sacrebleu's PairedTest
    counts larger ones alone: by it a system differs from itself with p = 0.0001.
    """
    a, b = (_counts(metric, answers, references) for answers in (a, b))
    difference, totals = (b - a).astype(float), (a.sum(axis=0), b.sum(axis=0))

    def distance(moved: np.ndarray) -> float:
        return abs(_score_of(metric, totals[0] + moved) - _score_of(metric, totals[1] - moved))

    draw, as_far, real = np.random.default_rng(SEED), 0, distance(0)
    for rows in np.array_split(draw.integers(2, size=(EXCHANGES, len(a)), dtype=bool), 100):
        as_far += sum(distance(moved) >= real for moved in rows.astype(float) @ difference)
    return (as_far + 1) / (EXCHANGES + 1)


# sacrebleu's own tests (sacrebleu/significance.py) use these two methods
def _counts(metric: Metric, answers: list[str], references: list[str]) -> np.ndarray:
    """sacrebleu's counts for each sentence, (N, k) integers."""
    return np.array(metric._extract_corpus_statistics(answers, [references]), np.int64)


def _score_of(metric: Metric, total: np.ndarray) -> float:
    """The score of sentences whose counts add up to total (k,)."""
    return metric._compute_score_from_stats(total.tolist()).score


def signature(metric: Metric) -> str:
    """How the score and its interval were computed, in sacrebleu's notation."""
    words = metric.get_signature()
    words.update("bs", RESAMPLES)
    words.update("seed", SEED)
    return str(words)
