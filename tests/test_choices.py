"""Multiple choice: log-likelihoods against transformers on an export, prompts written out by hand,
and files that cannot be scored. tests/harness.py compares with lm-evaluation-harness itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluations
import export
from configurator import UserError
from miniglm import jsonl
from miniglm.metrics import wilson
from tests.helpers import write_lines
from tests.runs import read_json
from tests.test_sample import make_run

CEVAL, CMMLU = "id,question,A,B,C,D,answer", ",Question,A,B,C,D,Answer"
ROWS = [
    '0,"谁斩白蛇，而起义？\n（单选） ",高祖,光武帝,献帝,灵帝,A',
    "1,谁弄权？,窦武,陈蕃,曹节等宦官,桓帝,C",
    "2,帝御何殿？,长乐殿,温德殿,未央宫,殿角,B",
]
TEXTS = {
    "ceval": "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n",
    "letter": "谁弄权？\nA. 窦武\nB. 陈蕃\nC. 曹节等宦官\nD. 桓帝\n答案：",
    "option": "谁弄权？\n答案：",
    "first_letter": "谁斩白蛇，而起义？\n（单选）\nA. 高祖\nB. 光武帝\nC. 献帝\nD. 灵帝\n答案：",
    "first_option": "谁斩白蛇，而起义？\n（单选）\n答案：",
}


def write(path: Path, *rows: str, header: str = CEVAL, encoding: str = "utf-8") -> Path:
    return write_lines(path, [header, *rows], encoding)


def score(out: Path, path: Path, *flags: str) -> tuple[dict, list[dict]]:
    words = [f"--out_dir={out}", f"--dataset={path}", "--device=cpu", "--batch_size=3"]
    evaluations.main([*words, *flags])
    records = jsonl.read_records(out / "answers.jsonl", ("question", "answer"), "")
    return read_json(out / "evaluation.json"), records


def peer_log_likelihood(model, tokenizer, context: str, text: str) -> float:
    prompt, whole = (tokenizer(x, add_special_tokens=False).input_ids for x in (context, text))
    whole = whole[-model.config.max_position_embeddings - 1 :]
    with torch.no_grad():
        log_probs = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
    count = len(tokenizer(text, add_special_tokens=False).input_ids) - len(prompt)
    return sum(log_probs[i - 1, whole[i]].item() for i in range(len(whole) - count, len(whole)))


@pytest.mark.parametrize("block_size", [512, 24])
@pytest.mark.parametrize("kind", ["sft", "pretrain"])
def test_log_likelihoods_are_those_of_transformers(tmp_path, kind, block_size, capsys):
    out = make_run(tmp_path, kind, block_size=block_size)
    write(tmp_path / "dev" / "law_dev.csv", *(f"{row},因为" for row in ROWS), header=f"{CEVAL},why")
    file = write(tmp_path / "val" / "law_val.csv", *ROWS[1:])
    _, records = score(out, file, "--shots=1")
    assert ("were cut to the last 24 tokens" in capsys.readouterr().out) == (block_size == 24)
    export.main(["--format=hf", f"--out_dir={out}", f"--to={tmp_path / 'hf'}"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for way, options in (("letter", "ABCD"), ("option", ["窦武", "陈蕃", "曹节等宦官", "桓帝"])):
        example, answer = TEXTS[f"first_{way}"], {"letter": "A", "option": "高祖"}[way]
        context, blank = f"{TEXTS['ceval']}{example} {answer}\n\n{TEXTS[way]}", " "
        if kind == "sft":
            turns = [("system", TEXTS["ceval"]), ("user", example), ("assistant", answer)]
            turns = [{"role": r, "content": t} for r, t in [*turns, ("user", TEXTS[way])]]
            asks = {"tokenize": False, "add_generation_prompt": True}
            context, blank = tokenizer.apply_chat_template(turns, **asks), ""
        wanted = [
            peer_log_likelihood(model, tokenizer, context, f"{context}{blank}{text}")
            for text in options
        ]
        assert records[0][f"{way}_log_likelihoods"] == pytest.approx(wanted, abs=1e-3)


def test_the_report_holds_what_the_log_likelihoods_say(tmp_path, capsys):
    out = make_run(tmp_path, "pretrain", block_size=256)
    folder = tmp_path / "test"
    write(folder / "law.csv", *ROWS, header=CMMLU, encoding="gb18030")
    write(folder / "of_my_own.csv", *ROWS[1:], header=CMMLU)
    report, records = score(out, folder)
    assert [record["subject"] for record in records] == ["law"] * 3 + ["of_my_own"] * 2
    assert [record["answer"] for record in records] == [*"ACBCB"]
    scores = np.array(records[0]["option_log_likelihoods"])
    assert records[0]["letter"] == "ABCD"[np.argmax(records[0]["letter_log_likelihoods"])]
    assert records[0]["option"] == "ABCD"[scores.argmax()]
    assert records[0]["option_per_character"] == "ABCD"[(scores / [2, 3, 2, 2]).argmax()]
    for rows, own in ((records[3:], report["subjects"]["of_my_own"]), (records, report)):
        assert (own["n"], own["chance"]) == (len(rows), 0.25)
        for name in ("letter", "option", "option_per_character"):
            hits = sum(record[name] == record["answer"] for record in rows)
            assert own[name] == hits / len(rows)
            assert (own[f"{name}_low"], own[f"{name}_high"]) == wilson(hits, len(rows))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines if line[0] == "all"] == [["all", "5", "25.0"]]
    assert read_json(out / f"evaluation-{folder.parent.name}_test-0-shot.json") == report


def test_wilson_intervals_are_those_of_a_table():
    """Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I."""
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    for hits, n, low, high in ((0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_ceval_test_has_no_answers_so_val_is_scored(tmp_path, capsys):
    out, header = make_run(tmp_path, "pretrain"), CEVAL.removesuffix(",answer")
    file = write(tmp_path / "test" / "law_test.csv", "0,谁？,甲,乙,丙,丁", header=header)
    with pytest.raises(UserError, match=r"no answers, and there is no .*val/law_val.csv"):
        score(out, file)
    write(tmp_path / "val" / "law_val.csv", *ROWS)
    for path in (file, file.parent):
        assert score(out, path)[0]["n"] == 3
        assert "is scored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        (["0,谁？,甲,,丙,丁,A"], CEVAL, "line 2: no B"),
        (["0,谁？,甲,乙,丙,A"], "id,question,A,B,C,answer", "line 2: no D"),
        ([ROWS[1], "0,谁？,甲,乙,丙,丁,E"], CEVAL, "line 3: the answer 'E' is none of"),
        ([ROWS[1], "0,谁？,甲,乙"], CEVAL, "line 3: wrong number of columns"),
        ([], CEVAL, "is empty"),
        ([ROWS[1], f"1,谁？,甲,{'戊' * 130},丙,丁,A"], CEVAL, "line 3: an option of"),
    ],
)
def test_a_bad_file_is_refused_in_a_line(tmp_path, rows, header, words):
    file = write(tmp_path / "val" / "law_val.csv", *rows, header=header)
    with pytest.raises(UserError, match=f"law_val.csv.*{words}"):
        score(make_run(tmp_path, "pretrain"), file)


def test_other_bad_input_is_refused_in_a_line(tmp_path):
    out, file = make_run(tmp_path, "pretrain"), write(tmp_path / "val" / "law_val.csv", *ROWS)
    with pytest.raises(UserError, match=r"--shots=2: no file .*dev/law_dev.csv, nor law.csv"):
        score(out, file, "--shots=2")
    write(tmp_path / "dev" / "law.csv", ROWS[0])
    with pytest.raises(UserError, match="has only 1"):
        score(out, file, "--shots=2")
    with pytest.raises(UserError, match=r"meta.json is missing"):
        score(out, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none.csv"):
        score(out, tmp_path / "none.csv")
    file.write_bytes(CEVAL.encode() + b"\n" + bytes(range(128, 256)) * 9)
    with pytest.raises(UserError, match=r"law_val.csv.*garbage|no encoding"):
        score(out, file)
