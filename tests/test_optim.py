"""Muon's step against torch's own, and against a plain version in float64."""

import pytest
import torch

from miniglm.optim import Muon, orthogonalize

SHAPES = [(16, 16), (16, 24), (24, 16), (16, 48), (48, 16), (8, 70)]


def plain(matrix: torch.Tensor) -> torch.Tensor:
    """Newton and Schulz's iteration as it is written, one matrix."""
    X = matrix.double() / matrix.double().norm()
    for _ in range(5):
        X = 3.4445 * X - 4.7750 * (X @ X.T) @ X + 2.0315 * (X @ X.T) @ (X @ X.T) @ X
    return X


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalized_equals_the_plain_iteration(shape):
    matrices = random(3, *shape)
    got = orthogonalize(matrices)
    for one, matrix in zip(got, matrices, strict=True):
        assert (one - plain(matrix)).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(random(1, *shape))[0])
    assert values.min() > 0.5 and values.max() < 1.3
    assert torch.linalg.svdvals(random(1, *shape)[0]).max() > 4


def test_a_gradient_of_zero_moves_nothing():
    assert orthogonalize(torch.zeros(1, 8, 8)).abs().max() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_a_plain_version_in_float64(shape):
    weight = torch.nn.Parameter(random(*shape, seed=1))
    wanted, momentum = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.02, weight_decay=0.3)
    for step in range(4):
        weight.grad = random(*shape, seed=step + 2)
        optimizer.step()
        gradient = weight.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = plain(0.95 * momentum + 0.05 * gradient)
        wanted = wanted - 0.02 * (0.3 * wanted + 0.2 * max(shape) ** 0.5 * direction)
    assert (weight - wanted).abs().max() < 1e-5


def test_steps_equal_torchs_within_bfloat16():
    ours = [torch.nn.Parameter(random(*shape, seed=1)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    common = {"lr": 0.02, "weight_decay": 0.3}
    optimizers = [
        Muon(ours, **common),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **common),
    ]
    before = [weight.detach().clone() for weight in ours]
    for step in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = random(*one.shape, seed=step + 2)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, start in zip(ours, theirs, before, strict=True):
        assert (one - other).norm() < 0.02 * (one - start).norm()


def test_in_bfloat16_the_direction_is_the_same_within_its_precision():
    matrices = random(2, 24, 96)
    exact, rough = orthogonalize(matrices), orthogonalize(matrices, torch.bfloat16)
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).norm() < 0.03 * exact.norm()
