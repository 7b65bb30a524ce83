"""The GPT: ids -> hidden states -> logits, its options, and its key-value cache.

    hidden = model(idx)              (B, T) -> (B, T, n_embd)
    logits = model.head(hidden)      (..., n_embd) -> (..., n_vocab)

Losses are in miniglm/losses.py, sampling in miniglm/generation.py. ModelConfig spans GPT-2
(learned positions, LayerNorm, GELU, tied head) and Qwen3 (rotary positions, RMSNorm, SwiGLU,
grouped-query attention, norm of queries and keys), with Qwen2 and Llama 3 between them, each option
on its own. A new norm, activation or MLP is an entry of NORMS, ACTIVATIONS or MLPS: settings,
training and decoding follow.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configurator import UserError, above, at_least, below, check_bounds
from miniglm.attention import attend


class RMSNorm(nn.RMSNorm):
    """torch's, which under autocast wants its weight in the input's type."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


NORMS = {  # before attention, MLP and head: a module of a config
    "rmsnorm": lambda c: RMSNorm(c.n_embd, c.norm_eps),
    "layernorm": lambda c: nn.LayerNorm(c.n_embd, c.norm_eps, bias=c.bias),
}
ACTIVATIONS = {  # between the two Linears of an MLP
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "gelu_erf": F.gelu,  # the exact one, which nanoGPT has
    "relu2": lambda x: F.relu(x).square(),  # arXiv 2109.08668
}


class MLP(nn.Module):
    """Two Linears around one of ACTIVATIONS."""

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        self.activation = config.mlp
        self.c_fc = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.drop(self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x))))


class SwiGLU(nn.Module):
    """silu(gate) * up (arXiv 2002.05202)."""

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=config.bias)  # gate, up
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        return self.drop(self.c_proj(F.silu(gate) * up))


MLPS = {"swiglu": SwiGLU} | dict.fromkeys(ACTIVATIONS, MLP)


@dataclass
class Architecture:
    """The part of a model that a user chooses. The defaults are Qwen3's, at a small size."""

    model: Literal["gpt", "lstm"] = "gpt"  # the GPT below, or the baseline of lstm_model.py
    block_size: Annotated[int, at_least(2)] = 256  # longest context, tokens
    n_layer: Annotated[int, at_least(1)] = 6  # blocks
    n_head: Annotated[int, at_least(1)] = 8  # query heads
    n_kv_head: Annotated[int | None, at_least(1)] = None  # key and value heads; None is n_head
    n_embd: Annotated[int, at_least(1)] = 512  # width
    n_hidden: Annotated[int | None, at_least(1)] = None  # MLP width; None: 4 (swiglu 8/3) n_embd
    position: Literal["rope", "learned"] = "rope"  # rotary, or an embedding of positions
    rope_theta: Annotated[float, above(0)] = 10000.0  # base of the rotary wavelengths
    norm: Literal[tuple(NORMS)] = "rmsnorm"  # before attention, MLP and head
    norm_eps: Annotated[float, above(0)] = 1e-6  # added to the variance
    mlp: Literal[tuple(MLPS)] = "swiglu"  # gelu is GPT-2's tanh form
    qk_norm: bool = True  # RMSNorm of each head's queries and keys, as in Qwen3
    tie_weights: bool = True  # the head is the embedding
    init: Literal["fan_in", "gpt2"] = "fan_in"  # std 1 / sqrt(inputs), outputs 0; gpt2: std 0.02
    dropout: Annotated[float, at_least(0), below(1)] = 0.0  # of embeddings, block outputs, adapters

    head_dim = None  # no setting: n_embd / n_head, unless a model of others has its own

    def __post_init__(self):
        check_bounds(type(self), vars(self))  # built from a checkpoint's run.json, too
        if self.model != "gpt":
            return
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_hidden is None:  # SwiGLU has three matrices: 2/3 as wide, in steps of 64
            swiglu = max(64, round(8 / 3 * self.n_embd / 64) * 64)
            self.n_hidden = swiglu if self.mlp == "swiglu" else 4 * self.n_embd
        shared = [("n_head", "n_kv_head")]
        if self.head_dim is None:
            shared, self.head_dim = [("n_embd", "n_head"), *shared], self.n_embd // self.n_head
        for name, part in shared:
            value, divisor = getattr(self, name), getattr(self, part)
            if value % divisor:
                raise UserError(f"{name}={value} must be a multiple of {part}={divisor}")
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(
                f"head_dim={self.head_dim} must be even for position='rope'; unless a model names "
                "its own it is n_embd / n_head"
            )


@dataclass
class ModelConfig(Architecture):
    """An architecture with its vocabulary, and what only models of other projects have."""

    n_vocab: int = 0  # ids that exist
    vocab_size: int | None = None  # rows of the embedding; None is n_vocab, up to a multiple of 64.
    # The rows beyond n_vocab make round matrices; they are never sampled and never scored.
    head_dim: Annotated[int | None, at_least(1)] = None  # of queries, keys, values
    qkv_bias: bool | None = None  # biases of queries, keys, values; None is bias
    bias: bool = False  # biases in Linear and LayerNorm
    rope_scaling: list | None = None  # Llama 3's, see rotary_frequencies

    def __post_init__(self):
        super().__post_init__()
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        if self.vocab_size is None:
            self.vocab_size = math.ceil(self.n_vocab / 64) * 64


class KVCache:
    """Keys and values of B rows, and how many tokens each row holds. A token's slot is its
    position, so rows may differ in length: slots beyond `lengths` are not seen, and overwritten by
    the next tokens. Rows come and go, up to the initial batch size.

    k, v: (n_layer, B, n_kv_head, length, head_dim), the first B rows of all_k, all_v;
    lengths: list of B ints.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor):
        """shape: that of all_k; like: a tensor of the wanted dtype and device."""
        # zeros, since positions that a row does not see get weight 0, and 0 x NaN is NaN
        self.all_k, self.all_v = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = []
        self.keep_rows(shape[1])

    def keep_rows(self, count: int) -> None:
        """Keeps the first `count` rows; rows beyond those held so far are empty."""
        self.k, self.v = self.all_k[:, :count], self.all_v[:, :count]
        self.lengths = [*self.lengths[:count], *[0] * (count - len(self.lengths))]

    def reserve(self, length: int) -> None:
        """Makes room for rows of `length` tokens, in powers of two: short rows close together in
        memory are read faster."""
        room = self.all_k.shape[3]
        if length > room:
            more = (1 << (length - 1).bit_length()) - room
            self.all_k, self.all_v = (F.pad(x, (0, 0, 0, more)) for x in (self.all_k, self.all_v))
            self.keep_rows(len(self.lengths))

    def append(self, source: "KVCache", rows: list[int]) -> None:
        """Adds rows of another cache."""
        first = len(self.lengths)
        self.reserve(max(source.lengths))
        self.keep_rows(first + len(rows))
        self.copy_rows(source, rows, list(range(first, len(self.lengths))))

    def copy_rows(self, source: "KVCache", rows: list[int], to: list[int]) -> None:
        """Row rows[i] of source becomes row to[i] of this cache."""
        end = max(source.lengths[row] for row in rows)
        for mine, theirs in ((self.k, source.k), (self.v, source.v)):
            mine[:, to, :, :end] = theirs[:, rows, :, :end]
        for row, target in zip(rows, to, strict=True):
            self.lengths[target] = source.lengths[row]

    def drop_row(self, row: int) -> None:
        """Removes a row: the last one takes its place, so only one row is moved."""
        last = len(self.lengths) - 1
        if row != last:
            self.copy_rows(self, [last], [row])
        self.keep_rows(last)


class Span:
    """The positions of the T new tokens of each row, shared by all layers of one forward pass.

    start: the first position where all rows agree, else None; positions: (B, T) or (T,);
    end: the longest context after this pass; mask: (B, 1, T, end) or None, True where seen.
    """

    def __init__(self, cache: KVCache | None, B: int, T: int, device):
        lengths = cache.lengths if cache else [0]
        self.end = max(lengths) + T
        self.start = lengths[0] if min(lengths) == max(lengths) else None
        steps = torch.arange(T, device=device)
        if self.start is not None:
            self.positions = steps + self.start
        else:
            self.positions = torch.tensor(lengths, device=device)[:, None] + steps
        # sdpa's is_causal aligns top-left, so it is right only where nothing was before
        # by a branch, since T > 1 is no bool while a compiler takes T for a symbol
        self.is_causal = True if self.start == 0 and T > 1 else False  # noqa: SIM210
        self.mask = None
        if not self.is_causal and not (self.start is not None and T == 1):
            seen = torch.arange(self.end, device=device) <= self.positions[..., None]
            self.mask = seen.view(-1, 1, T, self.end)
        self.rows = torch.arange(B, device=device)[:, None]

    def store(self, cached: Tensor, new: Tensor) -> Tensor:
        """Writes new (B, n_kv_head, T, head_dim) into a layer's cache; returns all up to `end`."""
        if self.start is not None:
            cached[:, :, self.start : self.end] = new
        else:
            cached[self.rows, :, self.positions] = new.transpose(1, 2)
        return cached[:, :, : self.end]


class LanguageModel(nn.Module):
    """The part that the GPT and its baseline share: `config`, `wte` and `lm_head` are theirs."""

    def head(self, hidden: Tensor) -> Tensor:
        """(..., n_embd) -> logits (..., n_vocab); the padding of the vocabulary has none."""
        return self.lm_head(hidden)[..., : self.config.n_vocab]

    def decode(self, idx: Tensor, cache: "KVCache") -> Tensor:
        """One id a row (B,), added to the cache -> hidden states (B, n_embd)."""
        return self(idx[:, None], cache)[:, -1]

    def n_params(self) -> int:
        """Parameters, a tied weight once."""
        return sum(p.numel() for p in self.parameters())


class GPT(LanguageModel):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            cos, sin = rotary_table(config)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = NORMS[config.norm](config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.checkpoint_activations = False  # keep a block's input only, and recompute the block
        self.init_weights()

    def forward(
        self, idx: Tensor, cache: KVCache | None = None, new_tokens: list[int] | None = None
    ) -> Tensor:
        """(B, T) ids -> (B, T, n_embd) hidden states after the last norm.

        With a cache the ids continue its rows and are added to it: the first new_tokens[row] ids of
        each row (None: all T), the others are padding.
        """
        B, T = idx.shape
        span = Span(cache, B, T, idx.device)
        if span.end > self.config.block_size:
            raise ValueError(f"{span.end} tokens exceed block_size={self.config.block_size}")
        x = self.wte(idx)
        rotation = None
        if self.config.position == "learned":
            x = x + self.wpe(span.positions)
        else:
            # (T, head_dim) or (B, 1, T, head_dim)
            rotation = self.cos[span.positions], self.sin[span.positions]
            if span.start is None:
                rotation = rotation[0].unsqueeze(1), rotation[1].unsqueeze(1)
        x = self.drop(x)
        for layer, block in enumerate(self.blocks):
            kv = (cache.k[layer], cache.v[layer]) if cache else None
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, span, kv, use_reentrant=False)
            else:
                x = block(x, rotation, span, kv)
        if cache:
            added = new_tokens or [T] * B
            cache.lengths = [old + new for old, new in zip(cache.lengths, added, strict=True)]
        return self.norm(x)

    def new_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        """batch_size empty rows, for texts of `length` tokens; None is block_size."""
        c = self.config
        shape = c.n_layer, batch_size, c.n_kv_head, length or c.block_size, c.head_dim
        return KVCache(shape, self.wte.weight)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embeddings have std 0.02. fan_in: matrices preserve the scale of their input, and the
        outputs of a block start at zero. gpt2: std 0.02 everywhere, less for residual outputs."""
        config = self.config
        for name, parameter in self.named_parameters():
            is_output = name.endswith("c_proj.weight")
            if parameter.dim() < 2:  # norms keep their 1, biases are 0
                if name.endswith("bias"):
                    parameter.zero_()
            elif config.init == "gpt2" and is_output:
                parameter.normal_(std=0.02 / math.sqrt(2 * config.n_layer))
            elif config.init == "gpt2" or name.startswith(("wte", "wpe", "lm_head")):
                parameter.normal_(std=0.02)
            elif is_output:
                parameter.zero_()
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)

    def flops_per_token(self, T: float) -> float:
        """Floating-point operations of training on one token in a row of T: 6 for each parameter of
        a matmul (the head's, not the embedding's lookup), 4 if it is frozen, and causal
        attention's."""
        c = self.config
        matrices = [p for p in self.blocks.parameters() if p.dim() >= 2]
        attention = 6 * c.n_layer * c.n_head * c.head_dim * T
        return matrix_flops([*matrices, *self.lm_head.parameters()]) + attention


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.norm_1 = NORMS[config.norm](config)
        self.attn = Attention(config)
        self.norm_2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)

    def forward(self, x, rotation, span, kv):
        x = x + self.attn(self.norm_1(x), rotation, span, kv)
        return x + self.mlp(self.norm_2(x))


class Attention(nn.Module):
    """Causal self-attention; n_kv_head < n_head is grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        heads = config.n_head + 2 * config.n_kv_head  # of queries, keys, values
        self.c_attn = nn.Linear(config.n_embd, heads * config.head_dim, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, rotation, span, kv):
        c = self.config
        B, T, _ = x.shape
        # (B, T, heads, head_dim): the queries' heads, then the keys', then the values'
        qkv = self.c_attn(x).view(B, T, c.n_head + 2 * c.n_kv_head, c.head_dim)
        q, k, v = qkv.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads, T, head_dim)
        if rotation:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if kv:
            k, v = span.store(kv[0], k), span.store(kv[1], v)
        y = attend(q, k, v, span.mask, span.is_causal)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, heads, T, head_dim) -> (B, T, all)
        return self.drop(self.c_proj(y))


def matrix_flops(matrices: list[nn.Parameter]) -> int:
    """Floating-point operations a token: the forward matmul, the gradient of its input, and that of
    the weight if it is trained."""
    return sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices)


def rotary_table(c: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, (block_size, head_dim) each; real ones, also where a
    model is built without its weights."""
    device = torch.get_default_device()
    with torch.device("cpu" if device.type == "meta" else device):
        positions = torch.arange(c.block_size, dtype=torch.float64)
        angles = positions[:, None] * rotary_frequencies(c)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def rotary_frequencies(c: ModelConfig) -> Tensor:
    """Radians a position of each pair, (head_dim / 2,), float64 (arXiv 2104.09864). rope_scaling:
    factor, low, high and length of Llama 3.1, where `length` is that of its first training. Waves
    that fit into it less than `low` times become `factor` times longer, those that fit more than
    `high` times stay, and between them it is a mean of both."""
    pairs = torch.arange(0, c.head_dim, 2, dtype=torch.float64)
    frequencies = c.rope_theta ** (-pairs / c.head_dim)
    if c.rope_scaling is None:
        return frequencies
    factor, low, high, length = c.rope_scaling
    kept = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + head_dim / 2) of x (B, heads, T, head_dim) by their angles."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin
