"""Scores of texts against slow versions, the packages themselves, and numbers worked by hand."""

import random

import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from miniglm.metrics import (
    EXCHANGES,
    METRICS,
    RESAMPLES,
    distinct,
    lcs_length,
    look_up,
    p_value,
    repeated,
    rouge_l,
    score,
    signature,
)
from miniglm.prep.parallel import traditional
from tests.prep.test_parallel import many

# --- answers -----------------------------------------------------------------------------------


def slow_lcs(a: str, b: str) -> int:
    """The table of the textbook."""
    above = [0] * (len(b) + 1)
    for char in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if char == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def slow_rouge_l(a: str, b: str) -> float:
    a, b = "".join(a.split()), "".join(b.split())
    return 2 * slow_lcs(a, b) / max(1, len(a) + len(b))


def random_text(generator: random.Random, length: int, chars: str = "魏蜀吴哈. 。a\n") -> str:
    return "".join(generator.choices(chars, k=length))


def test_rouge_l_equals_the_f1_of_the_textbooks_lcs_on_random_pairs():
    generator = random.Random(0)
    scores = []
    for pair in range(1000):
        a, b = (random_text(generator, generator.choice([0, 1, 3, 10, 20])) for _ in range(2))
        if pair % 3 == 0:  # a repeats itself, and b is a with a hole and a new end
            a = a * generator.randint(1, 3)
            cut = generator.randint(0, len(a))
            b = a[:cut] + a[cut + 3 :] + b[:3]
        scores.append(rouge_l(a, b))
        assert scores[-1] == pytest.approx(slow_rouge_l(a, b), rel=1e-6), (a, b)
    assert min(scores) == 0 and 0.2 < sum(scores) / 1000 < 0.8
    a, b = (random_text(generator, 500, "abcdefgh") for _ in range(2))
    assert lcs_length(a, b) == lcs_length(b, a) == slow_lcs(a, b)


@pytest.mark.parametrize(
    "a, b, wanted",
    [
        ("哈哈哈哈哈哈", "哈", 2 / 7),  # LCS 1 of 6 and 1
        ("孔明是谁。" * 3, "孔明是谁。", 0.5),  # 5 of 15 and 5
        ("孔明是诸葛亮", "诸葛亮是孔明", 0.5),  # 诸葛亮, 3 of 6 and 6
        ("a.b.c", "abc", 6 / 8),  # full stops are characters
        ("魏 蜀\n吴　", "魏蜀吴", 1),  # white space is not
        (" \n　", "吴", 0),
        ("魏蜀" * 2500, "蜀魏" * 2500, 4999 / 5000),
    ],
)
def test_rouge_l_worked_by_hand(a, b, wanted):
    assert rouge_l(a, b) == rouge_l(b, a) == pytest.approx(wanted)


def test_distinct_and_repeated_worked_by_hand():
    # ab bc ca ab bc | ab: 3 different of 6
    assert distinct(["abcabc", "ab"]) == 3 / 6
    # abab baba abab baba | abab: 2 of 5 occurred before in the same text
    assert repeated(["abababa", "abab"]) == 2 / 5
    assert repeated(["aaaaa"], n=1) == 4 / 5
    assert distinct(["魏蜀吴"], n=1) == 1
    assert distinct([]) == distinct(["", "a"]) == repeated([]) == repeated(["abc"]) == 0


def test_look_up_takes_the_very_question_or_the_one_that_shares_most_character_pairs():
    known = [("孔明是谁？", "A"), ("曹操是谁？", "B"), ("孔明何时出山？", "C"), ("谁", "D")]
    known += [("曹操是谁？孔明是谁？", "E"), ("哈哈哈", "F"), ("哈哈", "G")]
    asked = ["孔明到底是谁？", "孔明于何时出山？", "孔明是谁？", "谁", "哈哈哈", "哈哈"]
    assert look_up(asked, known) == ["A", "C", "A", "D", "F", "G"]
    assert look_up([], known) == []


# --- translations ------------------------------------------------------------------------------

REFERENCES = [traditional(chinese) for _, chinese in many(64)]
FRESH = {"bleu": lambda: BLEU(tokenize="zh"), "chrf": lambda: CHRF(word_order=2)}
BOTH = pytest.mark.parametrize("name", [*METRICS])


def worse(texts: list[str], share: float, seed: int = 0) -> list[str]:
    """The texts without a share of their characters."""
    draw = random.Random(seed)
    return ["".join(char for char in text if draw.random() > share) for text in texts]


@BOTH
def test_a_corpus_and_its_interval_score_as_in_sacrebleu(name):
    for answers in (worse(REFERENCES, 0.2), ["", *REFERENCES[1:]], REFERENCES[::-1]):
        metric = FRESH[name]()
        wanted = metric.corpus_score(answers, [REFERENCES], n_bootstrap=RESAMPLES)
        value, low, high = score(METRICS[name], answers, REFERENCES)
        assert low < value == wanted.score < high
        assert (high - low) / 2 == pytest.approx(wanted._ci, rel=1e-5)  # which sums in float32
        assert signature(METRICS[name]) == str(metric.get_signature())
    assert score(METRICS[name], [""] * 64, REFERENCES) == (0, 0, 0)


@BOTH
@pytest.mark.parametrize("share", [0.21, 0.3])
def test_p_is_sacrebleus_if_no_exchange_leaves_the_difference_as_it_is(name, share):
    a, b = worse(REFERENCES, 0.2, 1), worse(REFERENCES, share, 2)
    paired = PairedTest([("a", a), ("b", b)], {name: FRESH[name]()}, [REFERENCES], "ar", EXCHANGES)
    _, [_, wanted] = paired()[1].values()
    p = p_value(METRICS[name], a, b, REFERENCES)
    assert p == pytest.approx(wanted.p_value, abs=3 / EXCHANGES)
    assert 0.05 < p < 1 if share == 0.21 else p < 0.001


@BOTH
def test_a_system_does_not_differ_from_itself_nor_by_one_sentence(name):
    answers = worse(REFERENCES, 0.2)
    assert p_value(METRICS[name], answers, answers, REFERENCES) == 1
    # whoever has the one sentence is the worse one: all exchanges lie as far apart
    assert p_value(METRICS[name], answers, [*answers[:-1], ""], REFERENCES) == 1
