"""Batch -> named sums and counts. Averaging is train.py's and evaluations.py's.

An objective returns terms, each a sum over the trained targets. The counts come from the batches,
before the forward pass, over all micro-batches of a step, so that each term is divided once, by
its own count: loss = sum of weight x term / count. So accumulation equals the full batch under any
mask, and a batch without a trained target gives 0, not NaN.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from data_utils import IGNORE, Dataset

Batch = tuple[torch.Tensor, torch.Tensor]  # idx (B, T), targets (B, T) with IGNORE


def to_device(batch: tuple[np.ndarray, np.ndarray], device: str) -> Batch:
    """Arrays -> int64 tensors; copies to a GPU are pinned and asynchronous."""
    tensors = (torch.from_numpy(np.ascontiguousarray(part)) for part in batch)
    if device.startswith("cuda"):
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)


def count_terms(batches: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, int]:
    """What the sums of next_token over these batches are divided by."""
    return {"next_token": sum(int((targets != IGNORE).sum()) for _, targets in batches)}


def next_token(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The sum of -log p in nats over the trained targets of a batch."""
    idx, targets = batch
    hidden = model(idx)
    trained = targets != IGNORE
    if not trained.all():
        hidden, targets = hidden[trained], targets[trained]  # (N, n_embd), (N,)
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if not torch.is_grad_enabled():
        losses = [loss.sum() for _, loss in chunk_losses(model.head, hidden, targets)]
        return {"next_token": torch.stack(losses).sum()}
    weights = [p for p in model.lm_head.parameters() if p.requires_grad]
    return {"next_token": ChunkedLoss.apply(model.head, hidden, targets, *weights)}


def chunk_losses(
    head: Callable, hidden: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of hidden (n, n_embd), as leaves, with their losses (n,): some hundred rows at a time,
    so that the memory of logits does not grow with the batch and a CPU keeps them in its cache."""
    rows = 512 if hidden.device.type == "cpu" else 4096
    for h, t in zip(hidden.detach().split(rows), targets.split(rows), strict=True):
        logits = head(h.requires_grad_(torch.is_grad_enabled()))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        yield h, F.cross_entropy(logits, t, reduction="none")


class ChunkedLoss(torch.autograd.Function):
    """The summed loss of hidden (N, n_embd) for targets (N,). Each chunk's gradients are taken
    at once, in the forward pass, so that its logits can go (as in arXiv 2410.10989); the backward
    pass only scales them. weights are those parameters of the head that are trained."""

    @staticmethod
    def forward(ctx, head, hidden, targets, *weights):
        grads = [torch.empty_like(hidden), *(torch.zeros_like(w) for w in weights)]
        total, done = 0, 0
        with torch.enable_grad():
            for h, losses in chunk_losses(head, hidden, targets):
                loss = losses.sum()
                h_grad, *w_grads = torch.autograd.grad(loss, (h, *weights))
                grads[0][done : done + len(h)] = h_grad
                for grad, w_grad in zip(grads[1:], w_grads, strict=True):
                    grad.add_(w_grad)
                total, done = total + loss.detach(), done + len(h)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden_grad, *weight_grads = (grad * grad_output for grad in ctx.saved_tensors)
        return None, hidden_grad, None, *weight_grads


@torch.no_grad()
def target_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """-log p in nats of each target, (B, T); 0 where it is IGNORE."""
    idx, targets = batch
    trained = targets != IGNORE
    hidden, wanted = model(idx)[trained], targets[trained]
    losses = torch.cat([loss for _, loss in chunk_losses(model.head, hidden, wanted)])
    out = torch.zeros(targets.shape, dtype=losses.dtype, device=targets.device)
    out[trained] = losses
    return out


def split_sums(
    model: torch.nn.Module, data: Dataset, split: str, batch_size: int, device: str
) -> tuple[float, int, int]:
    """Over a whole split, in eval mode: the sum of -log p in nats, the targets, their UTF-8 bytes.

    perplexity = exp(nats / targets); bits per byte = nats / log(2) / bytes.
    """
    bytes_per_id = data.tokenizer.bytes_per_id
    nats, count, n_bytes = 0.0, 0, 0
    was_training = model.training
    model.eval()
    for batch in data.eval_batches(split, model.config.block_size, batch_size):
        trained = batch[1][batch[1] != IGNORE]
        count += len(trained)
        n_bytes += int(bytes_per_id[trained].sum())
        nats += target_losses(model, to_device(batch, device)).cpu().double().sum().item()
    model.train(was_training)
    return nats, count, n_bytes
