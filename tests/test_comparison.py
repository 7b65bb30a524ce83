"""The phases of a translator beside each other, and what COMET has said of them."""

from pathlib import Path

import pytest

import evaluations
from configurator import UserError
from miniglm import comet, jsonl
from miniglm.comparison import plain, report_name
from miniglm.metrics import EXCHANGES
from miniglm.scoring import score_translations
from tests.runs import assert_imports_without, edit_json, read_json
from tests.test_metrics import REFERENCES, worse


def write_run(
    folder: Path, answers: list[str], perplexity: float, references: list[str] = REFERENCES
) -> Path:
    """An out_dir with what evaluations.py would have written."""
    pairs = enumerate(zip(answers, references, strict=True))
    records = [
        {"question": f"sentence {n}", "reference": b, "answer": a, "ended": n % 4 > 0}
        for n, (a, b) in pairs
    ]
    name = report_name("toy_sft", "test")
    jsonl.write(folder / f"answers-{name}.jsonl", records)
    report = {"checkpoint": "step-000005", "perplexity": perplexity} | score_translations(records)
    jsonl.write_report(folder / f"evaluation-{name}.json", report)
    return folder


def compare(folder: Path, runs: list[Path], *flags: str) -> dict:
    words = [f"--compare={','.join(map(str, runs))}", f"--out={folder / 'out'}"]
    evaluations.main([*words, "--datasets=toy_sft", *flags])
    return read_json(folder / "out" / "comparison.json")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Out_dirs of three phases, compared: the second is better, the third the same again."""
    folder = tmp_path_factory.mktemp("phases")
    early, late = worse(REFERENCES, 0.4), worse(REFERENCES, 0.1)
    late[0] = "一 | 二\n*三*"
    runs = [("out-a", early, 9.5), ("out-b", late, 4.0), ("out-c", late, 3.5)]
    runs = [write_run(folder / name, *answers) for name, *answers in runs]
    [part] = compare(folder, runs, "--examples=4")["datasets"]
    return runs, part, (folder / "out" / "comparison.md").read_text(encoding="utf-8")


def test_phases_are_compared_with_the_one_before(three):
    _, part, _ = three
    first, second, third = part["phases"]
    assert (part["dataset"], part["n"]) == ("toy_sft", 64)
    assert [row["perplexity"] for row in part["phases"]] == [9.5, 4.0, 3.5]
    assert first["bleu"] < second["bleu_low"] and second["bleu"] == third["bleu"]
    assert not {"bleu_p", "chrf_p"} & {*first}
    assert (second["bleu_p"], second["chrf_p"]) == (1 / (EXCHANGES + 1),) * 2
    assert (third["bleu_p"], third["chrf_p"]) == (1, 1)


def test_the_table_has_the_figures_of_the_reports(three):
    runs, part, text = three
    lines = [line for line in text.splitlines() if "out-" in line]
    for folder, row, line in zip(runs, part["phases"], lines, strict=False):
        report = read_json(folder / "evaluation-toy_sft-test.json")
        assert row | report == row
        cells = line.strip("| ").split(" | ")
        assert cells[:2] == [plain(row["run"]), f"{row['perplexity']:.2f}"]
        assert cells[2] == f"{row['bleu']:.2f} ({row['bleu_low']:.2f} to {row['bleu_high']:.2f})"
        assert cells[-3:] == ["0.0%", "25.0%", "0.0%"]


def test_sentences_stand_side_by_side_as_they_are(three):
    _, part, text = three
    assert [example["number"] for example in part["examples"]] == [1, 17, 33, 49]
    first = part["examples"][0]
    assert (first["question"], first["reference"]) == ("sentence 0", REFERENCES[0])
    assert first["answers"][1:] == ["一 | 二\n*三*"] * 2
    assert text.count("| 一 \\| 二<br>\\*三\\* |") == 2
    assert text.count(f"| reference | {REFERENCES[16]} |") == 1


def test_what_cannot_be_compared_is_one_line_that_says_what_to_do(three, tmp_path):
    good, bad = three[0][0], tmp_path / "out-bad"
    answers, report = (
        bad / name for name in ("answers-toy_sft-test.jsonl", "evaluation-toy_sft-test.json")
    )

    def fails(words: str) -> None:
        with pytest.raises(UserError) as error:
            compare(tmp_path, (good, bad))
        remedy = f"run python evaluations.py --out_dir={bad} --dataset=toy_sft --split=test"
        assert words in str(error.value) and remedy in str(error.value)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    fails(f"no file {answers}; ")
    for count in (64, 63):
        references = REFERENCES[:count] if count < 64 else REFERENCES[::-1]
        write_run(bad, references, 2.0, references)
        fails(f"translated other sentences than {good}; ")
    report.write_text('{"perplexity": 2.0}', encoding="utf-8")
    fails("has no bleu; ")
    whole = read_json(good / report.name) | {"comet": 0.5}
    for key in ("perplexity", "chrf_low", "bleu_signature", "empty", "comet_model"):
        jsonl.write_report(report, whole | {"comet_model": "x", key: None})
        fails(f"has a damaged {key}, or none; ")
    report.write_text("[]", encoding="utf-8")
    fails("is damaged; ")
    answers.write_text('{"question": "x"}\n', encoding="utf-8")
    fails("line 1: no object with texts under question, reference, answer; ")


# --- COMET -------------------------------------------------------------------------------------


def test_what_comet_said_is_in_the_table_under_its_model(three, tmp_path):
    folder = write_run(tmp_path / "out-a", worse(REFERENCES, 0.3), 2.0)
    report = folder / "evaluation-toy_sft-test.json"
    edit_json(report, comet=0.71234, comet_model="my/model")
    [part] = compare(tmp_path, [folder, three[0][1]], "--examples=0")["datasets"]
    assert [row.get("comet") for row in part["phases"]] == [0.71234, None]
    assert part["examples"] == []
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "| COMET by my/model |" in text and "| 0.7123 |" in text


def test_the_environment_of_comet_need_not_have_what_ours_has():
    ours = ("torch", "opencc", "tiktoken", "tokenizers", "tqdm", "sacrebleu", "comet")
    assert_imports_without("miniglm.comet", *ours)


def test_comet_is_told_what_it_scores():
    with pytest.raises(UserError, match=r"no file no\.jsonl; pass --answers=, a file"):
        comet.main(["--answers=no.jsonl"])
