"""Scores of translations against sacrebleu itself, all exchanges counted, and texts by hand."""

import importlib.util
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from configurator import ROOT, UserError
from miniglm import translation_scores
from miniglm.prep.parallel import traditional
from miniglm.translation_scores import (
    EXCHANGES,
    METRICS,
    RESAMPLES,
    corpus_scores,
    interval,
    p_value,
    plain,
    report_name,
    score_of,
    signature,
    simplified,
    statistics,
)
from tests.prep.test_parallel import PAIRS, many
from tests.runs import error_line, run

REFERENCES = [traditional(chinese) for _, chinese in many(64)]
FRESH = {"bleu": lambda: BLEU(tokenize="zh"), "chrf": lambda: CHRF(word_order=2)}
BOTH = pytest.mark.parametrize("name", [*METRICS])


def worse(texts: list[str], share: float, seed: int = 0) -> list[str]:
    """The texts without a share of their characters."""
    draw = random.Random(seed)
    return ["".join(char for char in text if draw.random() > share) for text in texts]


def counted(name: str, answers: list[str], references: list[str] = REFERENCES) -> np.ndarray:
    return statistics(METRICS[name], answers, references)


# --- BLEU and chrF++ ---------------------------------------------------------------------------


@BOTH
def test_a_corpus_scores_what_sacrebleu_says(name):
    for answers in (worse(REFERENCES, 0.2), ["", *REFERENCES[1:]], REFERENCES[::-1]):
        metric = FRESH[name]()
        wanted = metric.corpus_score(answers, [REFERENCES]).score
        assert 0 < wanted < 100
        assert score_of(METRICS[name], counted(name, answers).sum(axis=0)) == wanted


@BOTH
def test_an_interval_is_as_wide_as_sacrebleus_own(name):
    metric, answers = FRESH[name](), worse(REFERENCES, 0.2)
    wanted = metric.corpus_score(answers, [REFERENCES], n_bootstrap=RESAMPLES)
    counts = counted(name, answers)
    low, high = interval(METRICS[name], counts)
    assert (high - low) / 2 == pytest.approx(wanted._ci, rel=1e-5)  # which sums in float32
    assert low < wanted.score < high
    assert interval(METRICS[name], counts) == (low, high)
    assert signature(METRICS[name]) == str(metric.get_signature())


@BOTH
def test_an_interval_of_equal_sentences_is_a_point(name):
    low, high = interval(
        METRICS[name], counted(name, worse(REFERENCES[:1], 0.3) * 9, REFERENCES[:1] * 9)
    )
    assert low == high < 100


@BOTH
@pytest.mark.parametrize("share", [0.21, 0.3])
def test_p_is_sacrebleus_where_no_exchange_leaves_the_difference_as_it_is(name, share):
    systems = [("one", worse(REFERENCES, 0.2, 1)), ("other", worse(REFERENCES, share, 2))]
    _, found = PairedTest(systems, {name: FRESH[name]()}, [REFERENCES], "ar", EXCHANGES)()
    _, [_, wanted] = found.values()
    p = p_value(METRICS[name], *(counted(name, answers) for _, answers in systems))
    assert p == pytest.approx(wanted.p_value, abs=3 / EXCHANGES)
    assert 0.05 < p < 1 if share == 0.21 else p < 0.001


@BOTH
def test_p_is_the_share_of_all_exchanges_that_lie_as_far_apart(name):
    one, other = (
        counted(name, worse(REFERENCES[:6], 0.3, seed), REFERENCES[:6]) for seed in (1, 2)
    )
    metric, distances = METRICS[name], []
    for swapped in itertools.product([False, True], repeat=6):
        rows = np.array(swapped)[:, None]
        scores = [
            score_of(metric, np.where(rows, *pair).sum(axis=0))
            for pair in ((other, one), (one, other))
        ]
        distances.append(abs(scores[0] - scores[1]))
    wanted = sum(distance >= distances[0] for distance in distances) / 2**6
    assert 0 < wanted < 1
    assert p_value(metric, one, other) == pytest.approx(wanted, abs=0.02)
    assert p_value(metric, other, one) == pytest.approx(wanted, abs=0.02)


@BOTH
def test_a_system_does_not_differ_from_itself_nor_by_one_sentence(name):
    one = worse(REFERENCES, 0.2)
    other = [*one[:-1], ""]
    assert p_value(METRICS[name], counted(name, one), counted(name, one)) == 1
    # whoever has the one sentence is the worse one: all exchanges lie as far apart
    assert p_value(METRICS[name], counted(name, one), counted(name, other)) == 1


# --- a whole report ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("证监会须发出书面通知。", "证监会须发书"),
        ("證監會須發出書面通知。", ""),
        ("證監會须發出書面通知。", "须"),  # one character
        ("汇丰与恒生", "汇与"),
        # characters that are Simplified for one word, and Traditional for another
        ("皇后大道中的里程碑，公布於周年大會後。", ""),
        ("余先生、范女士及姓于的人家，占地甚廣，不知所云。", ""),
        ("只有一隻船；制度與製造；面積與麵粉；征途與徵收；干預與幹事。", ""),
        # variants of Taiwan, and of taste
        ("臺灣和台灣，裡面和裏面，群眾和羣眾，為了和爲了", ""),
        ("説明、說明，税、稅，線、綫，床、牀，峰、峯，啟、啓，衞、衛，証券、證券", ""),
        ("沿着、沿著，甚麼、什麼，唸書、念書，回覆、回復，儘管、盡管，了解、瞭解", ""),
        ("年息五厘，永恒不變，恒生指數，煙熏三文魚，蚝油，涂先生", ""),
        ("東涌、鰂魚涌、深水埗、愛民邨、𨋢、嘅、佢哋", ""),
        ("Section 5(1) 2017年", ""),
        ("", ""),
    ],
)
def test_simplified_characters_by_hand(text, found):
    assert sorted(simplified(text)) == sorted(found)


def test_chinese_is_simplified_before_conversion_and_never_behind_it():
    chinese = [text for _, text in (*many(50), *PAIRS)]
    share = sum(bool(simplified(text)) for text in chinese) / len(chinese)
    assert share > 0.95  # 完 is written the same
    assert not any(simplified(traditional(text)) for text in chinese)


def records(answers: list[str], references: list[str] = REFERENCES) -> list[dict]:
    return [
        {
            "question": f"sentence {number}",
            "reference": reference,
            "answer": answer,
            "perplexity": 2.0,
            "ended": number % 4 > 0,
        }
        for number, (answer, reference) in enumerate(zip(answers, references, strict=True))
    ]


def test_a_report_of_translations_by_hand():
    answers = [*worse(REFERENCES[:5], 0.1), "基金会出售股份。", " \n", ""]
    report = corpus_scores(records(answers, REFERENCES[:8]))
    assert report["n"] == 8
    assert (report["unfinished"], report["empty"], report["simplified"]) == (2 / 8, 2 / 8, 1 / 8)
    wanted = BLEU(tokenize="zh").corpus_score(answers, [REFERENCES[:8]]).score
    assert report["bleu"] == wanted
    assert report["bleu_low"] < wanted < report["bleu_high"]
    assert "tok:zh" in report["bleu_signature"] and "nw:2" in report["chrf_signature"]
    assert report["chrf"] == CHRF(word_order=2).corpus_score(answers, [REFERENCES[:8]]).score


def test_a_system_that_says_nothing_scores_nothing():
    report = corpus_scores(records([""] * 64))
    assert [report[key] for key in ("bleu", "bleu_high", "chrf", "chrf_high")] == [0] * 4
    assert report["empty"] == 1


def test_the_environment_of_comet_need_not_have_what_ours_has():
    ours = ("torch", "opencc", "tiktoken", "tokenizers", "tqdm", "rouge", "comet")
    code = f"import sys; sys.modules |= dict.fromkeys({ours!r}); import translation_scores"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- the phases of a translator ----------------------------------------------------------------


def write_run(
    folder: Path, answers: list[str], perplexity: float, dataset: str = "toy_sft", **changes
) -> Path:
    """An out_dir with what evaluations.py would have written."""
    folder.mkdir(exist_ok=True)
    found = records(answers)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in found)
    name = report_name(dataset, "test")
    (folder / f"answers-{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    report = (
        {"checkpoint": "step-000005", "perplexity": perplexity} | corpus_scores(found) | changes
    )
    write_json(folder / f"evaluation-{name}.json", report)
    return folder


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def compare(folder: Path, runs: list[Path], *flags: str) -> dict:
    words = [f"--runs={','.join(map(str, runs))}", "--datasets=toy_sft", f"--out={folder / 'out'}"]
    translation_scores.main(["compare", *words, *flags])
    return json.loads((folder / "out" / "comparison.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with out_dirs of three phases, compared: the second is better, the third the same
    again."""
    folder = tmp_path_factory.mktemp("phases")
    early, late = worse(REFERENCES, 0.4), worse(REFERENCES, 0.1)
    late[0] = "一 | 二\n*三*"
    runs = [("out-a", early, 9.5), ("out-b", late, 4.0), ("out-c", late, 3.5)]
    runs = [write_run(folder / name, *rest) for name, *rest in runs]
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
    _, part, text = three
    lines = [line for line in text.splitlines() if "out-" in line]
    for row, line in zip(part["phases"], lines, strict=False):
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


def test_one_run_has_no_p_and_no_examples_if_none_are_wanted(three, tmp_path, capsys):
    [part] = compare(tmp_path, three[0][:1], "--examples=0")["datasets"]
    assert part["examples"] == [] and "bleu_p" not in part["phases"][0]
    shown = capsys.readouterr().out
    assert "toy_sft, test, 64 sentences" in shown and "| 9.50 |" in shown


def test_what_comet_said_stands_in_the_table_under_its_model(three, tmp_path):
    folder = write_run(tmp_path / "out-a", worse(REFERENCES, 0.3), 2.0)
    said = {
        "comet": 0.71234,
        "model": "my/model",
        "answers_sha256": translation_scores.sha256(folder / "answers-toy_sft-test.jsonl"),
    }
    write_json(folder / "comet-toy_sft-test.json", said)
    rows = compare(tmp_path, [folder, three[0][1]])["datasets"][0]["phases"]
    assert [row.get("comet") for row in rows] == [0.71234, None]
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "| COMET by my/model |" in text and "| 0.7123 |" in text
    for damage in ({"comet": "0.7"}, {"model": ["m"]}):
        write_json(folder / "comet-toy_sft-test.json", said | damage)
        with pytest.raises(UserError, match=r"comet-toy_sft-test\.json is damaged; delete it"):
            compare(tmp_path, [folder])
    write_json(folder / "comet-toy_sft-test.json", said)
    write_run(folder, worse(REFERENCES, 0.2), 2.0)
    with pytest.raises(UserError, match="is of other answers than there are now; delete it"):
        compare(tmp_path, [folder])


def test_a_last_line_without_its_newline_is_read(tmp_path):
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps(record) for record in records(REFERENCES, REFERENCES)]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert len(translation_scores.read_answers(file, "")) == len(REFERENCES)
    file.write_text("\n".join(lines)[:-5], encoding="utf-8")
    with pytest.raises(UserError, match=f"line {len(REFERENCES)}: no question"):
        translation_scores.read_answers(file, "")


def test_what_cannot_be_compared_is_one_line_that_says_what_to_do(three, tmp_path):
    remedy = "run python evaluations.py --out_dir={} --dataset=toy_sft --split=test"
    good, bad = three[0][0], tmp_path / "out-bad"
    answers, report = (
        bad / f"{x}" for x in ("answers-toy_sft-test.jsonl", "evaluation-toy_sft-test.json")
    )

    def fails(*parts: str, runs: tuple = (good, bad)) -> None:
        with pytest.raises(UserError) as error:
            compare(tmp_path, runs)
        for part in parts:
            assert part.format(bad) in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    fails("answers-toy_sft-test.jsonl is missing; ", remedy)
    write_run(bad, worse(REFERENCES, 0.2), 2.0)
    report.unlink()
    fails("evaluation-toy_sft-test.json is missing; ", remedy)
    write_run(bad, worse(REFERENCES, 0.2), 2.0, bleu=12.0)
    fails("is not of answers-toy_sft-test.jsonl beside it; ", remedy)
    write_json(report, {"perplexity": 2.0, "rouge_l": 0.2})
    fails("has no n; prepare toy_sft again if it is older", remedy)
    write_run(bad, worse(REFERENCES, 0.2), 2.0, chrf=None)
    fails("has no chrf; ", remedy)
    for text in ("{", "[]"):
        report.write_text(text, encoding="utf-8")
        fails("is damaged; ", remedy)
    write_run(bad, worse(REFERENCES, 0.2), 2.0, bleu="12")
    fails("is damaged; ", remedy)
    answers.write_text('{"question": "x"}\n', encoding="utf-8")
    fails("line 1: no question, reference and answer; ", remedy)
    answers.write_text("", encoding="utf-8")
    fails("is empty; ", remedy)
    for texts in (REFERENCES[::-1], REFERENCES[:-1]):
        lines = [json.dumps(r) + "\n" for r in records(texts, texts)]
        answers.write_text("".join(lines), encoding="utf-8")
        write_json(report, {"perplexity": 2.0} | corpus_scores(records(texts, texts)))
        number = 1 if len(texts) == 64 else 64
        fails(f"translated other sentences than {good}, from number {number} on; ", remedy)
    with pytest.raises(UserError, match="which phases"):
        translation_scores.main(["compare"])
    with pytest.raises(UserError, match="unknown part 'compere'; did you mean 'compare'"):
        translation_scores.main(["compere"])


# --- COMET -------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("comet") is not None, reason="COMET is here")
def test_without_comet_one_line_says_how_to_get_it(three):
    answers = three[0][0] / "answers-toy_sft-test.jsonl"
    line = error_line(run("miniglm/translation_scores.py", "comet", f"--answers={answers}"))
    assert "COMET is not in this environment" in line and "requirements-comet.txt" in line
    assert not answers.with_name("comet-toy_sft-test.json").exists()


def test_answers_that_are_not_there_are_one_line():
    with pytest.raises(UserError, match=r"no\.jsonl is missing; pass --answers=, a file"):
        translation_scores.main(["comet", "--answers=no.jsonl"])
