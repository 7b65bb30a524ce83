"""Sums of losses against slow and obvious versions."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_utils import IGNORE, Dataset
from miniglm.lora import add_adapters
from miniglm.losses import (
    chunk_sizes,
    chunks,
    next_token,
    send,
    sequence_log_prob,
    split_sums,
    target_losses,
)
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


def ragged_batch(rows: list[int], T: int = 12) -> tuple[torch.Tensor, ...]:
    """What losses take, of which row i has rows[i] trained targets, at random places."""
    ids = random_ids(len(rows), T + 1)
    targets = torch.full((len(rows), T), IGNORE)
    generator = torch.Generator().manual_seed(0)
    for row, trained in enumerate(rows):
        places = torch.randperm(T, generator=generator)[:trained]
        targets[row, places] = ids[row, 1:][places]
    return send((ids[:, :-1].numpy(), targets.numpy()), "cpu")


def plain_losses(model: torch.nn.Module, idx, targets, _=None) -> list[torch.Tensor]:
    """-log p of each trained target, a row at a time, with all of its logits."""
    rows = []
    for ids, wanted in zip(torch.as_tensor(idx), torch.as_tensor(targets), strict=True):
        log_p = model.head(model(ids[None]))[0].log_softmax(-1)
        places = (wanted != IGNORE).nonzero()[:, 0]
        rows.append(-log_p[places, wanted[places]])
    return rows


def plain_sum(model: torch.nn.Module, *batch) -> torch.Tensor:
    return torch.cat(plain_losses(model, *batch)).sum()


@pytest.mark.parametrize("options", ALL_MODELS.values(), ids=ALL_MODELS)
def test_next_token_and_target_losses_are_those_of_the_log_softmax(options):
    model = tiny_model(**options)
    for rows in ([12, 12], [3, 0, 12, 1]):
        batch = ragged_batch(rows)
        losses = target_losses(model, *batch)
        for row, wanted in enumerate(plain_losses(model, *batch)):
            is_target = batch[1][row] != IGNORE
            assert torch.allclose(losses[row][is_target], wanted, rtol=1e-4, atol=1e-5)
            assert not losses[row][~is_target].any()
        wanted = plain_sum(model, *batch).item()
        assert next_token(model, *batch).item() == pytest.approx(wanted, rel=1e-5)


def test_a_batch_without_a_trained_target_gives_zero_and_zero_gradients():
    model, batch = tiny_model(), ragged_batch([0, 0])
    total = next_token(model, *batch)
    assert total.item() == 0
    total.backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
    losses = target_losses(model, *batch)
    assert losses.shape == (2, 12) and not losses.any()


def weighted(log_probs: torch.Tensor) -> torch.Tensor:
    """A sum in which each row has another weight."""
    return (log_probs * torch.linspace(-2, 1, len(log_probs), dtype=log_probs.dtype)).sum()


def rows_sum(model: torch.nn.Module, *batch) -> torch.Tensor:
    return weighted(sequence_log_prob(model, *batch))


def plain_rows_sum(model: torch.nn.Module, *batch) -> torch.Tensor:
    losses = [row.sum() for row in plain_losses(model, *batch)]
    return weighted(-torch.stack(losses))


both = pytest.mark.parametrize(
    ("loss", "plain"),
    [(next_token, plain_sum), (rows_sum, plain_rows_sum)],
    ids=["next_token", "sequence_log_prob"],
)


@both
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("tied", [True, False])
def test_losses_in_chunks_equal_plain_ones_and_their_gradients(loss, plain, tied, dtype, limit):
    model = tiny_model(tie_weights=tied, block_size=300).to(dtype)
    batch = ragged_batch([300, 290, 0, 300, 300], T=300)  # several chunks
    results = []
    for total in (loss(model, *batch), plain(model, *batch)):
        model.zero_grad()
        (total * 3).backward()
        results.append([total.detach(), *(weight.grad.clone() for weight in model.parameters())])
    assert model.lm_head.weight.grad[:50].abs().min() > 0
    assert not model.lm_head.weight.grad[50:].any()  # the padding of the vocabulary
    for ours, wanted in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert (ours - wanted).abs().max() <= limit * wanted.abs().max()


@both
def test_losses_in_chunks_are_as_near_under_autocast_as_plain_ones(loss, plain):
    model, batch, grads = tiny_model(block_size=300), ragged_batch([300] * 4, T=300), {}
    for name, function in (("exact", plain), ("plain", plain), ("chunks", loss)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            total = function(model, *batch)
        total.backward()  # outside autocast, as in train.py
        grads[name] = model.wte.weight.grad.clone()
    errors = {name: (grads[name] - grads["exact"]).norm() for name in ("plain", "chunks")}
    assert 0 < errors["chunks"] < 1.1 * errors["plain"]


@both
def test_a_frozen_head_gets_no_gradient_and_its_adapter_its_own(loss, plain):
    model, batch, grads = tiny_model(tie_weights=False).double(), ragged_batch([7, 12]), []
    add_adapters(model, 3, 4.0, ["lm_head"])
    torch.nn.init.normal_(model.lm_head.lora_B)
    for total in (loss(model, *batch), plain(model, *batch)):
        model.zero_grad()
        total.backward()
        grads.append([model.lm_head.lora_A.grad.clone(), model.lm_head.lora_B.grad.clone()])
        assert model.lm_head.weight.grad is None
    assert all(torch.allclose(*pair, rtol=1e-10) for pair in zip(*grads, strict=True))


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
        batch = ragged_batch([300] * rows, T=300)
        with Largest() as largest:
            next_token(model, *batch).backward()
            sequence_log_prob(model, *batch).sum().backward()
            target_losses(model, *batch)
        assert largest.numel == 512 * model.config.vocab_size


# --- whole splits ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_split_sums_of_a_text_equal_a_slow_loop_over_its_windows(tmp_path, training):
    tokenizer = tiny_tokenizer()
    data = Dataset(str(write_novel(tmp_path / "novel", tokenizer)))
    model = tiny_model(n_vocab=tokenizer.n_vocab, dropout=0.2, block_size=16)
    lines = TEXT.splitlines()[3:]
    ids = [id for line in lines for id in [*tokenizer.encode(line), tokenizer.end_of_text]]
    nats = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        nats += plain_sum(model, [window[:-1]], [window[1:]]).item()
    first = int(tokenizer.bytes_per_id[ids[0]])  # which nothing predicts
    wanted = pytest.approx(nats, rel=1e-5), len(ids) - 1, len("".join(lines).encode()) - first
    model.train(training)
    for batch_size in (1, 3, 1000):
        assert split_sums(model, data, "val", batch_size) == wanted
    assert model.training is model.drop.training is training


def test_split_sums_of_questions_equal_a_slow_loop_over_their_answers(tmp_path):
    tokenizer = tiny_tokenizer()
    data = Dataset(str(write_questions(tmp_path / "qa", tokenizer)))
    model = tiny_model(n_vocab=tokenizer.n_vocab, block_size=128)
    for split, conversations in QUESTIONS.items():
        nats, count, n_bytes = 0.0, 0, 0
        for messages in conversations:
            for turn in range(1, len(messages), 2):
                prompt = tokenizer.render_prompt(messages[:turn])
                answer = [*tokenizer.encode(messages[turn]["content"]), tokenizer.end]
                targets = [IGNORE] * (len(prompt) - 1) + answer
                nats += plain_sum(model, [(prompt + answer)[:-1]], [targets]).item()
                count += len(answer)
                n_bytes += len(messages[turn]["content"].encode())
        for batch_size in (1, 2, 1000):
            got = split_sums(model, data, split, batch_size)
            assert got == (pytest.approx(nats, rel=1e-5), count, n_bytes)


def test_chunks_have_few_sizes_and_hold_all_rows_in_order():
    """Each new size costs memory for as long as a process runs."""
    model, sizes = tiny_model(), set()
    for n in range(1200):
        hidden = torch.arange(float(n))[:, None].expand(n, model.config.n_embd)
        parts = [h for h, _, _ in chunks(model, hidden, torch.zeros(n, dtype=torch.int64))]
        sizes |= {len(h) for h in parts}
        assert torch.equal(torch.cat(parts), hidden)
    assert sizes == {0} | {2**i for i in range(10)}


def test_a_chunk_of_logits_is_small_whatever_the_vocabulary():
    def rows(n_vocab: int, device: str) -> int:
        return chunk_sizes(10_000, n_vocab, device)[0]

    assert [rows(n, "cpu") for n in (6400, 8192, 32768, 151_669)] == [512, 512, 512, 110]
    assert [rows(n, "cuda") for n in (6400, 32768, 151_669)] == [4096, 4096, 884]
    assert rows(10**9, "cpu") == 1 and chunk_sizes(300, 6400, "cuda") == [300]
