"""Texts: outputs, streams, prompts, and sample.py's command line."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from configurator import UserError
from miniglm.checkpoint import Checkpoint
from miniglm.generation import Batch, Request, Sampling
from miniglm.text import (
    TextStream,
    chat_prompt,
    complete,
    complete_question,
    default_temperature,
    load_for_sampling,
    prompt_ids,
    stream,
)
from sample import read_start
from tests.helpers import (
    TEXT,
    dialogue,
    save_run,
    tiny_model,
    tiny_tokenizer,
    write_novel,
    write_questions,
)
from tests.test_generation import slow_generate

# --- text --------------------------------------------------------------------------------------


def make_checkpoint(kind: str, seed: int = 0, **options) -> Checkpoint:
    tokenizer = tiny_tokenizer()
    options = {"n_vocab": tokenizer.n_vocab, "block_size": 64} | options
    model = tiny_model(seed, **options).double()
    return Checkpoint(Path("none"), model, tokenizer, {"dataset": {"kind": kind}})


@pytest.mark.parametrize("model", ["gpt", "lstm"])
@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_batched_outputs_equal_single_ones(kind, model):
    checkpoint = make_checkpoint(kind, model=model)
    texts = ["汉朝", "桓帝禁锢善类，崇信宦官。", "谁？", ""]
    prompts = [prompt_ids(checkpoint, text) for text in texts]
    sampling = Sampling(max_new_tokens=30, temperature=1.2)
    together = list(complete(checkpoint, prompts, sampling, 2, batch_size=16))
    assert [len(outputs) for outputs in together] == [2] * 4
    for batch_size in (1, 3):
        assert list(complete(checkpoint, prompts, sampling, 2, batch_size)) == together
    for number, outputs in enumerate(together):
        for place, output in enumerate(outputs):
            stop_ids = checkpoint.tokenizer.stop_ids
            ids = slow_generate(
                checkpoint.model, prompts[number], sampling, stop_ids, (number, place)
            )
            assert output.ended == (ids[-1] in stop_ids)
            assert output.ids == ids[: len(ids) - output.ended]
            assert output.text == checkpoint.tokenizer.decode(output.ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_join_to_the_whole_output(temperature):
    checkpoint = make_checkpoint("sft")
    ended = 0
    for seed in range(6):
        sampling = Sampling(max_new_tokens=80, temperature=temperature, seed=seed)
        prompt = prompt_ids(checkpoint, TEXT[seed : seed + 9])
        [[output]] = complete(checkpoint, [prompt], sampling)
        assert "".join(stream(checkpoint, prompt, sampling)) == output.text
        assert len(output.text) > 0
        ended += output.ended
    assert 0 < ended < 6 or temperature == 0.0


def test_a_question_is_rendered_and_a_text_is_continued_as_it_is():
    asked, continued = make_checkpoint("sft"), make_checkpoint("pretrain")
    message = {"role": "user", "content": " 谁？<|end|>"}
    ids = prompt_ids(asked, message["content"])
    assert ids == asked.tokenizer.render_prompt([message])
    assert ids.count(asked.tokenizer.end) == 1
    assert continued.tokenizer.decode(prompt_ids(continued, "　　却说\n")) == "　　却说\n"
    assert prompt_ids(continued, "") == [continued.tokenizer.end_of_text]


def test_the_default_temperature_is_greedy_for_answers_only():
    for kind, wanted in (("sft", 0.0), ("pretrain", 0.8)):
        checkpoint = make_checkpoint(kind)
        assert default_temperature(checkpoint, Sampling()).temperature == wanted
        assert default_temperature(checkpoint, Sampling(temperature=0.3)).temperature == 0.3


def push_all(text: TextStream, ids: list[int]) -> list[str]:
    return [*map(text.push, ids), text.flush()]


@pytest.mark.parametrize(
    "stop, wanted",
    [
        ([], "桓帝禁锢善类，崇信宦官。"),
        (["善类"], "桓帝禁锢"),
        (["崇", "善类"], "桓帝禁锢"),
        (["宦官。汉", "官吏"], "桓帝禁锢善类，崇信宦官。"),
        (["桓"], ""),
    ],
)
def test_a_text_ends_before_its_first_stop_text(stop, wanted):
    tokenizer = tiny_tokenizer()
    text = TextStream(tokenizer, stop)
    pieces = push_all(text, tokenizer.encode("桓帝禁锢善类，崇信宦官。"))
    assert "".join(pieces) == wanted
    assert text.stopped == any(s in "桓帝禁锢善类，崇信宦官。" for s in stop)
    assert all("\ufffd" not in piece for piece in pieces)


def test_what_may_begin_a_stop_text_is_held_back_and_no_more():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode(char)[0] for char in "abcdbcd!!"]
    text, shown = TextStream(tokenizer, ["cde", "da"]), []
    for id in ids:
        shown.append("".join(shown[-1:]) + text.push(id))
    assert shown == ["a", "ab", "ab", "ab", "abcdb", "abcdb", "abcdb", "abcdbcd!", "abcdbcd!!"]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_stop_texts_end_their_own_outputs_only(batch_size):
    checkpoint = make_checkpoint("pretrain")
    prompts = [prompt_ids(checkpoint, text) for text in ("汉朝", "桓帝", "谁？", "建宁二年")]
    whole = list(complete(checkpoint, prompts, Sampling(30, temperature=1.0)))
    stop = whole[1][0].text[3:5]
    sampling = Sampling(30, temperature=1.0, stop=[stop])
    cut = list(complete(checkpoint, prompts, sampling, batch_size=batch_size))
    for [before], [after] in zip(whole, cut, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.ended == (before.ended or stop in before.text)
        assert list(stream(checkpoint, prompts[0], sampling))
    assert cut[1][0].text != whole[1][0].text


def test_prompts_are_taken_as_there_is_room():
    checkpoint, taken = make_checkpoint("pretrain"), []

    def prompts():
        for number in range(60):
            taken.append(number)
            yield prompt_ids(checkpoint, TEXT[number])

    outputs = complete(checkpoint, prompts(), Sampling(5, temperature=1.0), 1, batch_size=2)
    next(outputs)
    assert len(taken) < 20
    assert len(list(outputs)) == 59


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_one_long_output_does_not_keep_the_others_waiting(kind, monkeypatch):
    checkpoint, running = make_checkpoint(kind), []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda b: running.append(len(r := step(b))) or r)
    first, *others = [prompt_ids(checkpoint, TEXT[n]) for n in range(120)]
    lengths = [300, *[5] * 119]

    class Cut(Request):
        def __init__(self, prompt, sampling, number, *rest):
            sampling = dataclasses.replace(sampling, max_new_tokens=lengths[number])
            super().__init__(prompt, sampling, number, *rest)

    monkeypatch.setattr(sample, "Request", Cut)
    checkpoint.tokenizer.stop_ids = ()
    outputs = list(complete(checkpoint, [first, *others], Sampling(300, temperature=1.0), 1, 4))
    assert [len(output.ids) for [output] in outputs] == lengths
    # 119 x 5 tokens beside the long one's, three at a time
    assert running == [*[4] * 195, *[3] * 5, *[1] * 100]


def test_an_outputs_perplexity_is_that_of_its_own_tokens():
    checkpoint = make_checkpoint("sft")
    prompt = prompt_ids(checkpoint, "谁？")
    sampling = Sampling(40, temperature=1.5, top_k=40)
    for [output] in complete(checkpoint, [prompt] * 3, sampling, with_nats=True):
        end = [checkpoint.tokenizer.end] if output.ended else []
        text = torch.tensor([prompt + output.ids + end])
        with torch.no_grad():
            logits = checkpoint.model.head(checkpoint.model(text[:, :64]))[0]
        log_probs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        nats = -log_probs.gather(1, text[0, len(prompt) : 64, None]).squeeze(1)
        assert output.nats[: len(nats)] == pytest.approx(nats.tolist(), rel=1e-4)
        assert output.perplexity == pytest.approx(np.exp(np.mean(output.nats)))


def test_a_conversation_loses_its_oldest_turns_first():
    checkpoint = make_checkpoint("sft")
    render = checkpoint.tokenizer.render_prompt
    turns = dialogue("谁？", "曹节。", "何时？", "建宁二年四月望日。", "何地？")
    assert chat_prompt(checkpoint, turns[-1:]) == render(turns[-1:])
    system = {"role": "system", "content": "答"}
    for messages in (turns, [system, *turns]):
        ids = chat_prompt(checkpoint, messages)
        kept = [m for m in messages if m in checkpoint.tokenizer.parse(ids)]
        assert ids == render(kept) and len(ids) <= 48
        assert messages[-1] in kept and (messages[0] in kept) == (messages[0]["role"] == "system")
    with pytest.raises(UserError, match="longer than block_size=64"):
        chat_prompt(checkpoint, dialogue("谁？", "曹节。", TEXT))
    for bad in ([], turns[:2], [system]):
        with pytest.raises(UserError, match="must end with a question"):
            chat_prompt(checkpoint, bad)


def test_a_question_gets_the_mark_that_it_was_trained_with():
    checkpoint = make_checkpoint("sft")
    assert complete_question(checkpoint, "孔明是谁") == "孔明是谁"
    checkpoint.run["dataset"]["question_end"] = "？"
    for text, wanted in {
        " 孔明是谁 ": "孔明是谁？",
        "孔明是谁？": "孔明是谁？",
        "孔明是谁?": "孔明是谁?",
        "问：3": "问：3？",
        "": "",
    }.items():
        assert complete_question(checkpoint, text) == wanted
        assert prompt_ids(checkpoint, text) == prompt_ids(checkpoint, wanted)


# --- --start -----------------------------------------------------------------------------------


def records(*questions: str) -> list[dict]:
    return [{"Question": question, "Answer": None} for question in questions]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return f"FILE:{path}"


@pytest.mark.parametrize("answers", [True, False])
def test_a_start_without_file_is_the_prompt_itself(answers):
    assert read_start(" 却说\n曹操 ", answers) == records(" 却说\n曹操 ")
    assert read_start("", answers) == records("")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_text_file_is_a_question_a_line_or_one_prompt(tmp_path, mark, newline):
    lines = ["谁？", "", "何时？ ", "何地？", ""]
    start = write(tmp_path / "q.txt", mark + newline.join(lines).encode())
    assert read_start(start, answers=True) == records("谁？", "何时？", "何地？")
    assert read_start(start, answers=False) == records("谁？\n\n何时？ \n何地？")


def test_a_prompt_file_keeps_its_indent(tmp_path):
    start = write(tmp_path / "p.txt", "　　却说曹操\n")
    assert read_start(start, answers=False) == records("　　却说曹操")


def test_a_jsonl_file_has_questions_with_or_without_answers(tmp_path):
    lines = [
        '{"Question": "谁？", "Answer": "孔明"}',
        "",
        '{"Question": "何时？", "Answer": null, "Other": 3}',
        '{"Question": " 何地\\n？"}',
    ]
    wanted = [
        {"Question": "谁？", "Answer": "孔明"},
        {"Question": "何时？", "Answer": None},
        {"Question": " 何地\n？", "Answer": None},
    ]
    for mark, newline in itertools.product(("", "\ufeff"), ("\n", "\r\n")):
        start = write(tmp_path / "q.jsonl", mark + newline.join(lines))
        assert read_start(start, True) == read_start(start, False) == wanted


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line_of_jsonl(tmp_path, char):
    record = {"Question": f"谁{char}？", "Answer": f"孔明{char}也"}
    start = write(tmp_path / "q.jsonl", json.dumps(record, ensure_ascii=False) + "\n")
    assert read_start(start, True) == [record]


@pytest.mark.parametrize(
    "bad", ["{", "[1]", '"谁"', "null", "3", '{"question": "谁"}', '{"Question": 3}']
)
def test_a_bad_line_is_named_by_its_number(tmp_path, bad):
    start = write(tmp_path / "q.jsonl", f'{{"Question": "谁"}}\n\n{bad}\n')
    with pytest.raises(UserError, match=r"q\.jsonl, line 3: ") as error:
        read_start(start, True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no file"),
        ("", "is empty"),
        ("\ufeff \n\n", "is empty"),
        ("谁？".encode("gbk"), "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["q.txt", "q.jsonl"])
def test_a_file_that_gives_no_prompt_is_named(tmp_path, content, words, name):
    start = f"FILE:{tmp_path / name}" if content is None else write(tmp_path / name, content)
    with pytest.raises(UserError, match=rf"{name}.*{words}|{words}.*{name}") as error:
        read_start(start, True)
    assert "\n" not in str(error.value)


# --- command line ------------------------------------------------------------------------------


def make_run(tmp_path: Path, kind: str) -> Path:
    tokenizer = tiny_tokenizer()
    model = tiny_model(n_vocab=tokenizer.n_vocab, block_size=128)
    make_data = write_questions if kind == "sft" else write_novel
    data = make_data(tmp_path / "data", tokenizer)
    return save_run(tmp_path / "out", model, tokenizer, data, kind)


def run(out: Path, *flags: str) -> None:
    sample.main([f"--out_dir={out}", "--max_new_tokens=20", "--device=cpu", *flags])


def test_one_prompt_is_printed_with_its_continuation(tmp_path, capsys):
    out = make_run(tmp_path, "pretrain")
    run(out, "--start=却说", f"--save_path={tmp_path / 'said.jsonl'}")
    [line] = (tmp_path / "said.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    saved = json.loads(line)
    assert saved["prompt"] == "却说" and saved["continuation"]
    assert capsys.readouterr().out == "却说" + saved["continuation"] + "\n"


def test_several_questions_are_saved_in_order_with_all_their_samples(tmp_path, capsys):
    out = make_run(tmp_path, "sft")
    start = write(tmp_path / "q.txt", "谁？\n何时？\n何地？\n")
    flags = ("--num_samples=2", "--temperature=1", "--batch_size=2", f"--start={start}")
    run(out, *flags, f"--save_path={tmp_path / 'a.jsonl'}")
    printed = capsys.readouterr().out
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    saved = [json.loads(line) for line in lines]
    assert [record["question"] for record in saved] == ["谁？"] * 2 + ["何时？"] * 2 + [
        "何地？"
    ] * 2
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
    assert f"has {len(ids)} tokens, of which the model reads the last 128" in whole.err
    run(out, "--start=却说")
    assert "note" not in capsys.readouterr().err


def test_a_question_that_is_missing_or_too_long_is_refused(tmp_path):
    out = make_run(tmp_path, "sft")
    with pytest.raises(UserError, match="what is the question"):
        run(out, "--start= ")
    with pytest.raises(UserError, match="longer than block_size=128"):
        run(out, f"--start={TEXT}")
    with pytest.raises(UserError, match="no checkpoint in"):
        run(tmp_path / "nothing", "--start=谁？")
