"""A file of questions to a file of answers: every line in its place, and interrupted runs."""

import json
import re
from pathlib import Path

import pytest

import sample
from configurator import UserError
from miniglm.answer_file import alone
from miniglm.generation import Sampling
from miniglm.text import chat, load_for_sampling, prompt_ids, stream
from tests.helpers import TEXT, save_run, tiny_model, tiny_tokenizer, write_novel, write_questions
from tests.runs import contents, error_line, run

LINES = [
    '{"question": "谁弄权？", "id": 3}',
    "帝御何殿",
    "",
    '{"Question": "谁谋诛宦官？"}',
    '{"prompt": "何时？"}',
    '{"question": "断',
    '{"answer": "温德殿"}',
    '{"question": 3}',
    json.dumps({"question": TEXT}, ensure_ascii=False),
    "汉朝\u2028自谁起义？",
    '{"question": "\\ud800"}',
    '{"question": ' + "[" * 100_000,
]
QUESTIONS = ["谁弄权？", "帝御何殿", "谁谋诛宦官？", "何时？", "汉朝\u2028自谁起义？"]


@pytest.fixture(scope="module")
def outs(tmp_path_factory) -> dict[str, Path]:
    """An out_dir that answers, and one that continues."""
    folder, tokenizer = tmp_path_factory.mktemp("outs"), tiny_tokenizer()
    model = tiny_model(n_vocab=tokenizer.n_vocab, block_size=96)
    asked = write_questions(folder / "asked", tokenizer, max_tokens=96)
    novel = write_novel(folder / "novel", tokenizer)
    return {
        "sft": save_run(folder / "sft", model, tokenizer, asked, "sft"),
        "pretrain": save_run(folder / "pretrain", model, tokenizer, novel, "pretrain"),
    }


def ask(out: Path, folder: Path, *flags: str, lines: list[str] = LINES) -> list[dict]:
    source, target = folder / "asked.jsonl", folder / "answers.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    where = [f"--out_dir={out}", f"--input_data={source}", f"--output_data={target}"]
    sample.main([*where, "--device=cpu", "--max_new_tokens=20", *flags])
    return read(target)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_every_line_keeps_its_place_and_a_bad_one_says_why(outs, tmp_path, capsys):
    answers = ask(outs["sft"], tmp_path)
    good = [record for record in answers if "answer" in record]
    assert [record["question"] for record in good] == QUESTIONS
    assert all(record["answer"] for record in good)
    bad = {n: record["error"] for n, record in enumerate(answers) if "error" in record}
    assert list(bad) == [4, 5, 6, 7, 9, 10]  # the blank line has no place
    for number, words in ((4, "line 6: "), (5, "line 7: .*no text"), (6, "line 8: .*no text")):
        assert re.match(words, bad[number])
    assert bad[7].startswith("line 9: ") and "longer than block_size=96" in bad[7]
    printed = capsys.readouterr().out
    assert all(f"bad line: {error}\n" in printed for error in [*bad.values()][:5])
    assert f"{len(QUESTIONS)} answers, 6 bad lines" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "asked.jsonl"]


def test_answers_are_those_that_each_question_has_by_itself(outs, tmp_path):
    checkpoint = load_for_sampling(str(outs["sft"]), "cpu")
    for record in ask(outs["sft"], tmp_path, "--batch_size=3"):
        if "answer" in record:
            prompt = prompt_ids(checkpoint, record["question"])
            alone = stream(checkpoint, prompt, Sampling(20, temperature=0.0))
            assert record["answer"] == "".join(alone)


def test_several_samples_and_perplexities_are_lists(outs, tmp_path):
    answers = ask(
        outs["pretrain"], tmp_path, "--num_samples=3", "--perplexity", lines=["却说", "汉"]
    )
    for record in answers:
        assert list(record) == ["question", "answers", "perplexities"]
        assert len(set(record["answers"])) == len(record["perplexities"]) == 3
        assert all(value > 1 for value in record["perplexities"])


@pytest.mark.parametrize("kept", [0, 1, 30, 0.3, 0.5, 0.99, 1.0])
def test_an_interrupted_run_goes_on_to_the_same_bytes(outs, tmp_path, kept, monkeypatch):
    flags = ("--temperature=1", "--num_samples=2", "--batch_size=2")
    ask(outs["sft"], tmp_path, *flags)
    whole = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").unlink()
    monkeypatch.setattr("miniglm.answer_file.publish", lambda part, target: None)
    with pytest.raises(FileNotFoundError):
        ask(outs["sft"], tmp_path, *flags)  # ends with its .part
    monkeypatch.undo()
    part = tmp_path / "answers.jsonl.part"
    content = part.read_bytes()
    assert content.split(b"\n", 1)[1] == whole
    part.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    ask(outs["sft"], tmp_path, *flags, "--batch_size=5")
    assert (tmp_path / "answers.jsonl").read_bytes() == whole
    assert not part.exists()


def test_what_another_run_has_begun_is_not_mixed_in(outs, tmp_path):
    part = tmp_path / "answers.jsonl.part"
    for other in ('{"settings": {}}\n{"question": "谁？", "answer": "曹节"}\n', "not json\nx\n"):
        part.write_text(other, encoding="utf-8")
        with pytest.raises(UserError, match=r"answers\.jsonl\.part was begun with other settings"):
            ask(outs["sft"], tmp_path)
        assert part.read_text(encoding="utf-8") == other


def test_a_second_run_into_the_same_file_is_refused(outs, tmp_path):
    refused = pytest.raises(UserError, match="another run writes")
    with alone(tmp_path / "answers.jsonl"), refused:
        ask(outs["sft"], tmp_path)
    ask(outs["sft"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "asked.jsonl"]


@pytest.mark.parametrize("flag", ["--start=谁", "--interactive", "--save_path=x", "--eval_mode"])
def test_what_means_nothing_beside_a_file_is_refused(outs, tmp_path, flag):
    with pytest.raises(UserError, match="means nothing beside --input_data"):
        ask(outs["sft"], tmp_path, flag)


def test_what_is_there_already_stays(outs, tmp_path):
    ask(outs["sft"], tmp_path, lines=["谁？"])
    before = contents(tmp_path)
    with pytest.raises(UserError, match="is there already; delete it, or name another"):
        ask(outs["sft"], tmp_path, lines=["谁？"])
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no file"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        ("谁？".encode("gbk"), "is not UTF-8"),
        (b'{"a": 1}\n{', "no line of .* is a question; the first: line 1"),
    ],
)
def test_a_file_without_a_question_is_one_line(outs, tmp_path, content, words):
    source = tmp_path / "asked.jsonl"
    if content is not None:
        source.write_bytes(content)
    flags = [f"--out_dir={outs['sft']}", f"--input_data={source}"]
    with pytest.raises(UserError, match=words) as error:
        sample.main([*flags, f"--output_data={tmp_path / 'a.jsonl'}", "--device=cpu"])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a.jsonl").exists()


def test_one_of_the_two_files_alone_is_refused(outs):
    done = run("sample.py", f"--out_dir={outs['sft']}", "--output_data=a.jsonl")
    assert "go together" in error_line(done)


def test_a_conversation_remembers_until_an_empty_line(outs, monkeypatch, capsys):
    checkpoint = load_for_sampling(str(outs["sft"]), "cpu")
    checkpoint.run["dataset"]["question_end"] = "？"
    said = iter(["谁弄权", "何时？", TEXT.replace("\n", ""), "", "何时？"])

    def type_in(prompt: str) -> str:
        if (line := next(said, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", type_in)
    asked = []
    monkeypatch.setattr(sample, "chat", lambda c, m, *s: asked.append(list(m)) or chat(c, m, *s))
    sample.converse(checkpoint, Sampling(12, temperature=0.0))
    printed = capsys.readouterr().out
    assert [m["content"] for m in asked[0]] == ["谁弄权？"]
    assert [m["role"] for m in asked[1]] == ["user", "assistant", "user"]
    assert asked[1][1]["content"] in printed and asked[1][1]["content"]
    assert "error: the prompt" in printed
    assert asked[3] == [{"role": "user", "content": "何时？"}]
