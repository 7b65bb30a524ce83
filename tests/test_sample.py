"""sample.py's command line: prompts, files of prompts, and a conversation."""

import io
from pathlib import Path

import pytest

import sample
from configurator import UserError
from miniglm.generation import Sampling
from miniglm.jsonl import dumps, read_records
from miniglm.text import chat_prompt, load_for_sampling, stream
from sample import read_start
from tests.helpers import TEXT, save_run, tiny_model, tiny_tokenizer, write_novel, write_questions


def write(path: Path, content: str) -> str:
    path.write_bytes(content.encode())
    return f"FILE:{path}"


def test_a_text_file_is_a_question_a_line_or_one_prompt(tmp_path):
    start = write(tmp_path / "q.txt", "\ufeff谁？\r\n\r\n何时？ \r\n何地？\r\n")
    for answers, wanted in (
        (True, ["谁？", "何时？", "何地？"]),
        (False, ["谁？\n\n何时？ \n何地？"]),
    ):
        assert [record["Question"] for record in read_start(start, answers)] == wanted
        assert read_start(" 却说\n曹操 ", answers) == [{"Question": " 却说\n曹操 "}]
    start = write(tmp_path / "p.txt", "　　却说曹操\n")
    assert read_start(start, answers=False) == [{"Question": "　　却说曹操"}]


def test_a_jsonl_file_has_questions_with_or_without_answers(tmp_path):
    records = [{"Question": "谁\u2028？", "Answer": "孔明"}, {"Question": "何时", "Answer": None}]
    start = write(tmp_path / "q.jsonl", dumps(records))
    assert read_start(start, answers=True) == read_start(start, answers=False) == records
    start = write(tmp_path / "q.jsonl", '{"Question": "谁"}\n\n{"Question": "谁", "Answer": 3}\n')
    with pytest.raises(UserError, match=r"q\.jsonl, line 3: "):
        read_start(start, True)


# --- command line ------------------------------------------------------------------------------


def make_run(folder: Path, kind: str, **options) -> Path:
    """An out_dir of a random model, with its dataset beside it: toy_sft, or toy."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(**{"n_vocab": tokenizer.n_vocab, "block_size": 128} | options)
    if kind == "sft":
        data = write_questions(folder / "toy_sft", tokenizer)
    else:
        data = write_novel(folder / "toy", tokenizer)
    return save_run(folder / "out-toy", model, tokenizer, data, kind)


def run(out: Path, *flags: str) -> None:
    sample.main([f"--out_dir={out}", "--max_new_tokens=20", "--device=cpu", *flags])


def test_one_prompt_is_printed_with_its_continuation(tmp_path, capsys, monkeypatch):
    out = make_run(tmp_path, "pretrain")
    monkeypatch.chdir(tmp_path)
    run(out, "--start=却说", "--save_path=~said.jsonl")  # no one's home folder
    [saved] = read_records(tmp_path / "~said.jsonl", ("prompt", "continuation"), "")
    assert saved["prompt"] == "却说" and saved["continuation"]
    assert capsys.readouterr().out == "却说" + saved["continuation"] + "\n"


def test_several_questions_are_saved_in_order_with_all_their_samples(tmp_path, capsys):
    out = make_run(tmp_path, "sft")
    start = write(tmp_path / "q.txt", "谁？\n何时？\n何地？\n")
    flags = ("--num_samples=2", "--temperature=1", "--batch_size=2", f"--start={start}")
    run(out, *flags, f"--save_path={tmp_path / 'a.jsonl'}")
    printed = capsys.readouterr().out
    saved = read_records(tmp_path / "a.jsonl", ("question", "answer"), "")
    wanted = ["谁？", "何时？", "何地？"]
    assert [r["question"] for r in saved] == [text for text in wanted for _ in range(2)]
    assert saved[0]["answer"] != saved[1]["answer"]
    assert all(f"问：{r['question']}\n答：{r['answer']}\n" in printed for r in saved)
    run(out, *flags, f"--save_path={tmp_path / 'a.txt'}")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8").count("答：") == 6


def test_the_end_of_a_long_text_is_continued_and_that_is_said(tmp_path, capsys):
    out, text = make_run(tmp_path, "pretrain"), TEXT.replace("\n", "")
    ids = tiny_tokenizer().encode(text)
    run(out, f"--start={text}", "--temperature=0")
    whole = capsys.readouterr()
    checkpoint = load_for_sampling(str(out), "cpu")
    wanted = "".join(stream(checkpoint, ids[-128:], Sampling(20, temperature=0.0)))
    assert whole.out == f"{text}{wanted}\n"
    assert f"has {len(ids)} tokens; the model reads only the last 128" in whole.err
    run(out, "--start=却说")
    assert "note" not in capsys.readouterr().err


def test_a_question_that_is_missing_or_too_long_is_refused(tmp_path):
    out = make_run(tmp_path, "sft")
    with pytest.raises(UserError, match="what is the question"):
        run(out, "--start= ")
    with pytest.raises(UserError, match="longer than block_size=128"):
        run(out, f"--start={TEXT}")


def test_a_question_of_a_file_that_is_too_long_does_not_end_the_others(tmp_path, capsys):
    out, long = make_run(tmp_path, "sft"), TEXT.replace("\n", "")
    run(out, f"--start={write(tmp_path / 'q.txt', f'谁？{chr(10)}{long}{chr(10)}何时？')}")
    said = capsys.readouterr()
    assert said.out.count("问：") == 2 and "问：何时？" in said.out
    assert "left out: number 2: " in said.err


def test_a_conversation_remembers_until_an_empty_line(tmp_path, monkeypatch, capsys):
    checkpoint = load_for_sampling(str(make_run(tmp_path, "sft")), "cpu")
    checkpoint.run["dataset"]["question_end"] = "？"
    lines = ["\udcbf谁", "谁弄权", "何时？", TEXT.replace("\n", ""), "", "何时？"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    asked = []
    monkeypatch.setattr(sample, "chat_prompt", lambda c, m: asked.append(m) or chat_prompt(c, m))
    sample.converse(checkpoint, Sampling(12, temperature=0.0))
    printed = capsys.readouterr().out
    assert [m["content"] for m in asked[0]] == ["谁弄权？"]
    assert [m["role"] for m in asked[1]] == ["user", "assistant", "user"]
    assert asked[1][1]["content"] in printed and asked[1][1]["content"]
    assert "error: this line is not UTF-8" in printed and "error: the prompt" in printed
    assert asked[3] == [{"role": "user", "content": "何时？"}]
