"""Muon's step against a plain version in float64 and torch's own; groups and their rates."""

import pytest
import torch

from miniglm.checkpoint import MODELS
from miniglm.optim import Muon, learning_rate, make_optimizers, orthogonalize
from model import ModelConfig
from train import Settings

SHAPES = [(16, 16), (16, 24), (24, 16), (16, 48), (48, 16), (8, 70)]


def plain(matrix: torch.Tensor) -> torch.Tensor:
    """The Newton-Schulz iteration of a matrix, as it is written."""
    X = matrix.double() / matrix.double().norm()
    for _ in range(5):
        X = 3.4445 * X - 4.7750 * (X @ X.T) @ X + 2.0315 * (X @ X.T) @ (X @ X.T) @ X
    return X


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalized_equals_the_plain_iteration_with_singular_values_near_one(shape):
    matrices = random(3, *shape)
    for ours, matrix in zip(orthogonalize(matrices), matrices, strict=True):
        assert (ours - plain(matrix)).abs().max() < 1e-5
        assert ours.is_contiguous()  # as a weight, or lists are not stepped in one kernel
        values = torch.linalg.svdvals(ours)
        assert values.min() > 0.5 and values.max() < 1.3
        assert torch.linalg.svdvals(matrix).max() > 4


def test_a_gradient_of_zero_moves_nothing():
    assert orthogonalize(torch.zeros(1, 8, 8)).abs().max() == 0


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_in_half_precision_the_direction_is_the_same_within_it(dtype, error):
    matrices = random(2, 24, 96)
    exact, rough = orthogonalize(matrices), orthogonalize(matrices, dtype)
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).norm() < error * exact.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_a_plain_version_in_float64(shape):
    weight = torch.nn.Parameter(random(*shape, seed=1))
    wanted, momentum, squares = weight.detach().double(), 0, 0
    optimizer = Muon([weight], lr=0.02, weight_decay=0.3)
    for step in range(4):
        weight.grad = random(*shape, seed=step + 2)
        optimizer.step()
        gradient = weight.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = plain(0.95 * momentum + 0.05 * gradient)
        squares = 0.95 * squares + 0.05 * (direction**2).mean(dim=1, keepdim=True)
        direction = direction / squares.sqrt()
        rms = (direction**2).mean().sqrt()
        wanted = wanted - 0.02 * (0.3 * wanted + 0.2 * direction / rms)
    assert (weight - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_step_is_torchs_with_rows_of_one_length_within_bfloat16(shape):
    before = random(*shape, seed=1)
    ours, theirs = (torch.nn.Parameter(before.clone()) for _ in range(2))
    for weight, muon in ((ours, Muon), (theirs, torch.optim.Muon)):
        weight.grad = random(*shape, seed=2)
        muon([weight], lr=1.0, weight_decay=0.0).step()
    wanted = torch.nn.functional.normalize((theirs - before).detach(), dim=1) * shape[1] ** 0.5
    moved = (ours - before).detach()
    assert (moved - 0.2 * wanted).norm() < 0.02 * moved.norm()


def test_the_momentum_of_an_older_version_goes_on():
    weight = torch.nn.Parameter(random(8, 4, seed=1))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.0)
    optimizer.state[weight]["momentum_buffer"] = torch.ones(8, 4)
    weight.grad = torch.zeros(8, 4)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], torch.full((8, 4), 0.95))


def test_a_matrix_without_a_gradient_stays():
    """The first matrices of a block, while its output is zero."""
    weight = torch.nn.Parameter(random(8, 4, seed=1))
    weight.grad, before = torch.zeros(8, 4), weight.detach().clone()
    Muon([weight], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("options", [{}, {"tie_weights": False}, {"model": "lstm"}])
def test_every_parameter_is_optimized_once_with_its_own_rate_and_decay(options, optimizer):
    shape = {"n_layer": 1, "n_embd": 8, "bias": True} | options
    if "model" not in options:
        shape |= {"n_head": 2, "position": "learned"}
    model = MODELS[shape.get("model", "gpt")](ModelConfig(n_vocab=10, **shape))
    for own_lr, own_decay, ratio, decay in ((2e-3, 0.5, 0.2, 0.5), (None, None, 1.0, 0.3)):
        config = Settings(optimizer=optimizer, learning_rate=1e-2, weight_decay=0.3)
        config.embedding_lr, config.embedding_decay = own_lr, own_decay
        optimizers = make_optimizers(model, config, "cpu")
        groups = [group for made in optimizers for group in made.param_groups]
        optimized = [(id(parameter), group) for group in groups for parameter in group["params"]]
        group_of = dict(optimized)
        assert len(optimized) == len(group_of) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            group, embeds = group_of[id(parameter)], name.startswith(("wte", "wpe", "lm_head"))
            assert group["lr_ratio"] == pytest.approx(
                ratio if parameter.dim() > 1 and embeds else 1
            )
            wanted = 0.0 if parameter.dim() < 2 else decay if embeds else 0.3
            assert group["weight_decay"] == wanted, name
        assert isinstance(optimizers[0], Muon) == (optimizer == "muon" and "model" not in options)


def test_the_learning_rate_rises_and_falls_on_straight_lines():
    def rates(steps: range, **settings) -> list[float]:
        config = Settings(learning_rate=1.0, **settings)
        return [learning_rate(step, config) for step in steps]

    rise, fall = [0.25, 0.5, 0.75, 1.0], [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2]
    whole = rates(range(14), min_lr=0.2, warmup_iters=4, max_iters=12)
    assert whole == pytest.approx(rise + fall)
    # without lr_decay_iters the decay ends with the run
    assert rates((5, 10), warmup_iters=0, max_iters=10) == pytest.approx([0.5, 0.0])
    early = rates((5, 30), warmup_iters=0, max_iters=40, lr_decay_iters=10)
    assert early == pytest.approx([0.5, 0.0])
    # a warm-up longer than the run only rises
    rising = rates(range(10), warmup_iters=100, max_iters=10)
    assert rising == pytest.approx([0.01 * (step + 1) for step in range(10)])
