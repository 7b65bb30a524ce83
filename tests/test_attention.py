"""The attention for training on a CPU against torch's and against float64."""

import pytest
import torch
import torch.nn.functional as F

from miniglm.attention import attend, attend_keeping_weights


def inputs(*shape: int, heads: int = 4, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v whose heads lie apart in memory, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    B, T, D = shape
    counts = (4, heads, heads)
    return [torch.randn(B, T, n, D, generator=generator).transpose(1, 2) for n in counts]


def run(function, parts: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of the three inputs, in float64."""
    parts = [part.to(dtype).detach().requires_grad_() for part in parts]
    y = function(*parts)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    return [y.detach().double(), *(part.grad.double() for part in parts)]


def plain(q, k, v):
    groups = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)


@pytest.mark.parametrize("heads", [4, 1])
def test_products_equal_torchs_attention_and_its_gradients(heads):
    parts = inputs(2, 33, 8, heads=heads)
    ours, theirs = (run(f, parts, torch.float64) for f in (attend_keeping_weights, plain))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine - wanted).abs().max() < 1e-13


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_in_bfloat16_the_error_is_that_of_rounding(heads):
    parts = [part.bfloat16().float() for part in inputs(2, 64, 16, heads=heads)]
    exact = run(plain, parts, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(lambda q, k, v: attend(q, k, v, is_causal=True), parts, torch.float32)
    for mine, wanted in zip(ours, exact, strict=True):
        assert 0 < (mine - wanted).norm() / wanted.norm() < 2e-2


@pytest.mark.parametrize("heads", [2, 4])
def test_it_is_one_graph_where_heads_are_symbols(heads):
    """As a compiler takes them in a sharded model."""
    torch._dynamo.reset()
    q, k = torch.randn(2, 4, 8, 16), torch.randn(2, heads, 8, 16)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(q, k, k, is_causal=True), attend(q, k, k, is_causal=True))
