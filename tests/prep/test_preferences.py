"""Files of preferences through data/custom/prepare_dpo.py: pairs, marks and ranked answers."""

import math
from collections import Counter
from pathlib import Path

import pytest

from configurator import UserError
from data.custom import prepare_dpo
from data_utils import Dataset
from miniglm.prep.forms import BadRecord, preference, split_of
from miniglm.prep.preferences import best_and_worst, ranked, usable
from miniglm.prep.writer import Form, encode_pair, write_sft
from miniglm.tokenizer import load_tokenizer
from tests.data.test_finance_dpo import pairs_of
from tests.helpers import dialogue, tiny_tokenizer, write_lines
from tests.runs import assert_imports_without, toy_tokenizer
from tests.test_chat import TEMPLATES, write_base


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    toy_tokenizer().save(path)
    return path.parent


def prepared(tokenizer: Path, out: Path, *words: str) -> Dataset:
    common = [f"--tokenizer={tokenizer}", f"--out={out}", "--max_tokens=32", "--val=0.3"]
    prepare_dpo.main([*common, *words])
    return Dataset(str(out))


def test_pairs_are_shown_without_their_control_characters(tokenizer, tmp_path, capsys):
    pairs = [{"prompt": f"{n}\x1b[2J", "chosen": "甲\n乙", "rejected": "丙\a"} for n in range(9)]
    prepared(tokenizer, tmp_path / "a", f"--input={write_lines(tmp_path / 'a.jsonl', pairs)}")
    printed = capsys.readouterr().out
    assert "    better: 甲\n乙\n    worse:  丙\n" in printed
    assert not [char for char in printed if char != "\n" and not char.isprintable()]


def test_the_best_and_the_worst_are_those_by_hand():
    scores = {"甲丙": 16.6667, "甲乙甲乙": 52.0833, "甲乙": 100.0, "丙丁": 0.0}
    assert best_and_worst(scores, Counter(), 100.0) == (("甲乙", "丙丁"), "")
    del scores["甲乙"], scores["丙丁"]
    assert best_and_worst(scores, Counter(), 35.4) == (("甲乙甲乙", "甲丙"), "")
    assert best_and_worst(scores, Counter(), 35.5) == (None, "too alike")
    assert best_and_worst({"甲": 3.0, "乙": 3.0}, Counter(), 0.0) == (None, "too alike")
    assert best_and_worst({"甲": 3.0}, Counter(), 0.0) == (None, "equal")
    assert best_and_worst({}, Counter(empty=1, unfinished=3), 0.0) == (None, "unfinished")


def test_what_cannot_be_a_side_of_a_pair_has_a_reason():
    tokenizer, prompt = tiny_tokenizer(), dialogue("谁弄权？")
    long = "温德殿。" * 9
    limit = len(tokenizer.render([*prompt, *dialogue("", long)[1:]])[0])
    texts = ["曹节。", "曹节", "", " ", "窦\ufffd", "窦\0武", "曹节。", long, long + "帝"]
    ended = [True, False, *[True] * 7]
    answers = zip(texts, range(9), ended, strict=True)
    good, faults = usable(prompt, answers, tokenizer, limit)
    assert good == {"曹节。": 0, long: 7}
    counts = {"unfinished": 1, "empty": 2, "broken characters": 2}
    assert faults == counts | {"longer than --max_tokens": 1}


def test_answers_with_scores_are_pairs_by_their_margin(tokenizer, tmp_path, capsys):
    lines = [
        {"source": f"刘备到{n}？", "samples": ["荆州。", "徐州。", "洛阳"], "scores": [n, 5, 99]}
        | {"ended": [True, True, False], "split": "val" if n % 4 == 0 else "train"}
        for n in range(12)
    ]
    file = write_lines(tmp_path / "scored.jsonl", lines)
    data = prepared(tokenizer, tmp_path / "out", f"--ranked={file}", "--margin=3")
    pairs = pairs_of(data, "train") | pairs_of(data, "val")
    wanted = {n: ("徐州。", "荆州。") if n < 5 else ("荆州。", "徐州。") for n in range(12)}
    assert pairs == {f"刘备到{n}？": wanted[n] for n in range(12) if abs(n - 5) >= 3}
    assert {*pairs_of(data, "val")} == {"刘备到0？", "刘备到8？"}
    assert (data.meta["records"], data.meta["not_taken"]) == (12, {"too alike": 5})
    assert "12 good records; of these not taken: " in capsys.readouterr().out


def test_answers_in_order_need_no_scores(tokenizer, tmp_path):
    lines = [
        {name: f"刘备到{n}？", "ranked": ["荆州。", "徐州。", f"洛阳{n}。"]}
        for n, name in enumerate(["prompt", "source"] * 20)
    ]
    lines[4]["prompt"] = dialogue(lines[4]["prompt"])
    file = write_lines(tmp_path / "ranked.jsonl", lines)
    data = prepared(tokenizer, tmp_path / "out", f"--ranked={file}", "--margin=10")
    splits = [pairs_of(data, split) for split in ("train", "val")]
    assert sum(map(len, splits)) == 40
    for pairs, split in zip(splits, ("train", "val"), strict=True):
        assert all(split_of(dialogue(source), 0.3) == split for source in pairs)
        assert all(pair == ("荆州。", f"洛阳{source[3:-1]}。") for source, pair in pairs.items())


def test_two_pairs_are_enough_and_none_need_be_held_out(tokenizer, tmp_path):
    lines = [{"prompt": f"刘备到{n}？", "ranked": ["荆州。", "徐州。"]} for n in range(3)]
    file = write_lines(tmp_path / "few.jsonl", lines)
    data = prepared(tokenizer, tmp_path / "out", f"--ranked={file}", "--val=1e-9")
    assert [len(pairs_of(data, split)) for split in ("train", "val")] == [2, 1]
    lines[0]["split"] = "val"
    write_lines(file, lines)
    data = prepared(tokenizer, tmp_path / "out", f"--ranked={file}", "--val=0")
    assert {*pairs_of(data, "train")} == {"刘备到1？", "刘备到2？"}
    assert {*data.meta["splits"]} == {"train"}
    assert data.meta["not_taken"] == {"held out by their split": 1}


def test_in_a_bases_own_format_the_answers_of_a_pair_are_trained(tmp_path):
    template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(write_base(tmp_path, template))
    for prompt in (dialogue("谁？"), dialogue("何人？", "军师。", "谁？")):
        pair = prompt, "<think>\n想。\n</think>\n\n孔明。", "不知。"
        ids, mask, _ = encode_pair(pair, tokenizer, Form("dpo"))
        trained = [id for id, bit in zip(ids, mask, strict=True) if bit]
        bare = "<think>\n\n</think>\n\n不知。"
        assert tokenizer.decode(trained) == pair[1] + bare
        assert trained.count(tokenizer.end) == 2


def test_what_a_chat_template_refuses_is_counted(tmp_path):
    template = "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}"
    template += (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(write_base(tmp_path, template))
    rows = [dialogue("谁？", "孔明。"), dialogue("谁？", "孔明。", "何人？", "军师。")]
    sizes = write_sft(tmp_path / "out", tokenizer, {"train": rows}, [])["splits"]["train"]
    assert sizes["conversations"] == sizes["skipped: the chat template refuses it"] == 1


def test_the_prompt_of_a_pair_has_its_tools_and_reasoning_is_part_of_an_answer():
    tools, call = [{"name": "weather"}], {"name": "weather", "arguments": {}}
    chosen = [*dialogue("几度？"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    rejected = [*dialogue("几度？", "三度。")]
    rejected[1]["reasoning_content"] = "猜。"
    value = {"chosen": chosen, "rejected": rejected, "tools": tools}
    [asked], better, worse = preference(value)
    assert asked == {"role": "user", "content": "几度？", "tools": tools}
    assert better == '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    assert worse == "<think>\n猜。\n</think>\n\n三度。"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": "谁？", "samples": ["甲", "乙"]}, "no scores"),
        ({"prompt": "谁？", "samples": ["甲", "乙"], "scores": [1, True]}, "wrong type"),
        ({"prompt": "谁？", "samples": ["甲", "乙"], "scores": [1, math.nan]}, "wrong type"),
        ({"prompt": "谁？", "ranked": ["甲", "乙"], "ended": [1, 0]}, "wrong type"),
        ({"prompt": "谁？", "ranked": ["甲", "乙"], "split": "test"}, "unknown split"),
        ({"prompt": "谁？", "ranked": ["甲"]}, "fewer than two answers"),
        ({"prompt": "谁？", "ranked": ["甲", None]}, "wrong type"),
        ({"prompt": " ", "ranked": ["甲", "乙"]}, "empty question"),
        ({"ranked": ["甲", "乙"]}, "missing field"),
    ],
)
def test_bad_ranked_records_have_a_reason(value, reason):
    with pytest.raises(BadRecord) as error:
        ranked(value)
    assert error.value.reason == reason


def test_marks_without_any_counterpart_are_said_to_have_none(tokenizer, tmp_path):
    lines = [
        {"prompt": ask, "completion": "甲", "label": ask == "谁？"} for ask in ("谁？", "何时？")
    ]
    file = write_lines(tmp_path / "marks.jsonl", lines)
    with pytest.raises(UserError, match="no pair: no prompt of the 2 marked answers has a good"):
        prepared(tokenizer, tmp_path / "out", f"--input={file}")


def test_files_need_no_torch():
    assert_imports_without("data.custom.prepare_dpo", "torch", "sacrebleu", "openai")


def test_settings_that_mean_nothing_together_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="--ranked= does not go with --input="):
        prepared(tokenizer, tmp_path, "--input=x", "--ranked=y")
    with pytest.raises(UserError, match="--margin= needs scores; pass --ranked= with it"):
        prepared(tokenizer, tmp_path, "--input=x", "--margin=3")
