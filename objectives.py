"""Batch -> named sums and counts. Averaging is train.py's and evaluations.py's.

An objective returns terms, each a sum over the trained targets. The counts come from the batches,
before the forward pass, over all micro-batches of a step, so that each term is divided once, by
its own count: loss = sum of weight x term / count. So accumulation equals the full batch under any
mask, and a batch without a trained target gives 0, not NaN.
"""

import numpy as np
import torch
import torch.nn.functional as F

from data_utils import IGNORE, Dataset

CHUNK = 4096  # rows of logits held at once where no gradient is kept

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
    logits = model.head(hidden.flatten(0, -2))
    return {"next_token": F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")}


@torch.no_grad()
def target_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """-log p in nats of each target, (B, T); 0 where it is IGNORE."""
    idx, targets = batch
    trained = targets != IGNORE
    hidden, wanted = model(idx)[trained], targets[trained]
    losses = [
        F.cross_entropy(model.head(h).float(), t, reduction="none")
        for h, t in zip(hidden.split(CHUNK), wanted.split(CHUNK), strict=True)
    ]
    out = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    if losses:
        out[trained] = torch.cat(losses)
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
