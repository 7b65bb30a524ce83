"""Texts: prompts, outputs and streams."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import UserError
from miniglm import text
from miniglm.checkpoint import Checkpoint
from miniglm.generation import Batch, Request, Sampling
from miniglm.prep.forms import shortened
from miniglm.text import TextStream, chat_prompt, complete, complete_question, prompt_ids, stream
from tests.helpers import TEXT, dialogue, logits, tiny_model, tiny_tokenizer


def make_checkpoint(kind: str, seed: int = 0, **options) -> Checkpoint:
    tokenizer = tiny_tokenizer()
    options = {"n_vocab": tokenizer.n_vocab, "block_size": 64} | options
    model = tiny_model(seed, **options).double()
    return Checkpoint(Path("none"), model, tokenizer, {"dataset": {"kind": kind}})


def test_streamed_pieces_join_to_the_whole_output():
    checkpoint, ended = make_checkpoint("sft"), 0
    for seed in range(6):
        sampling = Sampling(max_new_tokens=80, temperature=1.0, seed=seed)
        prompt = prompt_ids(checkpoint, TEXT[seed : seed + 9])
        [[output]] = complete(checkpoint, [prompt], sampling)
        assert "".join(stream(checkpoint, prompt, sampling)) == output.text != ""
        ended += output.ended
    assert 0 < ended < 6


def test_a_question_is_rendered_and_a_text_is_continued_as_it_is():
    asked, continued = make_checkpoint("sft"), make_checkpoint("pretrain")
    message = {"role": "user", "content": " 谁？<|end|>"}
    ids = prompt_ids(asked, message["content"])
    assert ids == asked.tokenizer.render_prompt([message])
    assert ids.count(asked.tokenizer.end) == 1
    assert continued.tokenizer.decode(prompt_ids(continued, "　　却说\n")) == "　　却说\n"
    assert prompt_ids(continued, "") == [continued.tokenizer.end_of_text]


@pytest.mark.parametrize(("kind", "wanted"), [("sft", 0.0), ("pretrain", 0.8)])
def test_the_default_temperature_is_greedy_for_answers_only(kind, wanted):
    checkpoint, prompt = make_checkpoint(kind), [5, 6]
    assert text.default_temperature(checkpoint, Sampling(temperature=0.3)).temperature == 0.3
    [[output]] = complete(checkpoint, [prompt], Sampling(9, temperature=wanted))
    assert [[output]] == list(complete(checkpoint, [prompt], Sampling(9)))
    assert "".join(stream(checkpoint, prompt, Sampling(9))) == output.text


@pytest.mark.parametrize("stop", [[], ["崇", "善类"], ["宦官。汉", "官吏"], ["桓"]])
def test_a_text_ends_before_its_first_stop_text(stop):
    tokenizer, whole = tiny_tokenizer(), "桓帝禁锢善类，崇信宦官。"
    output = TextStream(tokenizer, stop)
    pieces = [*map(output.push, tokenizer.encode(whole)), output.flush()]
    wanted = min((whole.split(text)[0] for text in stop), key=len, default=whole)
    assert "".join(pieces) == wanted
    assert output.stopped == (wanted != whole)
    assert all("\ufffd" not in piece for piece in pieces)


def test_what_may_begin_a_stop_text_is_held_back_and_no_more():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode(char)[0] for char in "abcdbcd!!"]
    output, shown = TextStream(tokenizer, ["cde", "da"]), []
    for id in ids:
        shown.append("".join(shown[-1:]) + output.push(id))
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
        def __init__(self, prompt, sampling, number, *options):
            sampling = dataclasses.replace(sampling, max_new_tokens=lengths[number])
            super().__init__(prompt, sampling, number, *options)

    monkeypatch.setattr(text, "Request", Cut)
    checkpoint.tokenizer.stop_ids = ()
    outputs = list(complete(checkpoint, [first, *others], Sampling(300, temperature=1.0), 1, 4))
    assert [len(output.ids) for [output] in outputs] == lengths
    # 119 x 5 tokens beside the long one's, three at a time
    assert running == [*[4] * 195, *[3] * 5, *[1] * 100]


def test_an_outputs_perplexity_is_that_of_its_own_tokens():
    checkpoint = make_checkpoint("sft")
    prompt = prompt_ids(checkpoint, "谁？")
    sampling = Sampling(40, temperature=1.5, top_k=40)
    for [output] in complete(checkpoint, [prompt] * 3, sampling, nats=True):
        end = [checkpoint.tokenizer.end] if output.ended else []
        ids = torch.tensor([prompt + output.ids + end])
        every = logits(checkpoint.model, ids[:, :64])[0]
        log_probs = torch.log_softmax(every, -1)[len(prompt) - 1 : -1]
        nats = -log_probs.gather(1, ids[0, len(prompt) : 64, None]).squeeze(1)
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


def test_of_thousands_of_turns_few_beginnings_are_tried():
    messages, tried = dialogue(*["谁？", "曹节。"] * 2000, "何处？"), []
    assert shortened(messages, lambda turns: tried.append(1) or len(turns) <= 8) == messages[-7:]
    assert shortened(messages, lambda turns: bool(tried.append(1))) == messages[-1:]
    assert len(tried) < 30


def test_a_question_gets_the_mark_that_it_was_trained_with():
    checkpoint = make_checkpoint("sft")
    assert complete_question(checkpoint, "孔明是谁") == "孔明是谁"
    checkpoint.run["dataset"]["question_end"] = "？"
    asked = {" 孔明是谁 ": "孔明是谁？", "孔明是谁?": "孔明是谁?", "问：3": "问：3？", "": ""}
    for question, wanted in asked.items():
        assert complete_question(checkpoint, question) == wanted
        assert prompt_ids(checkpoint, question) == prompt_ids(checkpoint, wanted)
