"""The account of a step's time: complete, and each kind where it belongs."""

import time
from collections.abc import Iterator

import pytest
import torch

import train
from bench.profile import KINDS, numbers, profile_step, whole_step
from data_utils import Dataset
from miniglm.objectives import ChunkedLoss
from model import GPT, ModelConfig
from tests.helpers import random_ids, tiny_model


@pytest.fixture(scope="module")
def dataset() -> Iterator[Dataset]:
    with numbers(2000) as data:
        yield data


def profiled(dataset: Dataset, vocab_size: int = 320, **settings: object) -> dict[str, float]:
    """The account of train.py's step with a tiny model."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64}
    config = ModelConfig(**shape, n_vocab=320, vocab_size=vocab_size)
    common = {"batch_size": 4, "block_size": 64, "device": "cpu"}
    step = whole_step(GPT(config).train(), dataset, train.Settings(**common | settings))
    return profile_step(step, steps=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_has_every_kind(dataset, dtype):
    times = profiled(dataset, dtype=dtype)
    assert list(times) == KINDS
    assert all(milliseconds > 0 for milliseconds in times.values())


def test_adamw_alone_leaves_nothing_to_muon(dataset):
    times = profiled(dataset, optimizer="adamw", dtype="float32")
    assert times["Muon"] == 0
    assert times["AdamW"] > 0


def test_a_larger_vocabulary_raises_the_share_of_head_and_loss(dataset):
    shares = []
    for vocab_size in (1024, 8 * 1024):
        times = profiled(dataset, vocab_size, optimizer="adamw", dtype="float32")
        shares.append(times["head and loss"] / sum(times.values()))
    assert shares[1] > shares[0]


def test_the_sum_lies_between_what_clocks_inside_and_outside_measure():
    inside = []

    def step() -> None:
        began = time.perf_counter()
        torch.randn(300, 300) @ torch.randn(300, 300)
        time.sleep(0.02)
        inside.append(time.perf_counter() - began)

    began = time.perf_counter()
    times = profile_step(step, steps=3)
    outside = time.perf_counter() - began
    total = 3 * sum(times.values()) / 1000
    assert 0.99 * sum(inside[1:]) < total < 1.01 * outside
    assert times["Python, autograd, idle"] > 0.99 * 20


def test_products_of_the_head_are_none_of_the_blocks():
    model = tiny_model()
    hidden = torch.randn(20, 32, requires_grad=True)
    targets, weight = random_ids(20), model.lm_head.weight
    times = profile_step(lambda: ChunkedLoss.apply(model.head, hidden, targets, weight).backward())
    assert times["head and loss"] > 0
    assert times["products of the blocks"] == 0


def test_a_product_is_one_of_the_blocks():
    left, right = torch.randn(20, 30), torch.randn(30, 40)
    times = profile_step(lambda: left @ right)
    parts = ("head and loss", "attention", "Muon", "AdamW", "data", "copies and casts")
    assert times["products of the blocks"] > 0
    assert not any(times[kind] for kind in parts)
