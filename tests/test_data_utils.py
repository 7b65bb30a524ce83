"""The prepared format: what is written, what batches hold, and what damaged files say."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configurator import ROOT, UserError
from data_utils import (
    IGNORE,
    Dataset,
    collate,
    permute,
)
from miniglm.prep.writer import fit, write_pretrain, write_sft
from miniglm.tokenizer import Tokenizer, train_tokenizer
from tests.helpers import TEXT, dialogue

SYSTEM = {"role": "system", "content": "你熟读三国。"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 320)


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
    """Different conversations of 1 to 3 turns, of lengths that differ much."""
    draw = random.Random(seed)
    starts = range(len(TEXT) - 60)
    cut = lambda longest: TEXT[(i := draw.choice(starts)) : i + draw.randint(1, longest)] + "。"  # noqa: E731
    found = []
    for number in range(count):
        turns = [cut(40) for _ in range(2 * draw.choice([1, 1, 2, 3]))]
        found.append(dialogue(f"{number}{turns[0]}", *turns[1:]))
        if number % 5 == 0:
            found[-1].insert(0, SYSTEM)
    return found


def write_chats(
    out: Path, tokenizer: Tokenizer, count: int = 40, max_tokens: int = 1000, seed: int = 0
) -> Dataset:
    splits = {"train": many_dialogues(count, seed), "val": many_dialogues(7, seed=1)}
    write_sft(out, tokenizer, splits, ["a test"], max_tokens)
    return Dataset(str(out))


def answers(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


def trained_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """What a conversation's targets must be: each answer's ids and its end token."""
    _, end = tokenizer.stop_ids
    return [id for text in answers(messages) for id in [*tokenizer.encode(text), end]]


# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_vocab", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_ids_have_the_smallest_type_that_holds_the_last_one(n_vocab, dtype, tokenizer, tmp_path):
    wide = of_size(tokenizer, n_vocab)
    assert wide.n_vocab == n_vocab
    last = wide.stop_ids[1]
    assert last == n_vocab - 1
    splits = {"train": [dialogue("谁？", "孔明。")], "val": [dialogue("何人？", "张飞。")]}
    meta = write_sft(tmp_path, wide, splits, [], 64)
    tokens = np.fromfile(tmp_path / "train.bin", dtype)
    assert meta["dtype"] == dtype
    assert tokens.tolist() == wide.render(splits["train"][0])[0]
    assert tokens[-1] == last
    [row] = Dataset(str(tmp_path)).conversations("train")
    assert row == splits["train"][0]


def test_train_bin_is_read_as_nanogpt_reads_it(tokenizer, tmp_path):
    texts = ["却说孔明。\n", "Hello 😀", "  三  "]
    write_pretrain(tmp_path, tokenizer, {"train": texts, "val": ["玄德。"]}, ["a test"])
    data = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    ends = np.flatnonzero(data == tokenizer.end_of_text)
    assert [tokenizer.decode(part) for part in np.split(data, ends + 1)] == [*texts, ""]


def test_meta_counts_what_was_written(tokenizer, tmp_path):
    texts = {"train": ["却说孔明。", " \n", "", "ab😀"], "val": ["玄德"]}
    meta = write_pretrain(tmp_path, tokenizer, texts, ["一本书"])
    assert meta == json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    assert meta["kind"] == "pretrain"
    assert meta["sources"] == ["一本书"]
    assert meta["tokenizer_sha256"] == Dataset(str(tmp_path)).tokenizer.sha256
    train = meta["splits"]["train"]
    assert (train["documents"], train["skipped: empty"]) == (2, 2)
    assert (train["characters"], train["bytes"]) == (5 + 3, 15 + 6)
    assert train["tokens"] == len(np.fromfile(tmp_path / "train.bin", np.uint16))
    assert train["tokens"] == sum(len(tokenizer.encode(texts["train"][i])) + 1 for i in (0, 3))
    assert "skipped: empty" not in meta["splits"]["val"]


def test_rows_of_conversations_lie_between_their_bounds(tokenizer, tmp_path):
    conversations = many_dialogues(9)
    splits = {"train": conversations, "val": [dialogue("谁？", "孔明。")]}
    meta = write_sft(tmp_path, tokenizer, splits, [], 1000)
    tokens = np.fromfile(tmp_path / "train.bin", np.uint16)
    mask = np.fromfile(tmp_path / "train_mask.bin", np.uint8)
    bounds = np.fromfile(tmp_path / "train_idx.bin", np.uint64).astype(int)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(tokens), 10)
    for messages, start, end in zip(conversations, bounds, bounds[1:], strict=False):
        ids, trained = tokenizer.render(messages)
        assert (tokens[start:end].tolist(), mask[start:end].tolist()) == (ids, trained)
    sizes = meta["splits"]["train"]
    assert (sizes["conversations"], sizes["tokens"]) == (9, len(tokens))
    text = "".join(message["content"] for messages in conversations for message in messages)
    assert (sizes["characters"], sizes["bytes"]) == (len(text), len(text.encode()))
    assert meta["max_tokens"] == 1000
    assert Dataset(str(tmp_path)).conversations("train") == conversations


def test_the_same_text_has_the_same_fingerprint_and_another_text_has_not(tokenizer, tmp_path):
    kept = write_text(tmp_path / "a", tokenizer, 50)
    assert write_text(tmp_path / "b", tokenizer, 50).fingerprint == kept.fingerprint
    assert write_text(tmp_path / "c", tokenizer, 51).fingerprint != kept.fingerprint


def test_an_interrupted_write_leaves_the_old_dataset_whole(tokenizer, tmp_path):
    write_chats(tmp_path, tokenizer, 5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted():
        yield from many_dialogues(3, seed=9)
        raise KeyboardInterrupt

    for splits in (
        {"train": interrupted(), "val": many_dialogues(2)},
        {"train": many_dialogues(2, seed=8), "val": interrupted()},
    ):
        with pytest.raises(KeyboardInterrupt):
            write_sft(tmp_path, tokenizer, splits, [], 1000)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_first_write_leaves_nothing(tokenizer, tmp_path):
    def interrupted():
        yield TEXT
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_pretrain(tmp_path, tokenizer, {"train": [TEXT], "val": interrupted()}, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [[], ["", " \n\u3000"]])
def test_a_split_without_text_is_refused_by_its_name(texts, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"val\.bin"):
        write_pretrain(tmp_path, tokenizer, {"train": [TEXT], "val": texts}, [])
    assert list(tmp_path.iterdir()) == []


# --- fitting conversations ---------------------------------------------------------------------


def length(tokenizer: Tokenizer, messages: list[dict]) -> int:
    return len(tokenizer.render(messages)[0])


def test_what_fits_exactly_is_left_as_it_is(tokenizer):
    messages = [SYSTEM, *dialogue("谁？", "孔明。他号卧龙。")]
    n = length(tokenizer, messages)
    assert fit(tokenizer, messages, n) == (messages, "")
    assert fit(tokenizer, messages, n - 1)[1] == "cut: answer"


def test_the_oldest_turns_go_first_and_the_system_message_stays(tokenizer):
    turns = dialogue("一？", "一。", "二？", "二。", "三？", "三。")
    for system in ([], [SYSTEM]):
        two = length(tokenizer, system + turns[2:])
        one = length(tokenizer, system + turns[4:])
        assert fit(tokenizer, system + turns, two) == (system + turns[2:], "cut: oldest turns")
        assert fit(tokenizer, system + turns, two - 1) == (system + turns[4:], "cut: oldest turns")
        assert fit(tokenizer, system + turns, one) == (system + turns[4:], "cut: oldest turns")
        assert fit(tokenizer, system + turns, one - 1) == (None, "skipped: too long")


def test_a_long_answer_ends_at_the_last_sentence_end_that_fits(tokenizer):
    sentences = ["孔明曰：“何人？”", "飞曰：「吾也！」", "Yes.", "（又曰……）", "一二三；", "四五六"]
    messages = dialogue("谁？", "".join(sentences))
    cuts = [dialogue("谁？", "".join(sentences[:n])) for n in range(1, 6)]
    lengths = [length(tokenizer, cut) for cut in cuts]
    assert sorted(set(lengths)) == lengths
    for max_tokens in range(length(tokenizer, messages)):
        fitting = [cut for cut, n in zip(cuts, lengths, strict=True) if n <= max_tokens]
        expected = (fitting[-1], "cut: answer") if fitting else (None, "skipped: too long")
        assert fit(tokenizer, messages, max_tokens) == expected, max_tokens


def test_a_point_inside_a_number_ends_no_sentence(tokenizer):
    messages = dialogue("圆周率？", "约为3.14159265358979323846264338327950288，除不尽")
    short = length(tokenizer, dialogue("圆周率？", "约为3.14"))
    assert fit(tokenizer, messages, short) == (None, "skipped: too long")


@pytest.mark.parametrize(
    "messages",
    [
        [*dialogue("你好，" * 20)[:1], *dialogue("孔明是谁？", "诸葛亮。")],
        [{"role": "assistant", "content": "你好，" * 20}, *dialogue("孔明是谁？", "诸葛亮。")],
        [
            SYSTEM,
            {"role": "assistant", "content": "好，" * 20},
            *dialogue("孔明是谁？", "诸葛亮。"),
        ],
    ],
)
def test_cutting_old_turns_never_takes_the_question_of_an_answer(messages, tokenizer):
    fitted, _ = fit(tokenizer, messages, 40)
    assert fitted is not None
    assert fitted[-2:] == messages[-2:]


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


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [SYSTEM],
        dialogue("谁？"),
        dialogue("谁？", " \n"),
        dialogue("谁？", "我", "？"),
        dialogue("谁？", "我")[1:],
        [SYSTEM, *dialogue("谁？", "我")[1:]],
    ],
)
def test_a_conversation_that_ends_in_no_question_and_answer_is_skipped(messages, tokenizer):
    fitted, how = fit(tokenizer, messages, 1000)
    assert fitted is None
    assert how.startswith("skipped: ")


def masked_set(out: Path, tokenizer: Tokenizer, mask: str, max_tokens: int = 60) -> Dataset:
    splits = {"train": many_dialogues(30), "val": many_dialogues(4, seed=1)}
    write_sft(out, tokenizer, splits, ["a test"], max_tokens, mask)
    return Dataset(str(out))


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
        assert data.tokens["train"].tolist() == ids + [end] * (len(mask) - len(ids))
        assert data.mask["train"].tolist() == mask
        idx, targets = data.batch(np.array([0]), 16)
        row = data.tokens["train"].tolist()
        assert idx.tolist() == [row[:-1]]
        wanted = [id if one else IGNORE for id, one in zip(row, mask, strict=True)]
        assert targets.tolist() == [wanted[1:]]


@pytest.mark.parametrize("mask", ["no_end", "padding"])
def test_another_mask_keeps_the_conversations_and_what_was_left_out(mask, tokenizer, tmp_path):
    plain = masked_set(tmp_path / "answer", tokenizer, "answer")
    other = masked_set(tmp_path / mask, tokenizer, mask)
    assert other.fingerprint != plain.fingerprint
    for split in ("train", "val"):
        assert other.conversations(split) == plain.conversations(split)
        sizes = [data.meta["splits"][split] for data in (plain, other)]
        same = [{k: v for k, v in s.items() if k not in ("tokens", "fingerprint")} for s in sizes]
        assert same[0] == same[1]
    other.check(60, "train")
    if mask == "padding":
        assert (np.diff(other.bounds["train"].astype(int)) == 60).all()


def test_without_their_end_tokens_answers_are_all_that_is_trained(tokenizer, tmp_path):
    data = masked_set(tmp_path, tokenizer, "no_end")
    rows = data.step_rows(0, 0, 8, 60)
    _, targets = data.batch(rows, 60)
    conversations = data.conversations("train")
    for row, goals in zip(rows, targets, strict=True):
        trained = goals[goals != IGNORE]
        assert tokenizer.end not in trained
        assert tokenizer.decode(trained) == "".join(answers(conversations[row]))


def test_skipped_cut_and_repeated_conversations_are_counted(tokenizer, tmp_path):
    first, second = dialogue("谁？", "孔明。"), dialogue("谁？", "张飞。")
    long = dialogue("谁？", "赵云。" + "云" * 200)
    endless = dialogue("谁？" * 200, "赵云。")
    old = [*dialogue("谁？" * 100, "马超。"), *dialogue("谁人？", "黄忠。")]
    splits = {
        "train": [first, first, second, long, endless, old, dialogue("谁？")],
        "val": [second, first, dialogue("何人？", "关羽。")],
    }
    meta = write_sft(tmp_path, tokenizer, splits, [], 40)
    ours = ("fingerprint", "characters", "bytes", "tokens")
    counts = {
        split: {key: count for key, count in sizes.items() if key not in ours}
        for split, sizes in meta["splits"].items()
    }
    assert counts == {
        "train": {
            "conversations": 4,
            "skipped: duplicate": 1,
            "cut: answer": 1,
            "skipped: too long": 1,
            "cut: oldest turns": 1,
            "skipped: no question and answer": 1,
        },
        "val": {"conversations": 1, "skipped: duplicate": 2},
    }
    assert Dataset(str(tmp_path)).conversations("val") == splits["val"][2:]


def test_what_is_cut_to_a_trained_conversation_is_not_in_validation(tokenizer, tmp_path):
    short = dialogue("孔明是谁？", "诸葛亮。")
    long = [*dialogue("张飞是谁？" * 20, "翼德。"), *short]
    splits = {"train": [short], "val": [long, dialogue("何人？", "关羽。")]}
    write_sft(tmp_path, tokenizer, splits, [], 40)
    data = Dataset(str(tmp_path))
    assert data.conversations("train") == [short]
    assert short not in data.conversations("val")


# --- the order of rows -------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [*range(1, 201), 1000, 65537])
def test_permute_sends_each_index_to_another_place(n):
    assert sorted(permute(np.arange(n), n, "a key")) == list(range(n))


def test_permute_gives_the_same_places_in_any_order_and_portion():
    whole = permute(np.arange(1000), 1000, "a key")
    some = np.array([999, 0, 500, 0])
    assert permute(some, 1000, "a key").tolist() == whole[some].tolist()
    assert permute(np.array([], int), 1000, "a key").tolist() == []


def test_permute_is_another_for_another_key():
    orders = {tuple(permute(np.arange(50), 50, f"key {i}")) for i in range(200)}
    assert len(orders) == 200


@pytest.mark.parametrize("n", [2, 5, 13])
def test_permute_sends_each_index_everywhere_equally_often(n):
    keys = 1500
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, str(key))] += 1
    assert np.abs(counts * n / keys - 1).max() < 0.4


def test_permute_leaves_no_neighbours_together():
    order = permute(np.arange(10_000), 10_000, "a key")
    assert (np.abs(np.diff(order)) == 1).sum() < 10  # 2 are expected
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def stream_of_rows(
    data: Dataset, total: int, step: int, block_size: int, seed: int = 1
) -> np.ndarray:
    """The rows of the first steps, at least total of them."""
    starts = range(0, total, step)
    return np.concatenate([data.step_rows(seed, start, step, block_size) for start in starts])


@pytest.mark.parametrize("step", [1, 3, 7, 50])
@pytest.mark.parametrize("n_tokens", [9, 17, 40, 64, 103])
def test_an_epoch_of_text_covers_the_ring_once(n_tokens, step, tokenizer, tmp_path):
    block = 8
    data = write_text(tmp_path, tokenizer, n_tokens)
    n = data.n_rows("train", block)
    assert n == n_tokens // block
    rows = stream_of_rows(data, 4 * n, step, block)
    covered = []
    for epoch in range(4):
        starts = rows[epoch * n : (epoch + 1) * n]
        places = (starts[:, None] + np.arange(block)) % n_tokens
        assert len(np.unique(places)) == n * block  # no token twice; fewer than a block left out
        covered.append(tuple(sorted(places[:, 0])))
    assert len(set(covered)) > 1 or n_tokens < 20  # cut at another place in each epoch


@pytest.mark.parametrize("step", [1, 2, 4, 16, 200])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_an_epoch_of_conversations_holds_each_once(count, step, tokenizer, tmp_path):
    data = write_chats(tmp_path, tokenizer, count)
    rows = stream_of_rows(data, 4 * count, step, 1000)
    epochs = rows[: 4 * count].reshape(4, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    if count == 40:
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_step_size_may_change_within_an_epoch(tokenizer, tmp_path):
    text = write_text(tmp_path / "text", tokenizer, 400)
    few = stream_of_rows(text, 100, 5, 8)
    many = stream_of_rows(text, 100, 50, 8)
    assert few.tolist() == many.tolist()
    chats = write_chats(tmp_path / "chats", tokenizer, 40)
    for start, count in ((0, 40), (40, 13), (53, 27)):
        rows = chats.step_rows(0, start, count, 1000)
        assert len(set(rows.tolist())) == count
        assert set(rows.tolist()) <= set(range(40))


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_the_rows_of_a_step_are_the_same_after_anything_else(kind, tokenizer, tmp_path):
    data = (write_text if kind == "text" else write_chats)(tmp_path, tokenizer)
    steps = [
        (seed, start, count) for seed in (0, 7) for start in (0, 6, 35, 1000) for count in (1, 6)
    ]
    rows = {step: data.step_rows(*step, 8).tolist() for step in steps}
    for step in random.Random(0).sample(steps * 3, 3 * len(steps)):
        list(data.eval_batches("val", 8, 3))
        changed = data.step_rows(*step, 8)
        assert changed.tolist() == rows[step]
        changed[:] = 0  # the caller's own copy
    program = "import ast, sys\nfrom data_utils import Dataset\n"
    program += "data = Dataset(sys.argv[1])\n"
    program += (
        "print([data.step_rows(*s, 8).tolist() for s in ast.literal_eval(sys.argv[2])][::-1])"
    )
    again = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(steps[::-1])],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(again.stdout) == list(rows.values())


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_another_seed_or_other_data_give_another_order(kind, tokenizer, tmp_path):
    write = write_text if kind == "text" else write_chats
    data = write(tmp_path / "a", tokenizer, 400)
    n = data.n_rows("train", 8)
    order = data.step_rows(0, 0, n, 8).tolist()
    assert data.step_rows(1, 0, n, 8).tolist() != order
    assert data.step_rows(0, n, n, 8).tolist() != order
    other = write(tmp_path / "b", tokenizer, 400, seed=5)
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
    idx, targets = data.batch(np.array([0, 3, 12, 19]), 8)
    assert (idx.shape, targets.shape) == ((4, 8), (4, 8))
    assert (idx.dtype, targets.dtype) == (np.int64, np.int64)
    for row, start in enumerate((0, 3, 12, 19)):
        places = np.arange(start, start + 9) % 20
        assert idx[row].tolist() == ring[places[:8]].tolist()
        assert targets[row].tolist() == ring[places[1:]].tolist()


def test_targets_of_a_conversation_are_its_answers_and_their_end_tokens(tokenizer, tmp_path):
    data = write_chats(tmp_path, tokenizer, 40)
    conversations = many_dialogues(40)
    rows = data.step_rows(0, 0, 16, 1000)
    idx, targets = data.batch(rows, 1000)
    assert idx.dtype == targets.dtype == np.int64
    widest = max(length(tokenizer, conversations[row]) for row in rows)
    assert idx.shape == targets.shape == (16, widest - 1)
    for row, ids, goals in zip(rows, idx, targets, strict=True):
        messages = conversations[row]
        rendered, mask = tokenizer.render(messages)
        n = len(rendered) - 1
        assert ids[:n].tolist() == rendered[:-1]
        assert goals[goals != IGNORE].tolist() == trained_ids(tokenizer, messages)
        assert ((goals[:n] != IGNORE) == (np.array(mask[1:]) == 1)).all()
        assert (goals[n:] == IGNORE).all()
        assert ((ids >= 0) & (ids < tokenizer.n_vocab)).all()  # padding too is an id
        text = tokenizer.decode(goals[goals != IGNORE])
        assert text == "".join(answers(messages))


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_a_multiple_only_adds_ignored_columns(multiple, tokenizer, tmp_path):
    data = write_chats(tmp_path, tokenizer, 10)
    for rows in (np.arange(10), np.array([3]), np.array([0, 7])):
        idx, targets = data.batch(rows, 1000)
        wide_idx, wide_targets = data.batch(rows, 1000, multiple)
        T = idx.shape[1]
        assert wide_idx.shape == wide_targets.shape
        assert wide_idx.shape[1] % multiple == 0
        assert T <= wide_idx.shape[1] < T + multiple
        assert (wide_targets[:, :T] == targets).all()
        assert (wide_targets[:, T:] == IGNORE).all()
        here = np.flatnonzero((targets != IGNORE).any(axis=0)).max() + 1
        assert (wide_idx[:, :here] == idx[:, :here]).all()


@pytest.mark.parametrize("n_tokens", [2, 8, 9, 10, 16, 17, 33, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_scores_each_token_of_a_text_but_the_first_once(
    n_tokens, batch_size, tokenizer, tmp_path
):
    data = write_text(tmp_path, tokenizer, n_tokens)
    ids = np.fromfile(tmp_path / "train.bin", np.uint16).astype(int)
    batches = list(data.eval_batches("train", 8, batch_size))
    scored = np.concatenate([targets[targets != IGNORE] for _, targets in batches])
    assert scored.tolist() == ids[1:].tolist()
    seen = np.concatenate([idx[targets != IGNORE] for idx, targets in batches])
    assert seen.tolist() == ids[:-1].tolist()
    assert all(idx.shape[1] <= 8 and len(idx) <= batch_size for idx, _ in batches)
    assert tokenizer.bytes_per_id[scored].sum() == len(tokenizer.decode(ids[1:]).encode())
    again = list(data.eval_batches("train", 8, batch_size))
    assert all((a[0] == b[0]).all() for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_scores_each_answer_once(batch_size, tokenizer, tmp_path):
    data = write_chats(tmp_path, tokenizer, 3)
    scored = []
    for idx, targets in data.eval_batches("val", 1000, batch_size):
        assert len(idx) <= batch_size
        scored += [goals[goals != IGNORE].tolist() for goals in targets]
    conversations = many_dialogues(7, seed=1)
    assert sorted(scored) == sorted(trained_ids(tokenizer, messages) for messages in conversations)
    size = sum(len(text.encode()) for messages in conversations for text in answers(messages))
    assert sum(tokenizer.bytes_per_id[ids].sum() for ids in scored) == size


def test_collate_equals_padding_one_by_one(tokenizer):
    rendered = [tokenizer.render(messages) for messages in many_dialogues(9)]
    idx, targets = collate(rendered)
    assert idx.shape == targets.shape == (9, max(len(ids) for ids, _ in rendered) - 1)
    for row, (ids, mask) in enumerate(rendered):
        n = len(ids) - 1
        assert idx[row, :n].tolist() == ids[:-1]
        goals = [id if trained else IGNORE for id, trained in zip(ids[1:], mask[1:], strict=True)]
        assert targets[row].tolist() == goals + [IGNORE] * (idx.shape[1] - n)
        alone = collate([(ids, mask)])
        assert alone[0].tolist() == [ids[:-1]]
        assert alone[1].tolist() == [goals]


# --- directories that are not what they should be ----------------------------------------------


def test_a_missing_dataset_names_its_prepare_script(tmp_path):
    with pytest.raises(UserError, match=r"run python data/sanguo/prepare_sft\.py"):
        Dataset(str(tmp_path / "sanguo_sft"))
    shutil.copy(ROOT / "data" / "sanguo" / "prepare.py", tmp_path)
    with pytest.raises(UserError, match=r"meta\.json is missing; run python .*prepare\.py"):
        Dataset(str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere/meta\.json is missing; prepare it first"):
        Dataset(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"kind": "pretrain"}'])
def test_a_damaged_meta_is_told_and_not_a_traceback(content, tokenizer, tmp_path):
    write_text(tmp_path, tokenizer)
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json"):
        Dataset(str(tmp_path))


@pytest.mark.parametrize(
    "file", ["train.bin", "val.bin", "train_mask.bin", "train_idx.bin", "val_idx.bin"]
)
def test_a_missing_or_damaged_file_is_told_by_its_name(file, tokenizer, tmp_path):
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
    path.write_bytes(content)
    assert Dataset(str(tmp_path)).n_rows("train", 1000) == 5


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
    with pytest.raises(UserError, match="--max_tokens=128"):
        chats.check(128, "train")


def test_a_dataset_is_a_name_under_data_or_a_path(tokenizer, tmp_path, monkeypatch):
    write_text(tmp_path / "novel", tokenizer)
    monkeypatch.chdir(tmp_path)
    assert Dataset(str(tmp_path / "novel")).name == "novel"
    with pytest.raises(UserError, match=r"novel/meta\.json is missing"):
        Dataset("novel")  # paths are the repository's, wherever one stands
    relative = os.path.relpath(tmp_path / "novel", ROOT)
    assert Dataset(relative).fingerprint == Dataset(str(tmp_path / "novel")).fingerprint


@pytest.mark.parametrize(
    "ends, wanted",
    [("？？？", "？"), ("？" * 9 + "。", "？"), ("？？。", ""), ("谁谁谁", ""), ("？", "？")],
)
def test_meta_names_the_mark_that_ends_nearly_all_questions(tokenizer, tmp_path, ends, wanted):
    conversations = [dialogue(f"谁{n}{end}", "曹节。") for n, end in enumerate(ends)]
    splits = {"train": conversations, "val": [dialogue("汉朝", "温德殿。")]}
    meta = write_sft(tmp_path, tokenizer, splits, ["a test"], 64)
    assert meta["question_end"] == Dataset(str(tmp_path)).meta["question_end"] == wanted
