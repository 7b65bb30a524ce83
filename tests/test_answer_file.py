"""A file of questions to a file of answers: every line in its place, and interrupted runs."""

import json
import re
from pathlib import Path

import pytest

import sample
from configurator import UserError, locked
from miniglm import jsonl
from miniglm.generation import Sampling
from miniglm.text import load_for_sampling, prompt_ids, stream
from tests.helpers import TEXT
from tests.test_sample import make_run

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
    folder = tmp_path_factory.mktemp("outs")
    return {kind: make_run(folder / kind, kind) for kind in ("sft", "pretrain")}


def ask(out: Path, folder: Path, *flags: str, lines: list[str] = LINES) -> list[dict]:
    source, target = folder / "asked.jsonl", folder / "answers.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    files = [f"--input_data={source}", f"--output_data={target}"]
    sample.main([f"--out_dir={out}", *files, "--device=cpu", "--max_new_tokens=20", *flags])
    return jsonl.recover(target)


def test_every_line_keeps_its_place_and_a_bad_one_says_why(outs, tmp_path, capsys):
    answers = ask(outs["sft"], tmp_path, "--batch_size=3")
    good = [record for record in answers if "answer" in record]
    assert [record["question"] for record in good] == QUESTIONS
    checkpoint = load_for_sampling(str(outs["sft"]), "cpu")
    for record in good:  # what the question has by itself
        prompt = prompt_ids(checkpoint, record["question"])
        alone = stream(checkpoint, prompt, Sampling(20, temperature=0.0))
        assert record["answer"] == "".join(alone) != ""
    bad = {n: record["error"] for n, record in enumerate(answers) if "error" in record}
    assert list(bad) == [4, 5, 6, 7, 9, 10]  # the blank line has no place
    for number, words in ((4, "line 6: "), (5, "line 7: .*no text"), (6, "line 8: .*no text")):
        assert re.match(words, bad[number])
    assert bad[7].startswith("line 9: ") and "longer than block_size=128" in bad[7]
    printed = capsys.readouterr().out
    assert all(f"bad line: {error}\n" in printed for error in [*bad.values()][:5])
    assert f"{len(QUESTIONS)} answers, 6 bad lines" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "asked.jsonl"]


def test_several_samples_and_perplexities_are_lists(outs, tmp_path):
    flags, lines = ("--num_samples=3", "--perplexity"), ["却说", "汉"]
    for record in ask(outs["pretrain"], tmp_path, *flags, lines=lines):
        assert list(record) == ["question", "answers", "perplexities"]
        assert len(set(record["answers"])) == len(record["perplexities"]) == 3
        assert all(value > 1 for value in record["perplexities"])


@pytest.mark.parametrize("kept", [0, 30, 0.5, 0.99, 1.0])
def test_an_interrupted_run_goes_on_to_the_same_bytes(outs, tmp_path, kept, monkeypatch):
    flags = ("--temperature=1", "--num_samples=2", "--batch_size=2")
    ask(outs["sft"], tmp_path, *flags)
    whole = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").unlink()
    monkeypatch.delattr("miniglm.jsonl.write")
    with pytest.raises(AttributeError):
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
    part.write_text('{"seed": 2}\n{"question": "谁？", "answer": "曹节"}\n', encoding="utf-8")
    before = part.read_bytes()
    with pytest.raises(UserError, match="was begun with other max_new_tokens, "):
        ask(outs["sft"], tmp_path)
    assert part.read_bytes() == before
    part.unlink()
    with locked(tmp_path / "answers.jsonl"), pytest.raises(UserError, match="another run writes"):
        ask(outs["sft"], tmp_path)
    (tmp_path / "answers.jsonl").touch()
    with pytest.raises(UserError, match="exists; delete it, or pass another"):
        ask(outs["sft"], tmp_path)
    assert (tmp_path / "answers.jsonl").read_bytes() == b""


@pytest.mark.parametrize("flag", ["--start=谁", "--interactive", "--save_path=x", "--eval_mode"])
def test_what_means_nothing_beside_a_file_is_refused(outs, tmp_path, flag):
    with pytest.raises(UserError, match="means nothing beside --input_data"):
        ask(outs["sft"], tmp_path, flag)
    with pytest.raises(UserError, match="go together"):
        ask(outs["sft"], tmp_path, "--input_data=")


def test_a_file_without_a_question_is_one_line(outs, tmp_path):
    with pytest.raises(UserError, match=r"no line of .* is a question; the first: line 1"):
        ask(outs["sft"], tmp_path, lines=['{"a": 1}', "{"])
    with pytest.raises(UserError, match=r"asked\.jsonl is empty; --input_data= takes"):
        ask(outs["sft"], tmp_path, lines=[" "])
    assert [path.name for path in tmp_path.iterdir()] == ["asked.jsonl"]
