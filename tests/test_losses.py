"""Sums of the losses of the next token against slow and obvious versions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data_utils import IGNORE, Dataset
from miniglm.devices import to_device
from miniglm.losses import next_token, split_sums, target_losses
from tests.helpers import (
    ALL_MODELS,
    QUESTIONS,
    TEXT,
    random_ids,
    tiny_model,
    tiny_tokenizer,
    write_novel,
    write_questions,
)


def ragged_batch(rows: list[int], T: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """idx and targets in which row i has rows[i] trained targets, at random places."""
    ids = random_ids(len(rows), T + 1, seed=seed).numpy()
    targets = np.full((len(rows), T), IGNORE)
    generator = np.random.default_rng(seed)
    for row, trained in enumerate(rows):
        places = generator.choice(T, trained, replace=False)
        targets[row, places] = ids[row, 1:][places]
    return ids[:, :-1], targets


def slow_losses(model: torch.nn.Module, idx, targets) -> list[list[float]]:
    """-log p of each trained target, a row at a time, the softmax written out in float64."""
    losses = []
    for ids, wanted in zip(np.asarray(idx), np.asarray(targets), strict=True):
        with torch.no_grad():
            logits = model.head(model(torch.tensor(ids)[None]))[0].double().numpy()
        losses.append([])
        for row, target in zip(logits, wanted, strict=True):
            if target != IGNORE:
                shifted = row - row.max()
                losses[-1].append(math.log(np.exp(shifted).sum()) - shifted[target])
    return losses


def gradients(model: torch.nn.Module, batches: list, count: int) -> list[torch.Tensor]:
    """Those of the sum over all batches, each batch's divided by the count of the whole."""
    model.zero_grad()
    for batch in batches:
        (next_token(model, *to_device(batch, "cpu")) / count).backward()
    return [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("options", ALL_MODELS.values(), ids=ALL_MODELS)
def test_next_token_is_the_log_softmax_by_hand(options):
    model = tiny_model(**options)
    for rows in ([12, 12], [3, 0, 12, 1]):
        batch = ragged_batch(rows)
        slow = slow_losses(model, *batch)
        assert list(map(len, slow)) == rows
        total = next_token(model, *to_device(batch, "cpu"))
        assert total.item() == pytest.approx(sum(map(sum, slow)), rel=1e-5)


def test_the_padding_of_the_vocabulary_is_never_scored():
    model = tiny_model(tie_weights=False)
    batch = to_device(ragged_batch([12, 5]), "cpu")
    before = next_token(model, *batch).item()
    with torch.no_grad():
        model.lm_head.weight[50:] = 1e4
    assert next_token(model, *batch).item() == before


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1]])
def test_accumulated_gradients_equal_the_full_batchs(sizes):
    model = tiny_model(n_kv_head=2).double()
    idx, targets = ragged_batch([12, 1, 0, 7, 3, 12])
    cuts = np.cumsum(sizes)[:-1]
    micro = list(zip(np.split(idx, cuts), np.split(targets, cuts), strict=True))
    count = int((targets != IGNORE).sum())
    full = gradients(model, [(idx, targets)], count)
    assert max(grad.abs().max() for grad in full) > 1e-2
    for whole, summed in zip(full, gradients(model, micro, count), strict=True):
        assert (whole - summed).abs().max() < 1e-12


def test_a_batch_without_a_trained_target_gives_zero_and_zero_gradients():
    model = tiny_model()
    batch = ragged_batch([0, 0])
    total = next_token(model, *to_device(batch, "cpu"))
    assert total.item() == 0
    total.backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
    losses = target_losses(model, *to_device(batch, "cpu"))
    assert losses.shape == (2, 12) and not losses.any()


def test_target_losses_stand_at_their_targets_and_sum_to_next_token():
    model = tiny_model(n_kv_head=1)
    batch = ragged_batch([12, 0, 5])
    losses = target_losses(model, *to_device(batch, "cpu")).numpy()
    assert (losses[batch[1] == IGNORE] == 0).all()
    for row, slow in zip(range(3), slow_losses(model, *batch), strict=True):
        assert losses[row][batch[1][row] != IGNORE] == pytest.approx(slow, rel=1e-4, abs=1e-5)
    total = next_token(model, *to_device(batch, "cpu"))
    assert losses.sum() == pytest.approx(total.item(), rel=1e-5)


def model_for(tokenizer, **options):
    return tiny_model(n_vocab=tokenizer.n_vocab, dropout=0.2, **options)


@pytest.mark.parametrize("block_size", [16, 37])
def test_split_sums_of_a_text_equal_a_slow_loop_over_its_windows(tmp_path, block_size):
    tokenizer = tiny_tokenizer()
    data = Dataset(str(write_novel(tmp_path / "novel", tokenizer)))
    model = model_for(tokenizer, block_size=block_size)
    lines = TEXT.splitlines()[3:]
    ids = [id for line in lines for id in [*tokenizer.encode(line), tokenizer.end_of_text]]
    assert data.tokens["val"].tolist() == ids
    nats = 0.0
    for start in range(0, len(ids) - 1, block_size):
        window = ids[start : start + block_size + 1]
        nats += sum(slow_losses(model, [window[:-1]], [window[1:]])[0])
    first = int(tokenizer.bytes_per_id[ids[0]])  # which nothing predicts
    n_bytes = len("".join(lines).encode()) - first
    got = split_sums(model, data, "val", 3, "cpu")
    assert got == (pytest.approx(nats, rel=1e-5), len(ids) - 1, n_bytes)


def test_split_sums_of_questions_equal_a_slow_loop_over_their_answers(tmp_path):
    tokenizer = tiny_tokenizer()
    data = Dataset(str(write_questions(tmp_path / "qa", tokenizer)))
    model = model_for(tokenizer, block_size=128)
    for split, conversations in QUESTIONS.items():
        nats, count, n_bytes = 0.0, 0, 0
        for messages in conversations:
            for turn in range(1, len(messages), 2):
                prompt = tokenizer.render_prompt(messages[:turn])
                answer = [*tokenizer.encode(messages[turn]["content"]), tokenizer.end]
                targets = [IGNORE] * (len(prompt) - 1) + answer
                nats += sum(slow_losses(model, [(prompt + answer)[:-1]], [targets])[0])
                count += len(answer)
                n_bytes += len(messages[turn]["content"].encode())
        got = split_sums(model, data, split, 2, "cpu")
        assert got == (pytest.approx(nats, rel=1e-5), count, n_bytes)


@pytest.mark.parametrize("write", [write_novel, write_questions])
def test_split_sums_do_not_depend_on_the_batch_size(tmp_path, write):
    tokenizer = tiny_tokenizer()
    data = Dataset(str(write(tmp_path / "data", tokenizer)))
    model = model_for(tokenizer, block_size=128 if write is write_questions else 20)
    nats, count, n_bytes = split_sums(model, data, "train", 1, "cpu")
    assert count > 20 and n_bytes > 20
    for batch_size in (2, 7, 1000):
        got = split_sums(model, data, "train", batch_size, "cpu")
        assert got == (pytest.approx(nats, rel=1e-6), count, n_bytes)


@pytest.mark.parametrize("training", [True, False])
def test_split_sums_are_those_of_eval_mode_and_leave_the_mode_alone(tmp_path, training):
    tokenizer = tiny_tokenizer()
    data = Dataset(str(write_novel(tmp_path / "novel", tokenizer)))
    model = model_for(tokenizer, block_size=20)
    plain = split_sums(model, data, "val", 4, "cpu")
    model.train(training)
    assert split_sums(model, data, "val", 4, "cpu") == plain
    assert model.training is model.drop.training is training


def plain_loss(model: torch.nn.Module, batch) -> torch.Tensor:
    """All logits at once."""
    logits = model.head(model(batch[0])).flatten(0, -2)
    return F.cross_entropy(logits, batch[1].flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_in_chunks_equals_cross_entropy_and_its_gradients(tied, dtype, limit):
    model = tiny_model(tie_weights=tied, block_size=300).to(dtype)
    batch = to_device(ragged_batch([300, 290, 0, 300, 300], T=300), "cpu")  # several chunks
    found = []
    for loss in (next_token(model, *batch), plain_loss(model, batch)):
        model.zero_grad()
        (loss * 3).backward()
        found.append([loss.detach(), *(weight.grad.clone() for weight in model.parameters())])
    assert model.lm_head.weight.grad[:50].abs().min() > 0
    assert not model.lm_head.weight.grad[50:].any()
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == dtype
        assert (ours - plain).abs().max() <= limit * plain.abs().max()


def test_the_loss_in_chunks_under_autocast_is_as_near_as_cross_entropys():
    model = tiny_model(block_size=300)
    batch = to_device(ragged_batch([300] * 4, T=300), "cpu")
    grads = {}
    for name in ("exact", "plain", "chunks"):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            loss = next_token(model, *batch)
            if name != "chunks":
                loss = plain_loss(model, batch)
        loss.backward()
        grads[name] = model.wte.weight.grad.clone()
    errors = {name: (grads[name] - grads["exact"]).norm() for name in ("plain", "chunks")}
    assert 0 < errors["chunks"] < 1.1 * errors["plain"]


def test_a_frozen_head_gets_no_gradient_and_the_rest_its_own():
    model = tiny_model(tie_weights=False)
    batch = to_device(ragged_batch([12, 5]), "cpu")
    next_token(model, *batch).backward()
    wanted = model.wte.weight.grad.clone()
    model.zero_grad()
    model.lm_head.weight.requires_grad_(False)
    next_token(model, *batch).backward()
    assert model.lm_head.weight.grad is None
    assert torch.equal(model.wte.weight.grad, wanted)


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_do_not_grow_with_the_batch():
    model = tiny_model(block_size=300, n_vocab=3000, n_layer=1)
    for rows in (4, 8):
        batch = to_device(ragged_batch([300] * rows, T=300), "cpu")
        with Largest() as largest:
            next_token(model, *batch).backward()
            target_losses(model, *batch)
        assert largest.numel == 512 * model.config.vocab_size
