"""One token a row through the GPT: what model.py computes, in fewer and larger operations.

On a CPU a small model's step is bound by the number of operations, a larger one's by the weights
that are read. So a layer's pieces are laid out flat here, queries and keys are normed and turned
together, and pack() stores matrices as oneDNN wants them, which reads them up to three times as
fast as torch's own product of few rows.
"""

import warnings

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
    as it comes, by the largest and smallest number of the whole input."""

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


class RMSNormOf:
    """x (..., C) -> x / rms(x) * weight, whose last dimension is C."""

    def __init__(self, weight: torch.Tensor, eps: float):
        self.C, self.weight, self.eps = weight.shape[-1], weight * weight.shape[-1] ** 0.5, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return x * squares.add_(self.C * self.eps).rsqrt_() * self.weight


class Decoder:
    """model(idx[:, None], cache)[:, -1] for one id a row: (B,) -> (B, n_embd).

    static: a step always has all rows and the whole length of the cache, so that on CUDA one
    graph is recorded and played again; compiling it takes a while.
    """

    def __init__(self, model: GPT, static: bool = False):
        self.config, self.wte, self.norm = model.config, model.wte.weight, flat_norm(model.norm)
        self.layers = [Layer(block) for block in model.blocks]
        self.static, self.run = static, self._run
        if static and self.wte.device.type == "cuda":
            self.run = torch.compile(self._run, mode="reduce-overhead", fullgraph=True)
        if model.config.position == "learned":
            self.wpe = model.wpe.weight
        else:
            # the turn's sign stands in the table: x cos + (second half, first half) signed sin
            half = model.config.head_dim // 2
            self.cos = model.cos
            self.sin = torch.cat([-model.sin[:, :half], model.sin[:, half:]], dim=-1)

    @torch.inference_mode()
    def __call__(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        lengths, B = cache.lengths, len(idx)
        if max(lengths) >= self.config.block_size:
            raise ValueError(f"{max(lengths) + 1} tokens exceed {self.config.block_size=}")
        if self.static:
            k, v = cache.all_k, cache.all_v
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
        x = F.embedding(idx, self.wte)
        rows = mask = cos = sin = None
        if isinstance(at, torch.Tensor):
            rows = torch.arange(len(idx), device=idx.device)
            mask = torch.arange(end, device=idx.device) <= at[:, None, None, None]
        if self.config.position == "learned":
            x = x + self.wpe[at]
        else:
            cos, sin = self.cos[at], self.sin[at]
            if rows is not None:
                cos, sin = cos[:, None], sin[:, None]  # the same for all heads
        embedding, first_values = x, None
        for layer, layer_k, layer_v in zip(self.layers, k, v, strict=True):
            x, values = layer(
                x, embedding, first_values, cos, sin, layer_k, layer_v, rows, at, end, mask
            )
            first_values = values if first_values is None else first_values
        return self.norm(x)


class Layer:
    """A block of the GPT, its weights at hand."""

    def __init__(self, block: nn.Module):
        c = block.config
        self.config = c
        self.norm_1, self.norm_2 = flat_norm(block.norm_1), flat_norm(block.norm_2)
        self.c_attn, self.c_proj = block.attn.c_attn, block.attn.c_proj
        self.mlp = block.mlp
        self.skip = block.skip.tolist() if c.embedding_skip else None
        self.mix = block.attn.mix.tolist() if block.attn.mixes else None
        self.qk_norm = None
        if c.qk_norm:
            q, k = block.attn.q_norm.weight, block.attn.k_norm.weight
            heads = [q.expand(c.n_head, -1), k.expand(c.n_kv_head, -1)]
            self.qk_norm = RMSNormOf(torch.cat(heads).detach(), c.norm_eps)

    def __call__(self, x, embedding, first_values, cos, sin, k, v, rows, at, end, mask):
        c = self.config
        if self.skip:
            x = self.skip[0] * x + self.skip[1] * embedding
        B, H, KV, half = len(x), c.n_head, c.n_kv_head, c.head_dim // 2
        qkv = self.c_attn(self.norm_1(x)).view(B, H + 2 * KV, c.head_dim)
        qk, new_v = qkv[:, : H + KV], qkv[:, H + KV :]
        if self.qk_norm:
            qk = self.qk_norm(qk)
        if self.mix:
            new_v = self.mix[0] * new_v + self.mix[1] * first_values
        if cos is not None:
            swapped = torch.cat([qk[..., half:], qk[..., :half]], dim=-1)
            qk = torch.addcmul(qk * cos, swapped, sin)
        if rows is None:
            k[:, :, at], v[:, :, at] = qk[:, H:], new_v
        else:
            k[rows, :, at], v[rows, :, at] = qk[:, H:], new_v
        y = F.scaled_dot_product_attention(
            qk[:, :H, None], k[:, :, :end], v[:, :, :end], attn_mask=mask, enable_gqa=H != KV
        )
        x = x + self.c_proj(y.view(B, -1))
        return x + self.mlp(self.norm_2(x)), new_v


def flat_norm(norm: nn.Module):
    """A norm of the model, RMSNorm in fewer operations."""
    return RMSNormOf(norm.weight.detach(), norm.eps) if isinstance(norm, nn.RMSNorm) else norm


def pack(model: nn.Module) -> nn.Module:
    """On a CPU, puts PackedLinears in the place of the model's Linears: good for inference only.
    A tied head is then stored a second time. Weights that are not float32 stay as they are."""
    if torch.backends.mkldnn.is_available() and model.wte.weight.device.type == "cpu":
        _replace(model, PackedLinear)
    return model


def quantize(model: nn.Module) -> nn.Module:
    """Puts Int8Linears in the place of the model's Linears; embeddings and norms stay as they
    are. UserError where the model is not on a CPU."""
    if model.wte.weight.device.type != "cpu":
        raise UserError(f"quantize='int8' is for a CPU, not {model.wte.weight.device}")
    _replace(model, Int8Linear)
    return model


def _replace(model: nn.Module, cls: type[nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.weight.dtype == torch.float32:
                setattr(module, name, cls(child))
