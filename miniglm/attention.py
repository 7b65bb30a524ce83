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
    groups = q.shape[1] // k.shape[1]
    trains_in_bfloat16 = (
        q.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    if trains_in_bfloat16 and is_causal and q.shape[2] <= LONGEST:
        return CausalAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=groups > 1
    )


class CausalAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(D), causal) v with its weights kept; q: (B, n_head, T, D), k and v:
    (B, n_kv_head, T, D). The queries of all heads that share a key's head are rows of one matrix.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, q, k, v):
        T, D = q.shape[2:]
        ctx.shape, groups = q.shape, q.shape[1] // k.shape[1]
        q = q.reshape(-1, groups * T, D)
        k, v = (x.reshape(-1, T, D) for x in (k, v))
        future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1).repeat(groups, 1)
        weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=D**-0.5).softmax(dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        return (weights @ v).view(ctx.shape)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        q, k, v, weights = ctx.saved_tensors
        B, _, T, D = ctx.shape
        grad = grad.reshape(q.shape).to(q.dtype)
        v_grad = weights.transpose(1, 2) @ grad
        scores_grad = torch._softmax_backward_data(
            grad @ v.transpose(1, 2), weights, -1, weights.dtype
        )
        q_grad = (scores_grad @ k).mul_(D**-0.5)
        k_grad = (scores_grad.transpose(1, 2) @ q).mul_(D**-0.5)
        return q_grad.view(ctx.shape), *(g.view(B, -1, T, D) for g in (k_grad, v_grad))
