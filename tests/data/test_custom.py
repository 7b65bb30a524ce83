"""Files of one's own through data/custom/prepare.py, as its command line writes them."""

from pathlib import Path

import pytest

from configurator import UserError
from data.custom import prepare
from data_utils import Dataset
from miniglm.prep.forms import split_of
from miniglm.tokenizer import load_tokenizer
from tests.helpers import TEXT, dialogue, tiny_tokenizer, write_lines
from tests.runs import contents, error_line, run

LINES = TEXT.splitlines()
QUESTIONS = [dialogue(f"第{n}回说的是什么？", f"说的是{LINES[n % 5][:20]}。") for n in range(60)]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_texts(path: Path, copies: int = 60, encoding: str = "utf-8", first: int = 0) -> Path:
    lines = [f"　　第{n}段。{line}" for n in range(first, first + copies) for line in LINES]
    return write_lines(path, lines, encoding)


def write_questions(path: Path, pairs: list = QUESTIONS) -> Path:
    return write_lines(path, [{"messages": turns} for turns in pairs])


def prepared(folder: Path, *words: str) -> Dataset:
    prepare.main([*words, f"--out={folder / 'out'}", "--vocab_size=400"])
    return Dataset(str(folder / "out"))


def test_text_files_of_two_encodings_become_one_dataset(mine, capsys):
    write_texts(mine / "a.txt")
    write_texts(mine / "b.txt", 50, "gb18030", first=60)
    data = prepared(mine, "--input=*.txt", "--val=0.2")
    encodings = [f"utf-8: {mine / 'a.txt'}", f"gb18030: {mine / 'b.txt'}"]
    assert capsys.readouterr().out.splitlines()[:3] == [*encodings, "550 good records"]
    assert data.kind == "pretrain"
    text = {split: data.tokenizer.decode(ids) for split, ids in data.tokens.items()}
    lines = [f"第{n}段。{line}" for n in range(110) for line in LINES]
    documents = sum(sizes["documents"] for sizes in data.meta["splits"].values())
    # a line end between any two lines, but none between documents
    assert sum(map(len, text.values())) == sum(len(line) + 1 for line in lines) - documents
    assert all(line in text["train"] or line in text["val"] for line in lines)
    assert (data.meta["records"], data.meta["skipped"]) == (550, {})


def test_line_aligned_files_become_conversations(mine):
    pairs = [(f"This is line {n}.", f"这是第{n}行。") for n in range(40)]
    for name, column in zip(("a.en", "a.zh"), zip(*pairs, strict=True), strict=True):
        (mine / name).write_text("\n".join(column), encoding="gb18030")
    data = prepared(mine, "--input=a.en", "--target=a.zh", "--val=0.2")
    found = data.conversations("train") + data.conversations("val")
    assert sorted(found, key=str) == sorted((dialogue(*pair) for pair in pairs), key=str)
    assert data.meta["sources"] == [str(mine / "a.en"), str(mine / "a.zh")]


@pytest.mark.parametrize("given", ["a.jsonl", "*.jsonl"])
def test_files_of_their_own_can_be_the_validation_split(given, mine):
    write_questions(mine / "a.jsonl", QUESTIONS[:40])
    (mine / "v.jsonl").write_text('{"q": "谁？", "a": ""}\n{"q": "谁？", "a": "孔明。"}\n')
    data = prepared(mine, f"--input={given}", "--val_input=v.jsonl")
    assert list(data.conversations("train")) == QUESTIONS[:40]
    assert list(data.conversations("val")) == [dialogue("谁？", "孔明。")]
    assert (data.meta["records"], data.meta["skipped"]) == (41, {"empty answer": 1})
    assert "skipped: duplicate" not in data.meta["splits"]["val"]


def test_an_answer_of_no_weight_is_read_but_not_trained_and_what_is_dropped_is_counted(mine):
    long, tokenizer = dialogue("谁？", "孔明。", "何人？", "军师。"), tiny_tokenizer()
    long[1]["weight"] = 0
    asked = [*dialogue("谁弄权？", "曹节。"), {"role": "user", "content": "何故？"}]
    asked[1]["reasoning_content"] = "宦官。"
    bad = {"prompt": "谁？", "completion": "不知。", "label": False}
    write_lines(mine / "a.jsonl", [{"messages": long}, {"messages": asked}, *[bad] * 5])
    tokenizer.save(mine / "tokenizer.json")
    data = prepared(mine, "--input=a.jsonl", "--val=0", f"--tokenizer={mine}")
    reasoned = "<think>\n宦官。\n</think>\n\n曹节。"
    texts = ["谁？", "孔明。", "何人？", "军师。"], ["谁弄权？", reasoned]
    assert data.conversations("train") == [dialogue(*turns) for turns in texts]
    answers = ("军师。", reasoned)
    assert data.mask["train"].sum() == sum(len(tokenizer.encode(text)) + 1 for text in answers)
    trained = data.tokens["train"][data.mask["train"] == 1]
    assert tokenizer.decode(trained.tolist()) == "".join(answers)
    left_out = {"one-sided": 5, "unanswered last question": 1}
    assert (data.meta["skipped"], data.meta["not_taken"]) == ({}, left_out)


def test_bad_records_are_counted_once_however_often_they_are_read(mine, capsys):
    good = [{"messages": turns} for turns in QUESTIONS]
    write_lines(mine / "a.jsonl", [*good, {"q": "谁？"}, "x", {"text": "甲"}])
    data = prepared(mine, "--input=a.jsonl", "--val=0.2")
    for split in ("train", "val"):
        expected = [q for q in QUESTIONS if split_of(q, 0.2) == split]
        assert list(data.conversations(split)) == expected
    assert data.meta["question_end"] == "？"
    reasons = {"broken JSON": 1, "missing field": 1, "no conversation": 1}
    assert (data.meta["records"], data.meta["skipped"]) == (60, reasons)
    out = capsys.readouterr().out
    assert out.count("skipped: ") == 3
    assert "60 good records; records left out: 1 " in out


def test_questions_take_the_tokenizer_of_a_dataset_and_the_same_bytes_come_again(mine):
    write_texts(mine / "a.txt")
    base = prepared(mine, "--input=a.txt", "--val=0.2").path
    first = contents(base)
    assert contents(prepared(mine, "--input=a.txt", "--val=0.2").path) == first
    write_questions(mine / "q.jsonl")
    words = ["--input=q.jsonl", f"--tokenizer={base}", "--val=0.2", "--max_tokens=99"]
    prepare.main([*words, f"--out={mine / 'sft'}"])
    data = Dataset(str(mine / "sft"))
    assert data.tokenizer.sha256 == load_tokenizer(base).sha256
    assert data.meta["max_tokens"] == 99


def test_without_validation_all_is_trained_and_no_file_of_it_stays(mine):
    write_questions(mine / "a.jsonl")
    assert len(prepared(mine, "--input=a.jsonl", "--val=0.2").conversations("val")) > 1
    data = prepared(mine, "--input=a.jsonl", "--val=0")
    assert (data.conversations("train"), [*data.meta["splits"]]) == (QUESTIONS, ["train"])
    assert not list(data.path.glob("val*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input=a.txt", "--val=1"], "val=1 must be 0 or more and below 1"),
        (["--input=a.txt"], "only one document or question, none for validation; add more, or"),
        (["--input=o.jsonl"], "only one document or question"),
        (["--input=c.jsonl", "--val_input=c.jsonl"], "no record is for train; change --val="),
        (["--input=a.txt", "--target=b.txt", "--fields=text=a"], "--target= goes with neither"),
        (["--input=a.txt", "--tokenizer=nowhere"], "no tokenizer nowhere"),
        (["--input=c.jsonl", "--max_tokens=3"], "(8 skipped: too long); see --max_tokens="),
        (["--input=t.csv"], "t.csv has two columns called 'question'; rename or remove one"),
        (["--input=e.txt"], "; records left out: 1 empty file"),
        (["--input=k.jsonl"], "; of these not taken: 1 one-sided"),
    ],
)
def test_what_cannot_be_prepared_is_said_in_a_line_and_writes_nothing(words, message, mine):
    (mine / "a.txt").write_text(TEXT, encoding="utf-8")
    write_questions(mine / "c.jsonl", QUESTIONS[:10])
    write_questions(mine / "o.jsonl", [*QUESTIONS[:1] * 3, dialogue("第0回说的是什么？", "不知。")])
    (mine / "e.txt").write_bytes(b"")
    (mine / "k.jsonl").write_text('{"prompt": "q", "completion": "bad", "label": false}')
    (mine / "t.csv").write_text("question,question,answer\na,b,c\n")
    with pytest.raises(UserError) as caught:
        prepare.main([*words, f"--out={mine / 'out'}"])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(mine.glob("out/*"))


def test_the_command_line_prepares_and_fails_as_others_do(tmp_path):
    write_texts(tmp_path / "a.txt")
    script = str(Path(prepare.__file__))
    words = [f"--out={tmp_path / 'out'}", "--val=0.2", "--vocab_size=400"]
    done = run(script, "--input=a.txt", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train.bin: " in done.stdout
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 20)
    assert "a.txt: no encoding makes it readable" in error_line(
        run(script, "--input=a.txt", *words, cwd=tmp_path)
    )
