"""Attention of queries to keys and values: torch's own, and a faster form for training on a CPU.

torch's scaled_dot_product_attention never stores the (T, T) weights, which pays off if memory is
slow or T is long. On a CPU in bfloat16 its backward pass dominates; plain matmuls that keep the
weights took half the time at T = 256, a quarter at 128.
"""

import math

import torch
import torch.nn.functional as F

LONGEST = 512  # tokens; beyond, the weights of a batch no longer stay in a CPU's cache


def attend(q, k, v, mask=None, is_causal: bool = False) -> torch.Tensor:
    """q (B, n_head, T, D), k and v (B, n_kv_head, S, D) -> (B, n_head, T, D)."""
    trains_in_bfloat16 = (
        q.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    if trains_in_bfloat16 and is_causal and q.shape[2] <= LONGEST:
        return attend_keeping_weights(q, k, v)
    # a bool, also while a compiler takes heads for symbols, as it does in a sharded model
    shares = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=shares
    )


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
