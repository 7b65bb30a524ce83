"""Attention of queries to keys and values: torch's own, and a faster form for training on a CPU.

torch's scaled_dot_product_attention never stores the (T, T) weights, which pays off if memory is
slow or T is long. On a CPU in bfloat16 its backward pass dominates; plain matmuls that keep the
weights took half the time at T = 256, a quarter at 128.
"""

import math

import torch
import torch.nn.functional as F

from miniglm.devices import capability

LONGEST = 512  # tokens; beyond, the weights of a batch no longer stay in a CPU's cache


def attend(q, k, v, mask=None, is_causal: bool = False) -> torch.Tensor:
    """q (B, n_head, T, D), k and v (B, n_kv_head, S, D) -> (B, n_head, T, D)."""
    kind, dtype, T = q.device.type, q.dtype, q.shape[2]
    autocasts = torch.is_autocast_enabled(kind)
    if autocasts:
        dtype = torch.get_autocast_dtype(kind)
    trains_in_bfloat16 = autocasts and dtype == torch.bfloat16 and torch.is_grad_enabled()
    if kind == "cpu" and trains_in_bfloat16 and is_causal and T <= LONGEST:
        return attend_keeping_weights(q, k, v)
    if kind == "mps" and is_causal and dtype != torch.float32:
        # torch's own causal mask lets some positions see later ones there (pytorch issue 195910)
        mask, is_causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril(), False
    # a bool, also while a compiler takes heads for symbols, as it does in a sharded model
    shares = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
    if shares and kind == "cuda":
        shares = takes_shared_heads(flash_capability(q.device.index), dtype, mask is not None)
        if not shares:
            groups = q.shape[1] // k.shape[1]
            k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=shares
    )


def flash_capability(index: int | None) -> tuple[int, int]:
    """The compute capability of a GPU; (0, 0) where torch is built without flash attention."""
    return capability(index) if torch.backends.cuda.is_flash_attention_available() else (0, 0)


# torch.compiler.assume_constant_result, which imports the whole compiler to set this
flash_capability._dynamo_marked_constant = True


def takes_shared_heads(capability: tuple[int, int], dtype: torch.dtype, masked: bool) -> bool:
    """Whether a GPU's attention takes keys and values of fewer heads than the queries': only flash
    attention does, and torch takes plain products in its place without a word."""
    return capability >= (8, 0) and dtype in (torch.float16, torch.bfloat16) and not masked


def attend_keeping_weights(q, k, v) -> torch.Tensor:
    """softmax(q k' / sqrt(D), causal) v, its weights kept for the backward pass; autocast takes all
    to bfloat16. The queries of all heads that share a key's head are rows of one matrix."""
    T, D = q.shape[2:]
    groups = q.shape[1] // k.shape[1]
    rows = q.reshape(-1, groups * T, D)
    k, v = (x.reshape(-1, T, D) for x in (k, v))
    future = rows.new_full((T, T), -math.inf).triu(1).repeat(groups, 1)
    weights = torch.baddbmm(future, rows, k.mT, alpha=D**-0.5).softmax(dim=-1)
    return (weights @ v).view(q.shape)
