"""One token a row through the GPT: what model.py computes, in fewer and larger operations.

On a CPU a small model's step is bound by the number of operations, a larger one's by the weights
that are read. So a layer's pieces are laid out flat here, queries and keys are normed and turned
together, and pack() stores matrices as oneDNN wants them, which reads them up to three times as
fast as torch's own product of few rows.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from model import GPT, KVCache


class PackedLinear(nn.Module):
    """A Linear whose float32 weight oneDNN has laid out for products of few rows."""

    ROWS = 16  # that the layout is made for; good for one row and for hundreds

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, self.ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A Linear whose weight is stored in 8 bits, a scale a row; what it reads is brought to 8 bits
    as it comes, by the largest and smallest number of the whole input: so a row's result depends,
    a little, on the rows beside it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.data
        self.out_features, self.in_features = weight.shape
        scales = weight.abs().amax(dim=1).clamp_min(1e-12).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            # such tensors will go in a later torch; the one that is pinned has no other quick way
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.weight = torch.ops.quantized.linear_prepack(rounded, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # 7 bits of what is read: processors without VNNI add pairs of products in 16 bits
        return torch.ops.quantized.linear_dynamic(x, self.weight, True)


class FlatRMSNorm:
    """x (..., C) -> x / rms(x), times the weight if there is one, in five or six operations."""

    def __init__(self, C: int, eps: float, weight: torch.Tensor | None = None):
        self.eps, self.scale = C * eps, C**0.5
        self.weight = None if weight is None else weight.detach() * self.scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        x = x * squares.add_(self.eps).rsqrt_()
        return x if self.weight is None else x.mul_(self.weight)


class Decoder:
    """model(idx[:, None], cache)[:, -1] for one id a row: (B,) -> (B, n_embd), without gradients.

    static: a step always has all rows and the whole length of the cache, so that on CUDA one
    graph is recorded and played again; compiling it takes a while.
    """

    def __init__(self, model: GPT, static: bool = False):
        c = self.config = model.config
        self.wte, self.norm = model.wte.weight, flat_norm(model.norm)
        self.layers = [Layer(block) for block in model.blocks]
        self.static, self.run = static, self._run
        if static and self.wte.device.type == "cuda":
            self.run = torch.compile(self._run, mode="reduce-overhead", fullgraph=True)
        self.wpe = model.wpe.weight if c.position == "learned" else None
        if c.position == "rope":
            half = c.head_dim // 2
            swap = torch.arange(c.head_dim, device=self.wte.device).roll(half)
            # the turn is x cos + x[swap] sin, its sign in the table; the weights that norm queries
            # and keys stand in both factors
            sin = torch.cat([-model.sin[:, :half], model.sin[:, half:]], dim=-1)
            self.cos, self.sin, self.swap = model.cos[:, None], sin[:, None], swap
            weights = [qk_weights(block.attn) for block in model.blocks]  # (heads, head_dim) each
            self.qk = torch.stack(weights).to(self.wte.dtype)
            self.qk_swapped = self.qk[..., swap]

    def __call__(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        lengths, B = cache.lengths, len(idx)
        if max(lengths) >= self.config.block_size:
            raise ValueError(f"{max(lengths) + 1} tokens exceed {self.config.block_size=}")
        if self.static:
            k, v = cache.all_k, cache.all_v
            for part in (k, v):  # a graph may write into them: they stay where they are
                torch._dynamo.mark_static_address(part)
            rest = k.shape[1] - B  # rows that nobody reads
            at = torch.tensor([*lengths, *[0] * rest], device=idx.device)
            x = self.run(F.pad(idx, (0, rest)), at, k.shape[3], k, v)[:B]
        else:
            same = min(lengths) == max(lengths)
            at = lengths[0] if same else torch.tensor(lengths, device=idx.device)
            x = self.run(idx, at, max(lengths) + 1, cache.k, cache.v)
        cache.lengths = [length + 1 for length in lengths]
        return x

    def _run(self, idx, at, end, k, v):
        """at: the position of each row's id, (B,), or an int where all have the same; end: of the
        positions that are looked at; k, v: the cache's, of as many rows."""
        c, B = self.config, len(idx)
        x = F.embedding(idx, self.wte)
        if self.wpe is not None:
            x = x + self.wpe[at]
        seen_k, seen_v = k.narrow(3, 0, end).unbind(), v.narrow(3, 0, end).unbind()
        rows = mask = None
        if isinstance(at, torch.Tensor):
            rows = torch.arange(B, device=idx.device)
            mask = torch.arange(end, device=idx.device) <= at[:, None, None, None]
            new_k = new_v = [None] * c.n_layer
        else:
            new_k, new_v = k.narrow(3, at, 1).unbind(), v.narrow(3, at, 1).unbind()
        turns = [None] * c.n_layer
        if self.wpe is None:
            cos, sin = self.cos[at], self.sin[at]  # (1, head_dim), or (B, 1, head_dim)
            if rows is None:
                turns = list(zip(self.qk * cos, self.qk_swapped * sin, strict=True))
            else:
                qk, swapped = self.qk[:, None] * cos, self.qk_swapped[:, None] * sin
                turns = list(zip(qk, swapped, strict=True))
        embedding, first_values = x, None
        for i, layer in enumerate(self.layers):
            if layer.skip:
                x = layer.skip[0] * x + layer.skip[1] * embedding
            qkv = layer.c_attn(layer.norm_1(x)).view(B, -1, c.head_dim)
            q, new, values = self._heads(layer, qkv, turns[i], first_values)
            if rows is None:
                new_k[i].copy_(new.unsqueeze(2))
                new_v[i].copy_(values.unsqueeze(2))
            else:
                k[i][rows, :, at], v[i][rows, :, at] = new, values
            first_values = values if first_values is None else first_values
            y = F.scaled_dot_product_attention(
                q.unsqueeze(2),
                seen_k[i],
                seen_v[i],
                attn_mask=mask,
                enable_gqa=c.n_head != c.n_kv_head,
            )
            x = x + layer.c_proj(y.view(B, -1))
            x = x + layer.mlp(layer.norm_2(x))
        return self.norm(x)

    def _heads(self, layer: "Layer", qkv, turn, first_values):
        """Queries, keys and values of one layer, (B, heads, head_dim) each."""
        c = self.config
        qk, values = qkv.split([c.n_head + c.n_kv_head, c.n_kv_head], dim=1)
        if layer.qk_norm:
            qk = layer.qk_norm(qk)
        if layer.mix:
            values = layer.mix[0] * values + layer.mix[1] * first_values
        if turn:
            cos, sin = turn
            qk = torch.addcmul(qk * cos, qk.index_select(-1, self.swap), sin)
        return *qk.split([c.n_head, c.n_kv_head], dim=1), values


class Layer:
    """A block of the GPT, its pieces at hand."""

    def __init__(self, block: nn.Module):
        c, attn = block.config, block.attn
        self.norm_1, self.norm_2 = flat_norm(block.norm_1), flat_norm(block.norm_2)
        self.c_attn, self.c_proj = attn.c_attn.forward, attn.c_proj.forward
        self.mlp = flat_swiglu(block.mlp) if c.mlp == "swiglu" else block.mlp
        self.skip = block.skip.tolist() if c.embedding_skip else None
        self.mix = attn.mix.tolist() if attn.mixes else None
        self.qk_norm = None
        if c.qk_norm:  # the weights stand in the turn, where there is one
            weight = None if c.position == "rope" else qk_weights(attn)
            self.qk_norm = FlatRMSNorm(c.head_dim, c.norm_eps, weight)


def qk_weights(attn: nn.Module) -> torch.Tensor:
    """What each query's and key's numbers are multiplied with after their norm, (heads, head_dim);
    the root of head_dim as well, which FlatRMSNorm leaves out without a weight."""
    c = attn.config
    if not c.qk_norm:
        return torch.ones(c.n_head + c.n_kv_head, c.head_dim, device=attn.c_attn.weight.device)
    q, k = attn.q_norm.weight.expand(c.n_head, -1), attn.k_norm.weight.expand(c.n_kv_head, -1)
    scale = c.head_dim**0.5 if c.position == "rope" else 1.0
    return torch.cat([q, k]).detach() * scale


def flat_norm(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    if isinstance(norm, nn.RMSNorm):
        return FlatRMSNorm(norm.weight.shape[0], norm.eps, norm.weight)
    return norm


def flat_swiglu(mlp: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    c_fc, c_proj = mlp.c_fc.forward, mlp.c_proj.forward

    def run(x: torch.Tensor) -> torch.Tensor:
        gate, up = c_fc(x).chunk(2, dim=-1)
        return c_proj(F.silu(gate).mul_(up))

    return run


def pack(model: nn.Module) -> nn.Module:
    """On a CPU, puts PackedLinears in the place of the model's Linears: good for inference only.
    A tied head is then stored a second time. Weights that are not float32 stay as they are."""
    if torch.backends.mkldnn.is_available() and model.wte.weight.device.type == "cpu":
        _replace(model, PackedLinear)
    return model


def quantize(model: nn.Module) -> nn.Module:
    """Puts Int8Linears in the place of the model's Linears; embeddings, norms and an LSTM's
    recurrence stay as they are. UserError where the model is not on a CPU."""
    if model.wte.weight.device.type != "cpu":
        raise UserError(f"quantize='int8' is for a CPU, not {model.wte.weight.device}")
    _replace(model, Int8Linear)
    return model


def _replace(model: nn.Module, cls: type[nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.weight.dtype == torch.float32:
                setattr(module, name, cls(child))
