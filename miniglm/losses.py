"""Model, ids, targets -> sums of losses in nats. Rows and weights are objectives.py's.

All are sums over the trained targets, so that a caller divides once, by a count of its own, and
gradient accumulation equals the full batch under any mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data_utils import IGNORE, Dataset
from miniglm.devices import to_device
from miniglm.distributed import ALONE, World
from miniglm.lora import adapters_off


def send(arrays: tuple[np.ndarray, ...], device: str) -> tuple[Tensor, ...]:
    """idx and targets, (B, T) each, and what follows them -> on the device, with the places of the
    trained targets among all, (N,), in the middle. To find them on a GPU is to wait for it."""
    idx, targets, *more = arrays
    return to_device((idx, targets, np.flatnonzero(targets != IGNORE), *more), device)


def next_token(model: nn.Module, idx: Tensor, targets: Tensor, places: Tensor) -> Tensor:
    """The sum of -log p in nats over the trained targets, both (B, T); 0 where none is trained.
    places: theirs, as `send` gives them."""
    hidden, targets = trained_positions(model(idx), targets, places)
    return SummedLoss.apply(model, hidden, targets, *head_weights(model))


def token_log_prob(model: nn.Module, *batch: Tensor, temperature: float = 1.0) -> Tensor:
    """Log probability in nats of each trained target, (N,), in the order of places, from idx,
    targets and places; temperature divides the logits."""
    hidden, wanted = trained_positions(model(batch[0]), *batch[1:])
    # the head is linear
    return -EachLoss.apply(model, hidden / temperature, wanted, *head_weights(model))


def sequence_log_prob(model: nn.Module, idx: Tensor, targets: Tensor, places: Tensor) -> Tensor:
    """Log probability in nats of each row's targets, (B, T) -> (B,); IGNORE does not count."""
    log_p = token_log_prob(model, idx, targets, places)
    # scattered back to their places, so that a sum takes them in one order on any device
    log_p = log_p.new_zeros(targets.numel()).index_copy(0, places, log_p)
    return log_p.view(targets.shape).sum(dim=1)


@torch.no_grad()
def target_losses(model: nn.Module, idx: Tensor, targets: Tensor, places: Tensor) -> Tensor:
    """-log p in nats of each target, (B, T); 0 where it is IGNORE."""
    hidden, wanted = trained_positions(model(idx), targets, places)
    losses = each_loss(model, hidden, wanted)
    return losses.new_zeros(targets.numel()).index_copy_(0, places, losses).view(targets.shape)


def reference_log_prob(model: nn.Module, *batch: Tensor) -> Tensor:
    """sequence_log_prob with the model's adapters off, in eval mode; it has no gradient."""
    with eval_mode(model), adapters_off(model):
        return sequence_log_prob(model, *batch).detach()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout, and afterwards as it was."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


def dpo(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The loss of each pair, (P,), from log-probabilities of its chosen and its rejected answer,
    (P, 2) each: -log sigmoid(beta d), where d is policy - reference of the chosen one less that of
    the rejected one (equation 7 of arXiv 2305.18290)."""
    chosen, rejected = (policy - reference).unbind(dim=1)
    return -F.logsigmoid(beta * (chosen - rejected))


def kto(ratio: Tensor, is_good: Tensor, kl: Tensor, beta: float) -> Tensor:
    """The loss of each answer, (B,), that is marked as good or bad: 1 - sigmoid(beta (ratio - kl)),
    of a bad one 1 - sigmoid(beta (kl - ratio)) (arXiv 2402.01306). ratio: policy -
    reference in log-probability, (B,); kl: that of answers that belong to other prompts, its mean,
    at least 0."""
    return 1 - torch.sigmoid(beta * torch.where(is_good, ratio - kl, kl - ratio))


# --- the head, some hundred rows at a time -----------------------------------------------------


def trained_positions(hidden: Tensor, targets: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, n_embd) and (B, T) -> those of the N trained targets, (N, n_embd) and (N,)."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if len(places) < len(targets):
        hidden, targets = (x.index_select(0, places) for x in (hidden, targets))
    return hidden, targets


def head_weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.lm_head.parameters() if p.requires_grad]


def chunk_sizes(n: int, n_vocab: int, device: str) -> list[int]:
    """Rows of each chunk of n, the largest first: their logits in float32 take 64 MiB at most, on a
    GPU 512. The rest is cut into powers of two on a CPU: oneDNN keeps code for each size that it
    meets, in bfloat16 megabytes."""
    rows, logits = (512, 2**24) if device == "cpu" else (4096, 2**27)
    rows = max(1, min(rows, logits // n_vocab))
    rest = [n % rows & 1 << i for i in range(9, -1, -1)] if device == "cpu" else [n % rows]
    return [rows] * (n // rows) + [size for size in rest if size] or [0]


def chunks(model: nn.Module, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of hidden (n, n_embd), as leaves, with their logits and targets: some hundred rows at a
    time, so that the memory of logits does not grow with the batch and a CPU's cache keeps them."""
    sizes = chunk_sizes(len(hidden), model.config.n_vocab, hidden.device.type)
    for h, t in zip(hidden.detach().split(sizes), targets.split(sizes), strict=True):
        h = h.requires_grad_(torch.is_grad_enabled())
        yield h, model.head(h), t


def log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def each_loss(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, (N,)."""
    parts = chunks(model, hidden, targets)
    return torch.cat([F.nll_loss(log_softmax(z), t, reduction="none") for _, z, t in parts])


def chunk_gradients(
    model: nn.Module, hidden: Tensor, targets: Tensor, weights: tuple, scale: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The sum of the losses, each times its scale (N,), and its gradients: of hidden (N, n_embd)
    and of the weights, which are tensors. That of logits is p, less 1 at the target."""
    grads = [torch.empty_like(hidden), *(torch.zeros_like(w) for w in weights)]
    total, done = 0, 0
    with torch.enable_grad():
        for h, logits, t in chunks(model, hidden, targets):
            here, done = slice(done, done + len(h)), done + len(h)
            with torch.no_grad():
                loss, z_grad = loss_and_gradient(logits, t, scale if scale is None else scale[here])
            grads[0][here], *w_grads = torch.autograd.grad(logits, (h, *weights), z_grad)
            for grad, w_grad in zip(grads[1:], w_grads, strict=True):
                grad.add_(w_grad)
            total = total + loss
    return total, grads


def loss_and_gradient(
    logits: Tensor, targets: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum of the losses, each times its scale (n,), and its gradient: p, less 1 at the target,
    in as few passes over (n, n_vocab) logits as there can be."""
    log_p, at = log_softmax(logits), targets[:, None]
    losses = -log_p.gather(1, at)
    grad = log_p.exp_().scatter_add_(1, at, torch.full_like(losses, -1))
    if scale is not None:
        losses, grad = losses * scale[:, None], grad.mul_(scale[:, None])
    return losses.sum(), grad.to(logits.dtype)


class SummedLoss(torch.autograd.Function):
    """The summed loss of hidden (N, n_embd) for targets (N,). Each chunk's gradients are taken in
    the forward pass, so that its logits can go at once (as in arXiv 2410.10989); the backward pass
    only scales them. weights: the trained parameters of the head."""

    @staticmethod
    def forward(ctx, model, hidden, targets, *weights):
        total, grads = chunk_gradients(model, hidden, targets, weights)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden_grad, *weight_grads = (grad * grad_output for grad in ctx.saved_tensors)
        return None, hidden_grad, None, *weight_grads


class EachLoss(torch.autograd.Function):
    """The loss of each of targets (N,), for hidden (N, n_embd). The weight of each is known in the
    backward pass only, so each chunk's logits are computed again there: twice the head's forward
    pass, and the memory of one chunk. weights as in SummedLoss."""

    @staticmethod
    def forward(ctx, model, hidden, targets, *weights):
        ctx.model, ctx.weights = model, weights
        ctx.save_for_backward(hidden, targets)
        device = hidden.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return each_loss(model, hidden, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden, targets = ctx.saved_tensors
        with torch.autocast(*ctx.autocast):
            _, grads = chunk_gradients(ctx.model, hidden, targets, ctx.weights, grad_output)
        return None, grads[0], None, *grads[1:]


# --- whole splits ------------------------------------------------------------------------------


def split_sums(
    model: nn.Module,
    data: Dataset,
    split: str,
    batch_size: int,
    world: World = ALONE,
    block_size: int | None = None,
) -> tuple[float, int, int]:
    """Over a whole split, in eval mode: the sum of -log p in nats, the targets, their UTF-8 bytes.

    perplexity = exp(nats / targets); bits per byte = nats / log(2) / bytes. The processes of the
    world share the work. block_size: of the windows of texts; None is the model's.
    """
    bytes_per_id = data.tokenizer.bytes_per_id
    nats, count, n_bytes = 0.0, 0, 0
    batches = data.eval_batches(split, block_size or model.config.block_size, batch_size)
    with eval_mode(model):
        for batch, is_own in world.deal(batches):
            losses = target_losses(model, *send(batch, str(model.wte.weight.device)))
            if is_own:
                trained = batch[1][batch[1] != IGNORE]
                count += len(trained)
                n_bytes += int(bytes_per_id[trained].sum())
                nats += losses.cpu().double().sum().item()
    return *world.sums([nats]), *world.sums([count, n_bytes])
