"""Generated ids against a slow reference without a cache, and the command line around them."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from checkpoint import Checkpoint
from configurator import UserError
from sample import Sampling, choose, complete, generate, prompt_ids, read_start, stream
from tests.helpers import (
    ALL_MODELS,
    TEXT,
    random_ids,
    save_run,
    tiny_model,
    tiny_tokenizer,
    write_novel,
    write_questions,
)

BLOCK = 24  # tokens, the tiny model's block_size
GREEDY = Sampling(max_new_tokens=40, temperature=0.0)
WAYS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "cold_top_k": {"temperature": 0.7, "top_k": 5},
    "hot_top_p": {"temperature": 1.5, "top_p": 0.8},
    "penalty": {"temperature": 0.0, "repetition_penalty": 1.7},
    "all": {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3},
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def slow_probs(logits: np.ndarray, sampling: Sampling, text: list[int]) -> dict[int, float]:
    """Each id that may come, likeliest first, with its probability; loops and float64 only."""
    logits = {id: float(logit) for id, logit in enumerate(logits)}
    for id in set(text) if sampling.repetition_penalty != 1 else ():
        penalty = sampling.repetition_penalty
        logits[id] = logits[id] / penalty if logits[id] > 0 else logits[id] * penalty
    order = sorted(logits, key=lambda id: -logits[id])
    if not sampling.temperature:
        return {order[0]: 1.0}
    order = order[: sampling.top_k]
    top = logits[order[0]]
    weights = [math.exp((logits[id] - top) / sampling.temperature) for id in order]
    probs, before = {}, 0.0
    for id, weight in zip(order, weights, strict=True):
        if before < sampling.top_p:
            probs[id] = weight / sum(weights)
        before += weight / sum(weights)
    return {id: prob / sum(probs.values()) for id, prob in probs.items()}


@torch.no_grad()
def next_logits(model: torch.nn.Module, text: list[int]) -> np.ndarray:
    return model.head(model(torch.tensor([text])))[0, -1].numpy()


def slow_generate(
    model: torch.nn.Module,
    prompt: list[int],
    sampling: Sampling,
    stop_ids: tuple[int, ...] = (),
    place: tuple[int, int] = (0, 0),
) -> list[int]:
    """One sample, the whole text read anew for each token; place is its prompt and sample."""
    stream = np.random.default_rng([sampling.seed, *place])
    block_size = model.config.block_size
    text, window = list(prompt), list(prompt)
    for _ in range(sampling.max_new_tokens):
        probs = slow_probs(next_logits(model, window), sampling, text)
        if sampling.temperature:
            u = stream.random()
            sums = itertools.accumulate(probs.values())
            id = next((i for i, total in zip(probs, sums, strict=True) if u < total), [*probs][-1])
        else:
            [id] = probs
        text.append(id)
        window.append(id)
        if id in stop_ids:
            break
        if len(window) > block_size:
            window = text[-max(2, block_size // 2) :]
    return text[len(prompt) :]


def fast_generate(model, prompts, sampling, *args, **kwargs) -> list[list[int]]:
    """The rows of generate."""
    rows = {}
    for step in generate(model, prompts, sampling, *args, **kwargs):
        for row, id in step:
            rows.setdefault(row, []).append(id)
    return [rows[row] for row in sorted(rows)]


def prompts_of(*lengths: int) -> list[list[int]]:
    return [random_ids(length, seed=length).tolist() for length in lengths]


PROMPTS = prompts_of(5, 1, BLOCK, 14, BLOCK - 1)


# --- the same ids ------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("options", ALL_MODELS.values(), ids=ALL_MODELS)
def test_cached_ids_equal_uncached(options, way):
    model = tiny_model(**options).double()
    sampling = Sampling(max_new_tokens=40, **way)
    slow = [slow_generate(model, p, sampling, (), (i, 0)) for i, p in enumerate(PROMPTS)]
    assert len(set(itertools.chain(*slow))) > 10
    assert fast_generate(model, PROMPTS, sampling) == slow


@pytest.mark.parametrize("kind", ["gpt", "lstm"])
@pytest.mark.parametrize("block_size", [2, 3, 7])
def test_a_small_context_goes_on_as_the_slow_one_does(block_size, kind):
    model = tiny_model(block_size=block_size, model=kind).double()
    prompts = prompts_of(1, 2, block_size)
    slow = [slow_generate(model, prompt, GREEDY) for prompt in prompts]
    assert fast_generate(model, prompts, GREEDY) == slow


def test_a_context_of_one_token_goes_on_or_is_refused():
    try:
        model = tiny_model(block_size=1)
    except UserError:
        return
    assert len(fast_generate(model, [[3]], GREEDY)[0]) == 40


@pytest.mark.parametrize("options", ALL_MODELS.values(), ids=ALL_MODELS)
def test_float32_ids_equal_uncached_up_to_the_first_near_tie(options):
    model = tiny_model(**options)
    compared = 0
    for fast, prompt in zip(fast_generate(model, PROMPTS, GREEDY), PROMPTS, strict=True):
        text, window = list(prompt), list(prompt)
        for id in fast:
            logits = next_logits(model, window)
            first, second = np.sort(logits)[:-3:-1]
            if first - second < 1e-4:
                break
            assert id == logits.argmax()
            compared += 1
            text.append(id)
            window.append(id)
            if len(window) > BLOCK:
                window = text[-BLOCK // 2 :]
    assert compared > 100


@each_way
@pytest.mark.parametrize("options", [{"n_kv_head": 2}, {"model": "lstm"}], ids=["gpt", "lstm"])
def test_several_samples_equal_those_made_one_by_one(options, way):
    model = tiny_model(**options).double()
    sampling = Sampling(max_new_tokens=30, **way)
    prompts = prompts_of(6, 20, 2)
    slow = [
        slow_generate(model, prompt, sampling, (), (row, number))
        for row, prompt in enumerate(prompts)
        for number in range(3)
    ]
    assert fast_generate(model, prompts, sampling, (), 3) == slow
    if sampling.temperature:
        assert len(set(map(tuple, slow))) == 9
    # the other samples are not there, the samples are the same
    assert fast_generate(model, prompts, sampling, (), 1) == slow[::3]


def test_a_rows_ids_depend_on_its_own_index_alone():
    model = tiny_model().double()
    sampling = Sampling(max_new_tokens=30, temperature=1.0)
    prompts = prompts_of(6, 20, 2)
    rows = fast_generate(model, prompts, sampling)
    for index, prompt in enumerate(prompts):
        assert fast_generate(model, [prompt], sampling, (), 1, index) == [rows[index]]
    others = [prompts_of(9)[0], prompts[1], prompts_of(24)[0]]
    assert fast_generate(model, others, sampling)[1] == rows[1]


def test_the_order_of_prompts_does_not_matter_to_greedy_ids():
    model = tiny_model().double()
    rows = fast_generate(model, PROMPTS, GREEDY)
    assert fast_generate(model, PROMPTS[::-1], GREEDY) == rows[::-1]


def test_another_seed_gives_another_text_and_the_same_seed_the_same():
    model = tiny_model()
    one, same, other = (
        fast_generate(model, prompts_of(6), Sampling(20, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert one == same != other


@each_way
@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_a_stop_id_ends_its_row_and_the_others_go_on(kind, way):
    model = tiny_model(model=kind).double()
    sampling = Sampling(max_new_tokens=40, **way)
    endless = fast_generate(model, PROMPTS, sampling, (), 2)
    stop_ids = (endless[2][10], endless[7][3])
    slow = [
        slow_generate(model, PROMPTS[row // 2], sampling, stop_ids, (row // 2, row % 2))
        for row in range(10)
    ]
    assert min(map(len, slow)) < 12
    assert len(set(map(len, slow))) > 1
    assert fast_generate(model, PROMPTS, sampling, stop_ids, 2) == slow
    for ids in slow:
        assert not set(ids[:-1]) & set(stop_ids)


def test_generation_stops_when_every_row_has_ended():
    model = tiny_model()
    steps = list(generate(model, PROMPTS, GREEDY, tuple(range(50))))
    assert len(steps) == 1
    assert [row for row, _ in steps[0]] == list(range(len(PROMPTS)))


@pytest.mark.parametrize("most", [1, 2, 33])
def test_no_row_is_longer_than_max_new_tokens(most):
    rows = fast_generate(tiny_model(), PROMPTS, Sampling(most, temperature=0.0))
    assert [len(ids) for ids in rows] == [most] * len(PROMPTS)


def test_ids_beyond_the_vocabulary_never_come():
    model = tiny_model(tie_weights=False)
    with torch.no_grad():
        model.lm_head.weight[50:] = 100 * model.lm_head.weight[:14]
    sampling = Sampling(max_new_tokens=30, temperature=5.0)
    rows = fast_generate(model, PROMPTS, sampling, (), 4)
    assert max(map(max, rows)) < 50


def test_dropout_of_a_loaded_model_is_off():
    model = tiny_model(dropout=0.5)
    assert fast_generate(model, PROMPTS, GREEDY) == fast_generate(tiny_model(), PROMPTS, GREEDY)


@pytest.mark.parametrize("length", [0, BLOCK + 1])
def test_a_prompt_of_no_or_too_many_tokens_is_refused(length):
    with pytest.raises(UserError, match=f"{length} tokens.*1 to {BLOCK}"):
        fast_generate(tiny_model(), [[1], [2] * length], GREEDY)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_an_impossible_setting_is_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)


# --- the choice of one id ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_the_narrowest_choice_is_greedy(options):
    model = tiny_model().double()
    sampling = Sampling(**{"max_new_tokens": 40, "temperature": 3.0} | options)
    assert fast_generate(model, PROMPTS, sampling) == fast_generate(model, PROMPTS, GREEDY)


def chi_square_is_likely(counts: np.ndarray, probs: np.ndarray) -> bool:
    """Whether counts may be draws from probs: below the 1 - 3e-5 quantile (Wilson and Hilferty)."""
    total = counts.sum()
    assert (counts[probs == 0] == 0).all()
    common = probs * total >= 5
    counts = np.append(counts[common], counts[~common].sum())
    wanted = np.append(probs[common], probs[~common].sum()) * total
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    free = len(counts) - 1
    quantile = free * (1 - 2 / (9 * free) + 4 * math.sqrt(2 / (9 * free))) ** 3
    return ((counts - wanted) ** 2 / wanted).sum() < quantile


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"top_p": 0.7},
        {"top_k": 100, "top_p": 0.999},
        {"top_k": 6, "top_p": 0.6, "repetition_penalty": 1.5},
    ],
)
def test_choices_follow_the_probabilities(options):
    sampling = Sampling(**{"temperature": 1.0} | options)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5
    text = [int(logits.argmax()), int(logits.argmin()), 4]
    probs = np.zeros(40)
    for id, prob in slow_probs(logits.numpy(), sampling, text).items():
        probs[id] = prob
    seen = torch.zeros(20_000, 40, dtype=torch.bool)
    seen[:, text] = True
    uniform = np.random.default_rng(0).random(20_000).tolist()
    ids = choose(logits.expand(20_000, -1), sampling, uniform, seen)
    counts = np.bincount(ids.numpy(), minlength=40)
    assert chi_square_is_likely(counts, probs)
    # the test itself can fail
    assert not chi_square_is_likely(counts, np.roll(probs, 1) * 0.5 + probs * 0.5 + 1e-9)


def test_the_samples_streams_are_independent():
    model = tiny_model()
    sampling = Sampling(max_new_tokens=2, temperature=1.0)
    rows = np.array(fast_generate(model, [[7]], sampling, (), 5000))
    probs = np.zeros(50)
    for id, prob in slow_probs(next_logits(model, [7]), sampling, []).items():
        probs[id] = prob
    assert chi_square_is_likely(np.bincount(rows[:, 0], minlength=50), probs)
    likeliest = int(probs.argmax())
    after = rows[rows[:, 0] == likeliest, 1]
    assert len(after) > 300
    probs = np.zeros(50)
    for id, prob in slow_probs(next_logits(model, [7, likeliest]), sampling, []).items():
        probs[id] = prob
    assert chi_square_is_likely(np.bincount(after, minlength=50), probs)


def test_the_edges_of_the_unit_interval_are_the_first_and_the_last_choice():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]]).expand(2, -1)
    edges = [0.0, 1 - 2**-53]  # the second is 1 in float32
    assert choose(logits, Sampling(temperature=1.0), edges, None).tolist() == [1, 3]
    assert choose(logits, Sampling(temperature=1.0, top_k=2), edges, None).tolist() == [1, 2]
    assert choose(logits, Sampling(temperature=1.0, top_p=0.8), edges, None).tolist() == [1, 2]
    halves = [choose(torch.zeros(1, 2), Sampling(temperature=1.0), [u], None) for u in (0, 0.5)]
    assert halves[0] != halves[1]


def test_a_penalty_lowers_positive_and_negative_logits_by_hand():
    logits = torch.tensor([[3.0, 2.0, -1.0], [-2.0, -3.0, -3.5], [3.0, 2.0, -1.0]])
    seen = torch.tensor([[True, False, False], [True, False, False], [False, True, True]])
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0)
    # 1.5 2 -1; -4 -3 -3.5; 3 1 -2
    assert choose(logits, sampling, [], seen).tolist() == [1, 1, 0]


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
        assert sample.default_temperature(checkpoint, Sampling()).temperature == wanted
        assert sample.default_temperature(checkpoint, Sampling(temperature=0.3)).temperature == 0.3


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


def test_a_question_that_is_missing_or_too_long_is_refused(tmp_path):
    out = make_run(tmp_path, "sft")
    with pytest.raises(UserError, match="what is the question"):
        run(out, "--start= ")
    with pytest.raises(UserError, match="longer than block_size=128"):
        run(out, f"--start={TEXT}")
    with pytest.raises(UserError, match="no checkpoint in"):
        run(tmp_path / "nothing", "--start=谁？")
