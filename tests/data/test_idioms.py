"""Idioms: on a small table of the package's form, and on the real one where it was fetched."""

import csv
from pathlib import Path

import pytest

from configurator import ROOT, UserError
from data.idioms import prepare, prepare_sft
from data.idioms.prepare_sft import Idiom, clean, groups_of, idiom_of, questions, quotation
from data_utils import Dataset
from miniglm.prep.forms import BadRecord
from miniglm.prep.readers import Tally, converted, find_sources
from tests.helpers import tiny_tokenizer

TABLE = ROOT / "data" / "raw" / "idioms" / "idiom.csv"
ROWS = [
    ("燕雀处堂", "比喻处境危险而不自知。", "《孔丛子·论势》燕雀处屋，子母相哺，煦煦焉其相乐也。”"),
    ("形单影只", "形容孤独，没有同伴。", "唐·韩愈《祭十二郎文》两世一身，形单影只。”"),
    ("影只形孤", "犹形单影只。只有自己的身体和自己的影子。", "无"),
    ("影只形单", "形容十分孤独。", "无"),
    ("大手大脚", "原指人手大◇形容花钱不节省。", "清·曹雪芹《红楼梦》第五十一回大手大脚的。”"),
]


def write_table(path: Path, rows: list = ROWS, encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "abbreviation", "derivation", "example", "explanation", "word"])
        for number, (word, meaning, origin) in enumerate(rows):
            writer.writerow([number, "abcd", origin, "无", meaning, word])
    return path


def many(count: int) -> list[tuple]:
    """Idioms that are no variants of each other."""
    return [
        (f"{chr(0x4E00 + n)}{chr(0x5E00 + n)}为天", f"第{n}种意思。", "无") for n in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizer().save(tmp_path / "tokenizer.json")
    return tmp_path


def prepared(folder: Path, *words: str) -> Dataset:
    words = [f"--tokenizer={folder}", f"--out={folder / 'out'}", *words]
    prepare_sft.main(words)
    return Dataset(str(folder / "out"))


def test_a_quotation_gets_its_opening_mark_back():
    for origin, quoted in {
        ROWS[0][2]: "《孔丛子·论势》：“燕雀处屋，子母相哺，煦煦焉其相乐也。”",
        ROWS[4][2]: "清·曹雪芹《红楼梦》第五十一回：“大手大脚的。”",
        "明·冯梦龙《警世通言》卷十一老婆婆看着。”": "明·冯梦龙《警世通言》卷十一：“老婆婆看着。”",
        "《左传》甲乙。”《史记》丙丁。”": "",  # two of them: where does the first end?
        "": "",
        "见《史记》": "",
    }.items():
        assert quotation(origin) == quoted


def test_of_an_explanation_stray_marks_go():
    assert clean("形容害怕。同魂飞魄散”。") == "形容害怕。同魂飞魄散。"
    assert clean("原指手大◇形容不节省。") == "原指手大。形容不节省。"
    assert clean("语出“论语”。") == "语出“论语”。"


def test_an_idiom_is_asked_for_its_meaning_its_origin_and_by_its_meaning():
    meaning, quoted = "比喻处境危险而不自知。", quotation(ROWS[0][2])
    pairs = [
        tuple(turn["content"] for turn in turns)
        for turns in questions(Idiom("燕雀处堂", meaning, quoted))
    ]
    assert pairs == [
        ("“燕雀处堂”是什么意思？", f"“燕雀处堂”的意思是：{meaning}"),
        ("“燕雀处堂”出自哪里？", f"“燕雀处堂”出自{quoted}"),
        (f"哪个成语的意思是“{meaning}”？", "这个成语是“燕雀处堂”。"),
    ]
    assert len([*questions(Idiom("甲乙丙丁", "甲乙丙丁的意思。"))]) == 1  # it would tell the answer


def test_variants_of_an_idiom_are_one_group():
    groups = groups_of([Idiom(word, meaning) for word, meaning, _ in ROWS])
    assert groups["形单影只"] == groups["影只形孤"] == groups["影只形单"]
    assert len({*groups.values()}) == 3


def test_a_table_becomes_questions_split_by_idiom(folder, capsys):
    bad = [("", "没有成语。", "无"), ("甲乙丙丁", "无", "无")]
    table = write_table(folder / "a.csv", many(60) + bad, "gb18030")
    data = prepared(folder, f"--input={table}", "--val=0.3")
    asked = {
        split: [row[0]["content"] for row in data.conversations(split)] for split in data.tokens
    }
    words = {
        split: {text[1:5] for text in asked[split] if text.endswith("是什么意思？")}
        for split in asked
    }
    assert not words["train"] & words["val"]
    assert len(words["train"] | words["val"]) == 60
    assert 8 < len(words["val"]) < 30
    assert data.meta["skipped"] == {"no explanation": 1, "no idiom": 1}
    data = prepared(folder, f"--input={table}", "--val=0.3", "--n_idioms=20")
    assert data.meta["not_taken"] == {"beyond --n_idioms": 40}
    assert sum(sizes["conversations"] for sizes in data.meta["splits"].values()) == 2 * 20


def test_texts_hold_out_the_idioms_that_are_asked_in_validation(folder):
    words = [f"--input={write_table(folder / 'a.csv', many(60))}", "--val=0.3"]
    asked = prepared(folder, *words, "--n_idioms=40")
    prepare.main([f"--tokenizer={folder}", f"--out={folder / 't'}", *words])
    texts = Dataset(str(folder / "t"))
    read = asked.tokenizer.decode(texts.tokens["train"].tolist())
    for split, count in (("train", 1), ("val", 0)):
        for question, _ in asked.conversations(split):
            if question["content"].endswith("是什么意思？"):
                assert read.count(f"{question['content'][1:5]}：") == count
    assert texts.meta["records"] == 60


def test_where_no_idiom_is_for_validation_none_is_torn_apart(folder):
    table = write_table(folder / "a.csv", many(3))
    with pytest.raises(UserError, match="no record is for val"):
        prepared(folder, f"--input={table}", "--val=1e-9")
    assert [*prepared(folder, f"--input={table}", "--val=0").tokens] == ["train"]


def test_another_table_or_none_is_one_line(folder, monkeypatch):
    (folder / "a.csv").write_text("question,answer\n甲,乙\n", encoding="utf-8")
    with pytest.raises(UserError, match="it has no word or explanation or derivation"):
        prepared(folder, f"--input={folder / 'a.csv'}")
    monkeypatch.setattr(prepare_sft, "RAW", "data/raw/idioms/gone.csv")
    with pytest.raises(UserError, match=r"gone\.csv is missing; run python data/fetch_data"):
        prepared(folder)


@pytest.mark.parametrize("odd", ["甲\udc80", None, 3, ["甲"]])
def test_an_idiom_is_of_three_intact_texts(odd):
    good = {"word": "甲乙丙丁", "explanation": "甲。", "derivation": ""}
    assert idiom_of(good) == Idiom("甲乙丙丁", "甲。")
    for name in good:
        with pytest.raises(BadRecord, match=r"wrong type .not all of word"):
            idiom_of(good | {name: odd})


# --- the real table ------------------------------------------------------------------------------

needs_table = pytest.mark.skipif(
    not TABLE.is_file(), reason="the idioms are not here; run python data/fetch_data.py idioms"
)


@needs_table
def test_the_real_table_is_read_whole():
    [source] = find_sources([str(TABLE)])
    tally = Tally()
    idioms = [*converted(source, tally, idiom_of)]
    assert not tally.bad
    assert len(idioms) == 30895
    assert sum(bool(idiom.origin) for idiom in idioms) > 20000
    assert not [one for one in idioms if one.meaning.count("“") != one.meaning.count("”")]
    assert all(one.origin.count("“") == one.origin.count("”") for one in idioms)
    sizes = [*groups_of(idioms).values()]
    assert max(map(sizes.count, {*sizes[:500]})) < 100  # no chain of variants ties all together
