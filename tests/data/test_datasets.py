"""The prepare scripts of the datasets that users bring, on small files of their own forms."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configurator import UserError
from data.encyclopedia import prepare as encyclopedia
from data.firefly import prepare_sft as firefly
from data.idioms import prepare as idioms
from data.idioms import prepare_sft as idioms_sft
from data.jinyong import prepare as jinyong
from data.jinyong import prepare_sft as jinyong_sft
from data.minimind import prepare as minimind
from data.minimind import prepare_sft as minimind_sft
from data.sohu_news import prepare as sohu_news
from data.zhihu import prepare as zhihu
from data.zhihu import prepare_sft as zhihu_sft
from data_utils import Dataset
from miniglm.prep import pipeline
from miniglm.prep.forms import split_of
from tests.helpers import TEXT, dialogue, tiny_tokenizer, write_lines
from tests.runs import contents

LINES = TEXT.splitlines()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder to be in, with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save(tmp_path / "tokenizer.json")
    return tmp_path


def prepared(script, folder: Path, *words: str) -> Dataset:
    script.main([*words, f"--out={folder / 'out'}", f"--tokenizer={folder}", "--val=0.3"])
    return Dataset(str(folder / "out"))


def documents(data: Dataset, split: str) -> list[str]:
    """The texts of a split, in their order."""
    ids = data.tokens[split]
    ends = np.flatnonzero(ids == data.tokenizer.end_of_text)
    return [data.tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]


def all_documents(data: Dataset) -> list[str]:
    return sorted(documents(data, "train") + documents(data, "val"))


def all_conversations(data: Dataset) -> list[tuple]:
    turns = [row for split in ("train", "val") for row in data.conversations(split)]
    return sorted(tuple(turn["content"] for turn in row) for row in turns)


# --- novels --------------------------------------------------------------------------------------


def write_novel(folder: Path, name: str, encoding: str = "utf-8", copies: int = 200) -> Path:
    lines = [f"　　{name}第{n}段。{line}" for n in range(copies) for line in LINES]
    return write_lines(folder / name / "input.txt", lines, encoding)


def test_novels_are_taken_by_name_one_several_or_all(mine, monkeypatch):
    monkeypatch.setattr(jinyong, "RAW", "novels")
    for name, encoding in (("shediao", "utf-8"), ("baima", "gb18030"), ("xiake", "utf-16")):
        write_novel(mine / "novels", name, encoding)

    def names(*words: str) -> set[str]:
        data = prepared(jinyong, mine, *words)
        assert data.meta["records"] == 1000 * len(data.meta["sources"])
        text = "".join(all_documents(data))
        assert "　" not in text
        return {name for name in ("shediao", "baima", "xiake") if f"{name}第3段。" in text}

    assert names("--novels=baima") == names("--input=novels/b*/*") == {"baima"}
    assert names("--novels=xiake,shediao") == {"xiake", "shediao"}
    assert names() == names("--input=novels") == {"shediao", "baima", "xiake"}
    with pytest.raises(UserError, match="no file novels/luding"):
        names("--novels=baima,luding")
    with pytest.raises(UserError, match="--novels= goes without --input="):
        names("--novels=baima", "--input=novels")


# --- texts ---------------------------------------------------------------------------------------


def test_of_news_the_text_behind_the_last_mark_is_kept(mine, capsys):
    lines = [f"`1`2标题{n}`1`2　　正文{n}。{LINES[n % 5]}" for n in range(40)]
    bad = ["没有标记的一行", "`1`2只有标题`1`2", ""]
    file = write_lines(mine / "a.txt", lines + bad, "gb18030")
    data = prepared(sohu_news, mine, f"--input={file}")
    assert all_documents(data) == sorted(f"正文{n}。{LINES[n % 5]}" for n in range(40))
    assert data.meta["skipped"] == {"empty text": 1, "no separator mark": 1}
    assert f"line 41: no separator mark ({bad[0]})" in capsys.readouterr().out
    assert all(split_of(text, 0.3) == "val" for text in documents(data, "val"))
    write_lines(mine / "a.jsonl", [{"text": line} for line in lines])
    with pytest.raises(UserError, match=r"40 of 40 .* wrong type .a record is no line of text"):
        prepared(sohu_news, mine, f"--input={mine / 'a.jsonl'}")


def test_entries_may_lack_title_summary_or_sections(mine):
    sections = [{"title": "生平", "content": "生于涿县。"}, {"title": "空"}, {"content": "无题。"}]
    entries = {
        "刘备\n汉昭烈帝。\n生平\n生于涿县。\n无题。": ("刘备", "汉昭烈帝。", sections),
        "关羽\n字云长。": ("关羽", "字云长。", None),
        "张飞\n字\n翼德。": ("张飞", None, [{"title": "字", "content": "翼德。"}]),
        "没有题目的条目。": (None, "没有题目的条目。", []),
    }
    entries |= {f"条目{n}\n{LINES[n % 5]}": (f"条目{n}", LINES[n % 5], []) for n in range(30)}
    bad = [("只有题目", None, []), ("甲", 3, []), ("甲", None, ["乙"]), ("甲", None, 3)]
    names = ("title", "summary", "sections")
    values = [dict(zip(names, parts, strict=True)) for parts in [*entries.values(), *bad]]
    file = write_lines(mine / "a.jsonl", [*values, {"summary": "没有题目。"}, ["刘备"], "{"])
    data = prepared(encyclopedia, mine, f"--input={file}")
    assert all_documents(data) == sorted([*entries, "没有题目。"])
    reasons = {"broken JSON": 1, "no summary and no section": 1, "wrong type": 4}
    assert data.meta["skipped"] == reasons


def test_minimind_texts_lose_the_marks_of_its_chat_format(mine):
    texts = [{"text": f"第{n}条。{LINES[n % 5]}"} for n in range(30)]
    marked = {"text": "<|im_start|>天下大势如何？<|im_end|> <|im_start|>分久必合。<|im_end|>"}
    old = {"text": "<s>合久必分。</s>"}
    file = write_lines(mine / "a.jsonl", [*texts, marked, old, {"text": "<s></s>"}, {"body": "甲"}])
    data = prepared(minimind, mine, f"--input={file}")
    expected = [text["text"] for text in texts] + ["天下大势如何？\n分久必合。", "合久必分。"]
    assert all_documents(data) == sorted(expected)
    assert data.meta["skipped"] == {"empty text": 1, "missing field": 1}


# --- questions -----------------------------------------------------------------------------------

PAIRS = [(f"第{n}回里，{who}做了什么？", f"{who}攻打{n}城。") for n in range(20) for who in "甲乙"]


def test_zhihu_is_filtered_by_keywords_and_the_rest_is_counted(mine, capsys):
    columns = [{"INSTRUCTION": q, "RESPONSE": a, "METADATA": "{}"} for q, a in PAIRS]
    columns.append({"INSTRUCTION": "空的问题？", "RESPONSE": "", "METADATA": "{}"})
    file = mine / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns), file)
    wanted = sorted((q, a) for q, a in PAIRS if "乙" in q or "7城" in a)
    for script in (zhihu, zhihu_sft):
        data = prepared(script, mine, f"--input={file}", "--keywords=乙,7城")
        assert data.meta["not_taken"] == {"without a keyword": 40 - len(wanted)}
        assert data.meta["keywords"] == ["乙", "7城"]
        assert data.meta["skipped"] == {"empty answer": 1}
        assert f"not taken: {40 - len(wanted)} without a keyword" in capsys.readouterr().out
        if script is zhihu:
            assert all_documents(data) == sorted(f"{q}\n{a}" for q, a in wanted)
    assert all_conversations(data) == wanted


QUESTION_SETS = {
    jinyong_sft: [{"Question": q, "Answer": a} for q, a in PAIRS],
    firefly: [{"kind": "QA", "input": q, "target": a} for q, a in PAIRS],
    minimind_sft: [{"conversations": dialogue(q, a)} for q, a in PAIRS],
}


@pytest.mark.parametrize("script", QUESTION_SETS)
def test_question_sets_are_read_by_their_own_fields(mine, script):
    bad = ['{"Question": ', {"other": "甲"}, 3]
    file = write_lines(mine / "a.jsonl", [*QUESTION_SETS[script], *bad])
    data = prepared(script, mine, f"--input={file}")
    assert all_conversations(data) == sorted(PAIRS)
    assert data.meta["skipped"] == {"broken JSON": 1, "missing field": 1, "wrong type": 1}


def test_minimind_calls_and_reasoning_are_trained_and_results_are_read(mine):
    tools = [{"type": "function", "function": {"name": "translate_text", "parameters": {}}}]
    call = {"name": "translate_text", "arguments": {"text": "你好世界"}}
    turns = [
        {"role": "system", "content": "# Tools ...", "tools": json.dumps(tools)},
        {"role": "user", "content": "把'你好世界'翻译成english", "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([call])},
        {"role": "tool", "content": '{"translated_text":"Hello World"}'},
        {"role": "assistant", "content": "Hello World", "reasoning_content": "译好了。"},
    ]
    file = write_lines(mine / "a.jsonl", [{"conversations": turns}])
    words = ["--val=0", "--max_tokens=512", f"--tokenizer={mine}", f"--out={mine / 'out'}"]
    minimind_sft.main([f"--input={file}", *words])
    data = Dataset(str(mine / "out"))
    answers = [
        f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>",
        "<think>\n译好了。\n</think>\n\nHello World",
    ]
    trained = data.tokens["train"][data.mask["train"] == 1].tolist()
    assert data.tokenizer.decode(trained) == "".join(answers)
    [[system, _, called, result, answer]] = data.conversations("train")
    assert [called["content"], answer["content"]] == answers
    assert json.dumps(tools[0]) in system["content"]
    assert turns[3]["content"] in result["content"]
    assert (data.meta["skipped"], data.meta["question_end"]) == ({}, "")


@pytest.mark.parametrize("script", [firefly, zhihu, zhihu_sft])
def test_questions_are_read_by_the_fields_that_are_named(mine, script):
    lines = [{"ask": q, "reply": a, "question": "乙？", "answer": "丙。"} for q, a in PAIRS]
    file = write_lines(mine / "a.jsonl", lines)
    data = prepared(script, mine, f"--input={file}", "--fields=question=ask,answer=reply")
    if script is zhihu:
        assert all_documents(data) == sorted(f"{q}\n{a}" for q, a in PAIRS)
    else:
        assert all_conversations(data) == sorted(PAIRS)


@pytest.mark.parametrize("script", [encyclopedia, idioms, idioms_sft])
def test_where_fields_have_fixed_names_others_are_refused(mine, script):
    file = write_lines(mine / "a.jsonl", [{"body": "甲"}] * 3)
    with pytest.raises(UserError, match="'text=body': the fields of this dataset have fixed names"):
        prepared(script, mine, f"--input={file}", "--fields=text=body")


def test_a_question_that_is_nearly_an_earlier_one_is_left_out(mine, monkeypatch):
    """The same bytes from one process, which reads the file whole, and from two that share it."""
    long = "大将军窦武与太傅陈蕃为什么一起谋诛宦官曹节等人？"
    first, extra = (
        (long, "因为他弄权。"),
        [(long.replace("？", "呢？"), f"{n}。") for n in range(3)],
    )
    lines = [{"Question": q, "Answer": a} for q, a in [first, *PAIRS, *extra]]
    file = write_lines(mine / "a.jsonl", lines)
    data = prepared(jinyong_sft, mine, f"--input={file}", "--near=False")
    assert all_conversations(data) == sorted([first, *PAIRS, *extra])
    whole = contents(prepared(jinyong_sft, mine, f"--input={file}", "--processes=1").path)
    monkeypatch.setattr(pipeline, "UNIT", file.stat().st_size // 3)
    data = prepared(jinyong_sft, mine, f"--input={file}", "--processes=2")
    assert contents(data.path) == whole
    assert all_conversations(data) == sorted([first, *PAIRS])
    assert data.meta["not_taken"] == {"question nearly the same as an earlier one": 3}


@pytest.mark.parametrize(
    ("script", "text", "message"),
    [
        (jinyong_sft, "甲\n乙", "plain text, and no conversations"),
        (firefly, '{"input": "甲"}\n' * 3, "3 of 3 records are bad"),
        (zhihu, "", "nothing to write for"),
        (zhihu, None, "no input; name a file, a folder, or a glob in quotes"),
    ],
)
def test_a_file_of_another_form_is_refused_in_one_line(mine, script, text, message):
    file = mine / ("a.txt" if script is jinyong_sft else "a.jsonl")
    file.write_text(text or "", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prepared(script, mine, *([] if text is None else [f"--input={file}"]))
    assert not (mine / "out").exists()
