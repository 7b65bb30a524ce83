"""One token a row through the GPT: what model.py computes, in fewer and larger operations.

On a CPU the step of a small model is bound by the number of operations, that of a larger one by
reading its weights. So blocks are flattened here, queries and keys are normed and rotated together,
and pack() stores matrices in oneDNN's layout, which is read up to three times as fast as by torch's
own matmul of few rows.
"""

import copy
import functools
import math
import sys
import warnings
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from miniglm import compiling
from model import GPT, MLP, Attention, Block, KVCache, RMSNorm, SwiGLU


class PackedLinear(nn.Module):
    """A Linear whose float32 weight is in oneDNN's layout for matmuls of few rows."""

    ROWS = 16  # the layout is made for; good for one row and for hundreds

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, self.ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A Linear whose weight is stored in 8 bits, with a scale a row. Its input is quantized on the
    fly by the range of the whole batch, so a row's result depends slightly on the other rows."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.data
        scales = weight.abs().amax(dim=1).clamp_min(1e-12).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            # a later torch drops such tensors; the pinned one has no other fast way
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.weight = torch.ops.quantized.linear_prepack(rounded, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # 7 bits of the input: processors without VNNI add pairs of products in 16 bits
        return torch.ops.quantized.linear_dynamic(x, self.weight, True)


class FusedLinear(nn.Module):
    """A Linear of one row as an elementwise product and a sum: torch.compile fuses these with what
    is around them, and then reads weights faster than separate matmuls do."""

    def __init__(self, linear: nn.Linear | PackedLinear):
        super().__init__()
        weight = linear.weight.detach()
        self.weight, self.bias = weight.to_dense() if weight.is_mkldnn else weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (self.weight * x).sum(dim=-1).unsqueeze(0)
        return y if self.bias is None else y + self.bias


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

    static: each step computes all rows and the full length of the cache, so that CUDA records one
    graph and replays it. The first `eager` steps run uncompiled; compiling costs about as much as
    some thousands of them. one_row: attention in operations that fuse, for a single row on a CPU;
    run_one_row: its compiled code, if it is there.
    """

    def __init__(self, model: GPT, static: bool = False, eager: int = 0, one_row: bool = False):
        c = self.config = model.config
        self.wte, self.norm = model.wte.weight, flat_norm(model.norm)
        self.layers = [Layer(block) for block in model.blocks]
        self.static, self.eager, self.run = static, eager, self._run
        self.model, self.one_row, self.run_one_row = model, one_row, None
        if static and self.wte.device.type == "cuda":
            self.run = recorded(self._run)
        self.wpe = model.wpe.weight if c.position == "learned" else None
        if c.position == "rope":
            half = c.head_dim // 2
            swap = torch.arange(c.head_dim, device=self.wte.device).roll(half)
            # a rotation is x cos + x[swap] sin, its sign in the table; the norm weights of queries
            # and keys are folded into both factors
            sin = torch.cat([-model.sin[:, :half], model.sin[:, half:]], dim=-1)
            self.cos, self.sin, self.swap = model.cos[:, None], sin[:, None], swap
            weights = [qk_weights(block.attn) for block in model.blocks]
            self.qk = torch.stack(weights).to(self.wte.dtype)[:, None]  # (n_layer, 1, heads, D)
            self.qk_swapped = self.qk[..., swap]

    def __call__(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        lengths, B = cache.lengths, len(idx)
        if max(lengths) >= self.config.block_size:
            raise ValueError(f"{max(lengths) + 1} tokens exceed {self.config.block_size=}")
        if self.static:
            # layers apart: a graph that writes into a part of a tensor would copy the whole
            k, v = cache.all_k.unbind(), cache.all_v.unbind()
            for part in (*k, *v):  # they must not move
                torch._dynamo.mark_static_address(part)
            unused = len(k[0]) - B  # rows
            at = torch.tensor([*lengths, *[0] * unused], device=idx.device)
            run, self.eager = self._run if self.eager else self.run, max(0, self.eager - 1)
            x = run(F.pad(idx, (0, unused)), at, k, v)[:B]
        elif self.run_one_row and B == 1:
            x = self.run_one_row(idx, torch.tensor(lengths), cache.k, cache.v)
        else:
            same = min(lengths) == max(lengths)
            at = lengths[0] if same else torch.tensor(lengths, device=idx.device)
            x = self.run(idx, at, cache.k, cache.v, max(lengths) + 1)
        cache.lengths = [length + 1 for length in lengths]
        return x

    def _run(self, idx, at, k, v, end=None):
        """at: the position of each row's id, (B,), or an int if all agree; k, v: the cache's, of as
        many rows, or those of its layers; end: positions that are attended to, None is all that
        there is room for."""
        c, B = self.config, len(idx)
        x = F.embedding(idx, self.wte)
        if isinstance(k, torch.Tensor):
            end = end or k.shape[3]
            seen_k, seen_v = k.narrow(3, 0, end).unbind(), v.narrow(3, 0, end).unbind()
        else:
            end, seen_k, seen_v = k[0].shape[2], k, v
        rows, mask, new = None, None, []
        if isinstance(at, torch.Tensor):
            rows = torch.arange(B, device=idx.device)
            seen = torch.lt if self.one_row else torch.le
            mask = seen(torch.arange(end, device=idx.device), at[:, None, None, None])
        else:
            new_k, new_v = k.narrow(3, at, 1).unbind(), v.narrow(3, at, 1).unbind()
        if self.wpe is not None:
            x = x + self.wpe[at]
            rotations = [None] * c.n_layer
        else:
            # factors of each layer, (1 or B, heads, head_dim)
            cos, sin = self.qk * self.cos[at], self.qk_swapped * self.sin[at]
            rotations = list(zip(cos, sin, strict=True))
        for i, layer in enumerate(self.layers):
            qkv = layer.c_attn(layer.norm_1(x)).view(B, -1, c.head_dim)
            qk, values = qkv.split([c.n_head + c.n_kv_head, c.n_kv_head], dim=1)
            if layer.qk_norm:
                qk = layer.qk_norm(qk)
            if rotations[i]:
                cos, sin = rotations[i]
                qk = torch.addcmul(qk * cos, qk.index_select(-1, self.swap), sin)
            q, keys = qk.split([c.n_head, c.n_kv_head], dim=1)
            if self.one_row:
                y = attend_one_row(q, keys, values, seen_k[i], seen_v[i], mask)
                new.append((keys, values))
            elif rows is None:
                new_k[i].copy_(keys.unsqueeze(2))
                new_v[i].copy_(values.unsqueeze(2))
            else:
                k[i][rows, :, at], v[i][rows, :, at] = keys, values
            if not self.one_row:
                # the queries that share a key's head as positions of one: any kernel takes that
                q = q.view(B, c.n_kv_head, -1, c.head_dim)
                y = F.scaled_dot_product_attention(q, seen_k[i], seen_v[i], attn_mask=mask)
            x = x + layer.c_proj(y.reshape(B, -1))
            x = x + layer.mlp(layer.norm_2(x))
        if self.one_row:  # at the end: the compiler would copy a cache that is read again
            keys, values = map(torch.cat, zip(*new, strict=True))
            k[:, rows, :, at], v[:, rows, :, at] = keys[None], values[None]
        return self.norm(x)


def recorded(run: Callable) -> Callable:
    """Compiled, as one CUDA graph: never dynamic code, as a second model would get, since that
    cannot be recorded."""
    backend = functools.partial(compiling.backend, patches={"triton.cudagraphs": True})
    return torch.compile(run, backend=backend, fullgraph=True, dynamic=False)


class Layer:
    """The parts of a block, ready to call."""

    def __init__(self, block: Block):
        c, attn = block.config, block.attn
        self.norm_1, self.norm_2 = flat_norm(block.norm_1), flat_norm(block.norm_2)
        self.c_attn, self.c_proj = attn.c_attn.forward, attn.c_proj.forward
        self.mlp, self.qk_norm = flat_mlp(block.mlp), None
        if c.qk_norm:  # rotary positions carry the weights
            weight = None if c.position == "rope" else qk_weights(attn)
            self.qk_norm = FlatRMSNorm(c.head_dim, c.norm_eps, weight)


def attend_one_row(q, keys, values, seen_k, seen_v, mask):
    """Attention in operations that fuse: q (1, n_head, D); keys and values, (1, n_kv_head, D), of
    the newest position, which the cache, (1, n_kv_head, T, D), does not hold yet."""
    G, D = keys.shape[1], q.shape[2]
    q, keys = q.view(G, -1, 1, D) * D**-0.5, keys.view(G, 1, 1, D)
    old = (q * seen_k.squeeze(0)[:, None]).sum(dim=-1)  # (n_kv_head, n_head / n_kv_head, T)
    old = old.masked_fill(~mask.view(-1), -torch.inf)
    own = (q * keys).sum(dim=-1)
    most = torch.maximum(old.amax(dim=-1, keepdim=True), own)
    old, own = (old - most).exp(), (own - most).exp()
    y = (old[..., None] * seen_v.squeeze(0)[:, None]).sum(dim=-2) + own * values.view(G, 1, D)
    return y / (old.sum(dim=-1, keepdim=True) + own)


def qk_weights(attn: Attention) -> torch.Tensor:
    """The factors of queries and keys after their norm, (heads, head_dim). With rotary positions
    they include the root of head_dim, which FlatRMSNorm leaves out without a weight."""
    c = attn.config
    if not c.qk_norm:
        return torch.ones(c.n_head + c.n_kv_head, c.head_dim, device=attn.c_attn.weight.device)
    q, k = attn.q_norm.weight.expand(c.n_head, -1), attn.k_norm.weight.expand(c.n_kv_head, -1)
    scale = c.head_dim**0.5 if c.position == "rope" else 1.0
    return torch.cat([q, k]).detach() * scale


# --- exactly these classes are laid out, since a subclass may compute something else ------------


def decoder(model: nn.Module, static: bool = False, eager: int = 0) -> Callable:
    """The Decoder of a GPT. A model whose blocks or attention are other classes decodes by its own
    forward pass."""
    c = model.config
    is_known = type(model) is GPT and all(
        type(block) is Block
        and type(block.attn) is Attention
        and (not c.qk_norm or type(block.attn.q_norm) is type(block.attn.k_norm) is RMSNorm)
        for block in model.blocks
    )
    return Decoder(model, static, eager) if is_known else model.decode


@functools.cache  # says it once
def may_compile(device: str, soon: bool = True) -> bool:
    """Whether a step that is worth any compiling can be compiled; soon: what is missing is said."""
    wanted, why = compiling.decide(None, device, math.inf)
    if soon and not wanted:
        print(f"note: {why}", file=sys.stderr, flush=True)
    return wanted


@torch.inference_mode()
def compile_one_row(decode: Callable, size: int) -> None:
    """On a CPU: a Decoder's steps of a single row are compiled code from then on, half a minute
    later. Meanwhile it may be in use in another thread, with a cache of `size` rows. Weights are
    stored a second time."""
    if type(decode) is not Decoder or decode.wte.device.type != "cpu":
        return
    is_int8 = any(isinstance(module, Int8Linear) for module in decode.model.modules())
    if is_int8 or not may_compile("cpu"):
        return
    run = Decoder(fused(decode.model), one_row=True)._run
    cache, idx = decode.model.new_cache(size, 64), torch.zeros(1, dtype=torch.int64)
    cache.keep_rows(1)
    try:
        run = torch.compile(run, fullgraph=True, backend=compiling.backend)
        for part in (cache.k, cache.v):  # one graph for all lengths
            torch._dynamo.mark_dynamic(part, 3)
        run(idx, idx.clone(), cache.k, cache.v)
    except Exception as error:  # an OSError if the compiler's cache cannot be made
        compiling.say_failure(error)
    else:
        decode.run_one_row = run


def fused(model: GPT) -> GPT:
    """A copy whose blocks have FusedLinears; all else is shared."""
    tensors = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    tensors += [*model.parameters(), *model.buffers()]
    clone = copy.deepcopy(model, {id(t): t for t in tensors})
    _replace(clone.blocks, FusedLinear, (nn.Linear, PackedLinear))
    return clone


def flat_norm(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    if type(norm) is RMSNorm:
        return FlatRMSNorm(norm.weight.shape[0], norm.eps, norm.weight)
    return norm if type(norm) is nn.LayerNorm else as_in_training(norm)


def flat_mlp(mlp: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    if type(mlp) is not SwiGLU:
        return mlp if type(mlp) is MLP else as_in_training(mlp)
    c_fc, c_proj = mlp.c_fc.forward, mlp.c_proj.forward

    def swiglu(x: torch.Tensor) -> torch.Tensor:
        gate, up = c_fc(x).chunk(2, dim=-1)
        return c_proj(F.silu(gate).mul_(up))

    return swiglu


def as_in_training(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The module, given (B, 1, C) as the model does."""
    return lambda x: module(x.unsqueeze(1)).squeeze(1)


def pack(model: nn.Module) -> nn.Module:
    """On a CPU, replaces the model's Linears by PackedLinears: for inference only. A tied head is
    then stored a second time. Weights that are not float32 stay as they are."""
    if torch.backends.mkldnn.is_available() and model.wte.weight.device.type == "cpu":
        _replace(model, PackedLinear)
    return model


def quantize(model: nn.Module) -> nn.Module:
    """Replaces the model's Linears by Int8Linears; embeddings, norms and an LSTM's recurrence stay
    as they are. Raises UserError if the model is not on a CPU."""
    if model.wte.weight.device.type != "cpu":
        raise UserError(f"quantize='int8' is for a CPU, not {model.wte.weight.device}")
    _replace(model, Int8Linear)
    return model


def _replace(model: nn.Module, cls: type[nn.Module], kinds: tuple = (nn.Linear,)) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in kinds and child.weight.dtype == torch.float32:
                setattr(module, name, cls(child))
