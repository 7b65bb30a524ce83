"""The prepared format: what is written, what batches hold, and errors for damaged files."""

import itertools
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from configurator import ROOT, UserError
from data_utils import IGNORE, Dataset, collate, permute
from miniglm.prep.writer import fit, write_pretrain, write_sft
from miniglm.tokenizer import Tokenizer
from tests.helpers import TEXT, dialogue, tiny_tokenizer

SYSTEM = {"role": "system", "content": "你熟读三国。"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def of_size(tokenizer: Tokenizer, n_vocab: int) -> Tokenizer:
    """The tokenizer with filler entries (rare bytes, thrice) before its special tokens."""
    content = json.loads(tokenizer.text)
    vocab = content["model"]["vocab"]
    letters = [token for token in vocab if len(token) == 1]
    fillers = map("".join, itertools.product(letters, repeat=3))
    for filler in itertools.islice(fillers, n_vocab - tokenizer.n_vocab):
        vocab[filler] = len(vocab)
    for number, token in enumerate(content["added_tokens"]):
        token["id"] = len(vocab) + number
    return Tokenizer(json.dumps(content))


def write_text(
    out: Path, tokenizer: Tokenizer, n_tokens: int = 100, val: str = TEXT, seed: int = 0
) -> Dataset:
    """A pretraining set whose train split has n_tokens: single bytes and one end token."""
    train = "".join(chr(0x21 + (i + seed) % 90) for i in range(n_tokens - 1))
    meta = write_pretrain(out, tokenizer, {"train": [train], "val": [val]}, ["a test"])
    assert meta["splits"]["train"]["tokens"] == n_tokens
    return Dataset(str(out))


def many_dialogues(count: int, seed: int = 0) -> list[list[dict]]:
    """Different conversations of 1 to 3 turns, of widely varying lengths."""
    draw = random.Random(seed)

    def passage() -> str:
        first = draw.randrange(len(TEXT) - 60)
        return TEXT[first : first + draw.randint(1, 40)] + "。"

    conversations = []
    for number in range(count):
        turns = [passage() for _ in range(2 * draw.choice([1, 1, 2, 3]))]
        system = [SYSTEM] if number % 5 == 0 else []
        conversations.append([*system, *dialogue(f"{number}{turns[0]}", *turns[1:])])
    return conversations


def write_chats(
    out: Path, tokenizer: Tokenizer, count: int = 40, max_tokens: int = 1000, seed: int = 0, **mask
) -> Dataset:
    splits = {"train": many_dialogues(count, seed), "val": many_dialogues(7, seed=1)}
    write_sft(out, tokenizer, splits, ["a test"], max_tokens, **mask)
    return Dataset(str(out))


def length(tokenizer: Tokenizer, messages: list[dict]) -> int:
    return len(tokenizer.render(messages)[0])


# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_vocab", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_ids_have_the_smallest_type_that_holds_the_last_one(n_vocab, dtype, tokenizer, tmp_path):
    wide = of_size(tokenizer, n_vocab)
    last = wide.stop_ids[1]
    assert last == wide.n_vocab - 1 == n_vocab - 1
    splits = {"train": [dialogue("谁？", "孔明。")], "val": [dialogue("何人？", "张飞。")]}
    meta = write_sft(tmp_path, wide, splits, [], 64)
    tokens = np.fromfile(tmp_path / "train.bin", dtype)
    assert (meta["dtype"], tokens[-1]) == (dtype, last)
    assert tokens.tolist() == wide.render(splits["train"][0])[0]
    assert Dataset(str(tmp_path)).conversations("train") == splits["train"]


def test_train_bin_is_as_nanogpt_reads_it_and_meta_counts_what_was_written(tokenizer, tmp_path):
    texts = ["却说孔明。\n", " \n", "", "  ab😀  "]
    meta = write_pretrain(tmp_path, tokenizer, {"train": texts, "val": ["玄德"]}, ["一本书"])
    data = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    ends = np.flatnonzero(data == tokenizer.end_of_text)
    assert [tokenizer.decode(part) for part in np.split(data, ends + 1)] == [texts[0], texts[3], ""]
    assert meta == json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    assert (meta["kind"], meta["sources"]) == ("pretrain", ["一本书"])
    assert meta["tokenizer_sha256"] == Dataset(str(tmp_path)).tokenizer.sha256
    train = meta["splits"]["train"]
    assert (train["documents"], train["skipped: empty"]) == (2, 2)
    assert (train["characters"], train["bytes"]) == (6 + 7, 16 + 10)
    assert train["tokens"] == len(data) == sum(len(tokenizer.encode(texts[i])) + 1 for i in (0, 3))
    assert "skipped: empty" not in meta["splits"]["val"]


def test_rows_of_conversations_lie_between_their_bounds(tokenizer, tmp_path):
    conversations = many_dialogues(9)
    data = write_chats(tmp_path, tokenizer, 9)
    tokens = np.fromfile(tmp_path / "train.bin", np.uint16)
    mask = np.fromfile(tmp_path / "train_mask.bin", np.uint8)
    bounds = np.fromfile(tmp_path / "train_idx.bin", np.uint64).astype(int)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(tokens), 10)
    for messages, start, end in zip(conversations, bounds, bounds[1:], strict=False):
        ids, trained = tokenizer.render(messages)
        assert (tokens[start:end].tolist(), mask[start:end].tolist()) == (ids, trained)
    sizes = data.meta["splits"]["train"]
    assert (sizes["conversations"], sizes["tokens"]) == (9, len(tokens))
    text = "".join(message["content"] for messages in conversations for message in messages)
    assert (sizes["characters"], sizes["bytes"]) == (len(text), len(text.encode()))
    assert data.meta["max_tokens"] == 1000
    assert data.conversations("train") == conversations


@pytest.mark.parametrize("texts", [[], ["", " \n\u3000"]])
def test_a_split_without_text_is_refused_by_name(texts, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"val\.bin"):
        write_pretrain(tmp_path, tokenizer, {"train": [TEXT], "val": texts}, [])
    assert list(tmp_path.iterdir()) == []


# --- fitting conversations ---------------------------------------------------------------------


def test_the_oldest_turns_go_first_and_the_system_message_stays(tokenizer):
    turns = dialogue("一？", "一。", "二？", "二。", "三？", "三。")
    for system in ([], [SYSTEM]):
        three, two, one = (length(tokenizer, system + turns[first:]) for first in (0, 2, 4))
        assert fit(tokenizer, system + turns, three) == (system + turns, "")
        for limit, first in ((three - 1, 2), (two, 2), (two - 1, 4), (one, 4)):
            expected = system + turns[first:], "cut: oldest turns"
            assert fit(tokenizer, system + turns, limit) == expected
        assert fit(tokenizer, system + turns, one - 1) == (None, "skipped: too long")


def test_a_long_answer_ends_at_the_last_sentence_end_that_fits(tokenizer):
    sentences = [
        "孔明曰：“何人？”",
        "飞曰：「吾也！」",
        "Yes.",
        "（又曰……）",
        "约为3.14；",
        "四五六",
    ]
    messages = dialogue("谁？", "".join(sentences))
    cuts = [dialogue("谁？", "".join(sentences[:n])) for n in range(1, 6)]
    lengths = [length(tokenizer, cut) for cut in cuts]
    assert sorted(set(lengths)) == lengths
    for max_tokens in range(length(tokenizer, messages)):
        fitting = [cut for cut, n in zip(cuts, lengths, strict=True) if n <= max_tokens]
        expected = (fitting[-1], "cut: answer") if fitting else (None, "skipped: too long")
        assert fit(tokenizer, messages, max_tokens) == expected, max_tokens


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_cutting_old_turns_never_takes_the_question_of_an_answer(role, tokenizer):
    last = dialogue("孔明是谁？", "诸葛亮。")
    fitted, _ = fit(tokenizer, [SYSTEM, {"role": role, "content": "你好，" * 20}, *last], 40)
    assert fitted[-2:] == last


def test_a_fitted_conversation_is_never_longer_and_loses_only_its_start_or_end(tokenizer):
    for messages, max_tokens in itertools.product(many_dialogues(30, seed=3), range(0, 160, 7)):
        fitted, how = fit(tokenizer, messages, max_tokens)
        assert (how == "") == (fitted == messages)
        if fitted is None:
            assert how == "skipped: too long"
            continue
        assert length(tokenizer, fitted) <= max_tokens
        assert fitted[-2] == messages[-2]
        assert messages[-1]["content"].startswith(fitted[-1]["content"])
        assert fitted[-1]["content"][-1] in "。！？…；.!?;”"
        turns = [message for message in fitted if message != SYSTEM]
        assert turns[:-1] == messages[-len(turns) : -1]
        assert (SYSTEM in fitted) == (SYSTEM in messages)


def test_cutting_keeps_the_tools_and_calls_with_their_results(tokenizer):
    tools, calls = [{"name": "weather"}], [{"name": "weather", "arguments": {}}]
    asked = {"role": "user", "content": "北京几度？"}
    called = {"role": "assistant", "content": "我查。再查。", "tool_calls": calls}
    answered = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "三度。"}]
    old, turns = dialogue("谁？", "孔明。"), [asked, called, *answered]
    first = [asked | {"tools": tools}, *turns[1:]]
    with_tools = [old[0] | {"tools": tools}, old[1], *turns]
    assert fit(tokenizer, with_tools, length(tokenizer, with_tools)) == (with_tools, "")
    for limit in (length(tokenizer, with_tools) - 1, length(tokenizer, first)):
        assert fit(tokenizer, with_tools, limit) == (first, "cut: oldest turns")
    told = SYSTEM | {"tools": tools}
    assert fit(tokenizer, [told, *old, *turns], length(tokenizer, [told, *turns]))[0][0] == told
    assert fit(tokenizer, first, length(tokenizer, first) - 4) == (None, "skipped: too long")
    assert fit(tokenizer, first[:2], length(tokenizer, first[:2]) - 1) == (
        None,
        "skipped: too long",
    )


def test_conversations_that_differ_in_calls_or_reasoning_alone_are_all_kept(tokenizer, tmp_path):
    answer = {"role": "assistant", "content": "三度。"}
    calls = [{"tool_calls": [{"name": name, "arguments": {}}]} for name in ("weather", "now")]
    answers = [answer, answer | {"reasoning_content": "查。"}, *(answer | call for call in calls)]
    rows = [[{"role": "user", "content": "几度？"}, each] for each in answers]
    sizes = write_sft(tmp_path, tokenizer, {"train": rows * 2}, [])["splits"]["train"]
    assert (sizes["conversations"], sizes["skipped: duplicate"]) == (4, 4)


@pytest.mark.parametrize(
    "messages",
    [[], [SYSTEM], dialogue("谁？", "我", "？"), [SYSTEM, *dialogue("谁？", "我")[1:]]],
)
def test_a_conversation_without_a_final_question_and_answer_is_skipped(messages, tokenizer):
    assert fit(tokenizer, messages, 1000) == (None, "skipped: no question and answer")
    empty = dialogue("谁？", " \n")
    assert fit(tokenizer, empty, 1000) == (None, "skipped: empty answer")


def test_masks_of_one_row_by_hand(tokenizer, tmp_path):
    splits = {"train": [dialogue("a", "bc", "d", "e")], "val": [dialogue("f", "g")]}
    role = {m["role"]: tokenizer.render([m])[0][0] for m in dialogue("", "")}
    user, bot, end = role["user"], role["assistant"], tokenizer.end
    a, b, c, d, e = (tokenizer.encode(letter)[0] for letter in "abcde")
    ids = [user, a, end, bot, b, c, end, user, d, end, bot, e, end]
    masks = {
        "answer": [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1],
        "no_end": [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0],
        "padding": [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1],
    }
    for name, mask in masks.items():
        meta = write_sft(tmp_path / name, tokenizer, splits, [], 16, name)
        data = Dataset(str(tmp_path / name))
        assert meta["mask"] == data.meta["mask"] == name
        row = data.tokens["train"].tolist()
        assert row == ids + [end] * (len(mask) - len(ids))
        assert data.mask["train"].tolist() == mask
        idx, targets = data.batch(np.array([0]), 16)
        assert idx.tolist() == [row[:-1]]
        wanted = [id if trained else IGNORE for id, trained in zip(row, mask, strict=True)]
        assert targets.tolist() == [wanted[1:]]


def test_another_mask_keeps_the_conversations_and_the_counts(tokenizer, tmp_path):
    plain, no_end, padding = (
        write_chats(tmp_path / mask, tokenizer, 30, 60, mask=mask)
        for mask in ("answer", "no_end", "padding")
    )
    assert len({data.fingerprint for data in (plain, no_end, padding)}) == 3
    for data, split in itertools.product((no_end, padding), ("train", "val")):
        assert data.conversations(split) == plain.conversations(split)
        sizes, other = data.meta["splits"][split], plain.meta["splits"][split]
        changed = {name for name in sizes | other if sizes.get(name) != other.get(name)}
        assert changed <= {"tokens", "fingerprint"}
    assert (np.diff(padding.bounds["train"].astype(int)) == 60).all()


def test_skipped_cut_and_repeated_conversations_are_counted(tokenizer, tmp_path):
    first, second = dialogue("谁？", "孔明。"), dialogue("谁？", "张飞。")
    long = dialogue("谁？", "赵云。" + "云" * 200)
    endless = dialogue("谁？" * 200, "赵云。")
    old = [*dialogue("谁？" * 100, "马超。"), *dialogue("谁人？", "黄忠。")]
    becomes_first = [*dialogue("谁？" * 100, "马超。"), *first]
    splits = {
        "train": [first, first, second, long, endless, old, dialogue("谁？")],
        "val": [second, first, becomes_first, dialogue("何人？", "关羽。")],
    }
    meta = write_sft(tmp_path, tokenizer, splits, [], 40)
    sizes = ("fingerprint", "characters", "bytes", "tokens")
    counted = {"skipped: duplicate", "cut: answer", "skipped: too long", "cut: oldest turns"}
    counted |= {"skipped: no question and answer"}
    for split, counts in (
        ("train", {"conversations": 4} | dict.fromkeys(counted, 1)),
        ("val", {"conversations": 1, "skipped: duplicate": 3}),
    ):
        written = meta["splits"][split]
        assert {name: written[name] for name in written if name not in sizes} == counts
    assert Dataset(str(tmp_path)).conversations("val") == splits["val"][3:]


@pytest.mark.parametrize(
    "ends, wanted",
    [("？？？", "？"), ("？" * 9 + "。", "？"), ("？？。", ""), ("谁谁谁", ""), ("？", "？")],
)
def test_meta_names_the_mark_that_ends_nearly_all_questions(tokenizer, tmp_path, ends, wanted):
    conversations = [dialogue(f"谁{n}{end}", "曹节。") for n, end in enumerate(ends)]
    splits = {"train": conversations, "val": [dialogue("汉朝", "温德殿。")]}
    meta = write_sft(tmp_path, tokenizer, splits, ["a test"], 64)
    assert meta["question_end"] == Dataset(str(tmp_path)).meta["question_end"] == wanted


# --- the order of rows -------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_permute_is_a_permutation_and_gives_the_same_places_piecewise():
    for n in (*range(1, 201), 1000, 65537):
        assert sorted(permute(np.arange(n), n, "a key")) == list(range(n))
    whole = permute(np.arange(1000), 1000, "a key")
    some = np.array([999, 0, 500, 0])
    assert permute(some, 1000, "a key").tolist() == whole[some].tolist()
    assert permute(np.array([], int), 1000, "a key").tolist() == []
    # in any process and version: runs would not resume otherwise
    assert permute(np.arange(8), 8, "a key").tolist() == [7, 2, 3, 5, 0, 6, 1, 4]


def test_permute_sends_each_index_everywhere_equally_often():
    n, keys = 5, 600
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, str(key))] += 1
    assert np.abs(counts * n / keys - 1).max() < 0.4


def test_permute_separates_neighbours():
    order = permute(np.arange(10_000), 10_000, "a key")
    assert (np.abs(np.diff(order)) == 1).sum() < 10  # 2 are expected
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def stream_of_rows(data: Dataset, total: int, step: int, block_size: int) -> np.ndarray:
    """The rows of the first steps, at least total of them."""
    starts = range(0, total, step)
    return np.concatenate([data.step_rows(1, start, step, block_size) for start in starts])


@pytest.mark.parametrize("n_tokens", [9, 17, 64, 103])
def test_an_epoch_of_text_covers_the_ring_once_whatever_the_steps(n_tokens, tokenizer, tmp_path):
    block = 8
    data = write_text(tmp_path, tokenizer, n_tokens)
    n = data.n_rows("train", block)
    assert n == n_tokens // block
    rows = stream_of_rows(data, 4 * n, 1, block)
    for step in (7, 50):
        assert (stream_of_rows(data, 4 * n, step, block)[: 4 * n] == rows).all()
    places = (rows[:, None] + np.arange(block)) % n_tokens
    for epoch in np.split(places, 4):
        assert len(np.unique(epoch)) == n * block  # no token twice; under a block left out
    starts = {tuple(sorted(epoch)) for epoch in np.split(rows, 4)}
    assert len(starts) > 1 or n_tokens < 20  # cut at another place in each epoch


@pytest.mark.parametrize("count", [1, 3, 40])
def test_an_epoch_of_conversations_holds_each_once(count, tokenizer, tmp_path):
    data = write_chats(tmp_path, tokenizer, count)
    for step in (1, 4, 16, 200):
        rows = stream_of_rows(data, 4 * count, step, 1000)
        epochs = rows[: 4 * count].reshape(4, count)
        assert (np.sort(epochs, axis=1) == np.arange(count)).all()
        assert len({tuple(epoch) for epoch in epochs}) == 4 or count < 40


def test_the_step_size_may_change_within_an_epoch(tokenizer, tmp_path):
    data = write_chats(tmp_path, tokenizer, 40)
    for start, count in ((0, 40), (40, 13), (53, 27)):
        rows = data.step_rows(0, start, count, 1000)
        assert len(set(rows.tolist())) == count
        assert set(rows.tolist()) <= set(range(40))


def test_the_rows_of_a_step_depend_on_its_arguments_alone(tokenizer, tmp_path):
    sets = [write_text(tmp_path / "text", tokenizer), write_chats(tmp_path / "chats", tokenizer)]
    steps = [*itertools.product((0, 7), (0, 6, 35, 1000), (1, 6))]
    rows = [[data.step_rows(*step, 8).tolist() for step in steps] for data in sets]
    for data, wanted in zip(sets, rows, strict=True):
        for number in random.Random(0).sample(range(len(steps)), len(steps)):
            list(data.eval_batches("val", 8, 3))
            again = data.step_rows(*steps[number], 8)
            assert again.tolist() == wanted[number]
            again[:] = 0  # the caller's own copy


@pytest.mark.parametrize("write", [write_text, write_chats])
def test_another_seed_or_other_data_give_another_order(write, tokenizer, tmp_path):
    data, other = (write(tmp_path / str(seed), tokenizer, 100, seed=seed) for seed in (0, 5))
    n = data.n_rows("train", 8)
    order = data.step_rows(0, 0, n, 8).tolist()
    assert data.step_rows(1, 0, n, 8).tolist() != order
    assert data.step_rows(0, n, n, 8).tolist() != order
    assert other.n_rows("train", 8) == n
    assert other.step_rows(0, 0, n, 8).tolist() != order


def test_the_rows_of_a_step_are_of_like_length_but_steps_are_not_sorted(tokenizer, tmp_path):
    data = write_chats(tmp_path, tokenizer, 210)
    lengths = np.diff(data.bounds["train"].astype(int))
    count = 8
    padded, longest = 0, []
    for start in range(0, 800, count):  # over several epochs, whose ends lie within a step
        rows = lengths[data.step_rows(5, start, count, 1000)]
        padded += (rows.max() - rows).sum()
        longest.append(int(rows.max()))
    order = np.random.default_rng(0).permutation(np.tile(lengths, 4))[:800].reshape(-1, count)
    at_random = (order.max(axis=1, keepdims=True) - order).sum()
    assert padded < at_random / 3
    first = longest[:16]
    assert first not in (sorted(first), sorted(first)[::-1])
    assert abs(np.corrcoef(longest[:100], np.arange(100))[0, 1]) < 0.4


# --- batches -----------------------------------------------------------------------------------


def test_targets_of_text_are_the_next_tokens_around_the_ring(tokenizer, tmp_path):
    data = write_text(tmp_path, tokenizer, 20)
    ring = np.fromfile(tmp_path / "train.bin", np.uint16).astype(int)
    starts = np.array([0, 3, 12, 19])
    idx, targets = data.batch(starts, 8)
    assert (idx.dtype, targets.dtype) == (np.int64, np.int64)
    places = (starts[:, None] + np.arange(9)) % 20
    assert idx.tolist() == ring[places[:, :8]].tolist()
    assert targets.tolist() == ring[places[:, 1:]].tolist()


def test_targets_of_conversations_are_their_trained_tokens_padded_on_the_right(tokenizer, tmp_path):
    data = write_chats(tmp_path, tokenizer, 40)
    rows = data.step_rows(0, 0, 16, 1000)
    rendered = [tokenizer.render(many_dialogues(40)[row]) for row in rows]
    assert data.input_tokens(rows, 1000) == sum(len(ids) - 1 for ids, _ in rendered)
    T = max(len(ids) for ids, _ in rendered) - 1
    for idx, targets in (data.batch(rows, 1000), collate(rendered)):
        assert idx.dtype == targets.dtype == np.int64
        assert idx.shape == targets.shape == (16, T)
        assert ((idx >= 0) & (idx < tokenizer.n_vocab)).all()  # padding too is an id
        for row, (ids, mask) in enumerate(rendered):
            n = len(ids) - 1
            assert idx[row, :n].tolist() == ids[:-1]
            goals = np.where(np.array(mask[1:]) == 1, ids[1:], IGNORE)
            assert targets[row].tolist() == [*goals, *[IGNORE] * (T - n)]


def test_a_multiple_only_adds_ignored_columns(tokenizer, tmp_path):
    data = write_chats(tmp_path, tokenizer, 10)
    for rows, multiple in itertools.product(([*range(10)], [3], [0, 7]), (1, 8, 64)):
        idx, targets = data.batch(np.array(rows), 1000)
        wide_idx, wide_targets = data.batch(np.array(rows), 1000, multiple)
        T = idx.shape[1]
        assert wide_idx.shape == wide_targets.shape == (len(rows), -(-T // multiple) * multiple)
        assert (wide_targets[:, :T] == targets).all()
        assert (wide_targets[:, T:] == IGNORE).all()
        assert (wide_idx[:, :T] == idx)[targets != IGNORE].all()


@pytest.mark.parametrize("n_tokens", [2, 8, 9, 10, 17, 100])
def test_evaluation_scores_each_token_of_a_text_but_the_first_once(n_tokens, tokenizer, tmp_path):
    data = write_text(tmp_path, tokenizer, n_tokens)
    ids = np.fromfile(tmp_path / "train.bin", np.uint16).astype(int)
    for batch_size in (1, 3, 100):
        batches = list(data.eval_batches("train", 8, batch_size))
        scored = np.concatenate([targets[targets != IGNORE] for _, targets in batches])
        assert scored.tolist() == ids[1:].tolist()
        seen = np.concatenate([idx[targets != IGNORE] for idx, targets in batches])
        assert seen.tolist() == ids[:-1].tolist()
        assert all(idx.shape[1] <= 8 and len(idx) <= batch_size for idx, _ in batches)


# --- damaged and unsuitable datasets -----------------------------------------------------------


def test_a_missing_dataset_names_its_prepare_script(tmp_path):
    with pytest.raises(UserError, match=r"run python data/sanguo/prepare_sft\.py"):
        Dataset(str(tmp_path / "sanguo_sft"))
    shutil.copy(ROOT / "data" / "sanguo" / "prepare.py", tmp_path)
    with pytest.raises(UserError, match=r"meta\.json is missing; run python .*prepare\.py"):
        Dataset(str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere/meta\.json is missing; prepare it first"):
        Dataset(str(tmp_path / "nowhere"))


NO_META = ["", "[]", "{}", "[" * 10**5, '{"kind": 1, "splits": [], "tokenizer_sha256": ""}']


@pytest.mark.parametrize("content", NO_META)
def test_a_damaged_meta_is_named_and_replaced_by_preparing_again(content, tokenizer, tmp_path):
    write_text(tmp_path, tokenizer)
    whole = (tmp_path / "meta.json").read_text()
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json (is|has no) .*; prepare it again"):
        Dataset(str(tmp_path))
    write_text(tmp_path, tokenizer)
    assert (tmp_path / "meta.json").read_text() == whole


@pytest.mark.parametrize("file", ["train.bin", "train_mask.bin", "val_idx.bin"])
def test_a_missing_or_damaged_file_is_named(file, tokenizer, tmp_path):
    write_chats(tmp_path, tokenizer, 5)
    path = tmp_path / file
    content = path.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file} has .*prepare"):
            Dataset(str(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=f"{file} is missing.*prepare"):
        Dataset(str(tmp_path))


def test_bounds_that_fall_or_end_elsewhere_are_named(tokenizer, tmp_path):
    bounds = write_chats(tmp_path, tokenizer, 5).bounds["val"].copy()
    for place, value in ((0, 1), (1, 2**56), (2, bounds[1]), (-1, bounds[-1] + 1)):
        damaged = bounds.copy()
        damaged[place] = value
        damaged.tofile(tmp_path / "val_idx.bin")
        with pytest.raises(UserError, match=r"val_idx\.bin is damaged; prepare it again"):
            Dataset(str(tmp_path))


def test_ids_that_the_tokenizer_lacks_are_named_before_a_model_reads_them(tokenizer, tmp_path):
    write_text(tmp_path / "text", tokenizer, 100, val="!" * 99)
    write_chats(tmp_path / "chats", tokenizer, 5)
    for name, split, read in (
        ("text", "train", lambda data: data.batch(data.step_rows(0, 0, 5, 20), 20)),
        ("text", "val", lambda data: [*data.eval_batches("val", 20, 5)]),
        ("chats", "train", lambda data: data.batch(np.arange(5), 128)),
        ("chats", "val", lambda data: [*data.eval_batches("val", 128, 5)]),
        ("chats", "val", lambda data: data.conversations("val")),
    ):
        data, file = Dataset(str(tmp_path / name)), tmp_path / name / f"{split}.bin"
        content = file.read_bytes()
        read(data)
        file.write_bytes(b"\xff" * len(content))
        with pytest.raises(UserError, match=rf"{split}\.bin is damaged; prepare it again"):
            read(Dataset(str(tmp_path / name)))
        file.write_bytes(content)


def test_a_split_must_serve_the_block_size(tokenizer, tmp_path):
    text = write_text(tmp_path / "text", tokenizer, 100, val="!" * 9)  # and its end token
    text.check(9, "val")
    with pytest.raises(UserError, match=r"val\.bin has 10 tokens, block_size=10 needs 11"):
        text.check(10, "val")
    text.check(10, "train")
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        text.check(8, "test")
    chats = write_chats(tmp_path / "chats", tokenizer, 5, max_tokens=200)
    chats.check(200, "train")
    with pytest.raises(UserError, match=r"up to 200 tokens, block_size is 128; .*--max_tokens=128"):
        chats.check(128, "train")


def test_a_dataset_is_a_name_under_data_or_a_path(tokenizer, tmp_path, monkeypatch):
    write_text(tmp_path / "novel", tokenizer)
    monkeypatch.chdir(tmp_path)
    assert Dataset(str(tmp_path / "novel")).name == "novel"
    with pytest.raises(UserError, match=r"novel/meta\.json is missing"):
        Dataset("novel")  # relative to the repository, not to the current directory
    relative = os.path.relpath(tmp_path / "novel", ROOT)
    assert Dataset(relative).fingerprint == Dataset(str(tmp_path / "novel")).fingerprint
