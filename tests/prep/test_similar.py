"""Which questions and sentences count as nearly the same: held against the plain definition."""

import json
import random

import pytest

from miniglm.prep.similar import (
    NearDuplicates,
    in_common,
    key_of,
    letters_of,
    near_duplicates,
    ngrams,
)

WORDS = ["the", "fund", "may", "invest", "in", "shares", "of", "any", "bank", "which", "lists"]


def plain_share(one: str, other: str, n: int) -> float:
    """Jaccard index of the n-grams, as one would write it down."""
    a, b = ({text[i : i + n] for i in range(max(1, len(text) - n + 1))} for text in (one, other))
    return len(a & b) / len(a | b)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Random sentences, each third an earlier one with a word changed."""
    draw, found = random.Random(seed), []
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randrange(3, 25))
        if number % 3 == 2:
            words = draw.choice(found).split()
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        found.append(" ".join(words))
    return found


@pytest.mark.parametrize("n", [2, 5])
def test_the_share_in_common_is_that_of_the_n_grams(n):
    texts = [*map(letters_of, sentences(40)), "", "a", "ab", "天下大势", "天下大势分久必合"]
    for one in texts[::3]:
        for other in texts:
            expected = plain_share(one, other, n)
            assert in_common(ngrams(one, n), ngrams(other, n)) == pytest.approx(expected)


def test_nearly_the_same_ones_are_those_of_comparing_all_with_all():
    known, plain, alike = NearDuplicates(5, 0.8), [], 0.8
    wrong = 0
    for text in map(letters_of, sentences(300)):
        share, _ = known.like(text)
        shares = [one for other in plain if (one := plain_share(text, other, 5)) >= alike]
        wrong += share != pytest.approx(max(shares, default=0))
        if not shares:
            plain.append(text)
    assert 100 < len(plain) < 290
    assert wrong <= 1  # MinHash may miss one in a thousand


def test_letters_alone_tell_sentences_apart():
    assert (
        letters_of("Not later than ５ p.m.!")
        == letters_of("not later, than 5PM")
        == "notlaterthan5pm"
    )
    assert letters_of("“帝御 何殿？”") == letters_of("帝御何殿") == "帝御何殿"
    assert letters_of("§ — !") == ""


def test_the_first_of_those_alike_stays_and_whole_repetitions_are_left_to_the_writer():
    long = "大将军窦武与太傅陈蕃为什么一起谋诛宦官曹节等人？"
    questions = [long, long.replace("？", "呢？"), "帝御何殿？", long, "帝御何殿", "帝御何处？"]
    answers = "甲乙丙甲丁戊"
    pairs = [(q, [q, a]) for q, a in zip(questions, answers, strict=True)]
    found = near_duplicates(pairs, 2, 0.9)
    assert set(found) == {key_of(pairs[1][1]), key_of(pairs[4][1])}
    assert found[key_of(pairs[1][1])] == pytest.approx(22 / 23)
    assert found[key_of(pairs[4][1])] == 1
    numbers = [f"在《射雕英雄传》第{n}回里，郭靖做了什么？" for n in "三四五"]
    assert not near_duplicates([(q, q) for q in numbers], 2, 0.9)


def test_memory_is_bounded_by_the_limit():
    known = NearDuplicates(5, 0.8, limit=10)
    texts = [letters_of(f"{n} " + " ".join(random.Random(n).sample(WORDS, 9))) for n in range(50)]
    assert not any(known.like(text)[0] for text in texts)
    assert len(known.grams) == 10
    assert [known.like(text)[0] for text in texts] == [1] * 10 + [0] * 40


def test_keys_tell_records_apart_and_are_the_same_in_every_process():
    records = ["天", ["天"], [{"role": "user", "content": "天"}], ("天", "地"), "\udc80"]
    assert len({key_of(record) for record in records}) == 5
    assert key_of(("天", "地")) == key_of(["天", "地"]) == key_of(json.loads('["天", "地"]'))
    assert key_of("天") == 6485682798347461720
