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
from miniglm.distributed import ALONE, World
from miniglm.lora import adapters_off

Batch = tuple[torch.Tensor, torch.Tensor]  # idx (B, T), targets (B, T) with IGNORE
PairBatch = tuple[torch.Tensor, ...]  # of rows chosen, rejected, chosen, ...; reference (B / 2, 2)


def to_device(batch: tuple[np.ndarray, ...], device: str) -> tuple[torch.Tensor, ...]:
    """Arrays -> tensors; copies to a GPU are pinned and asynchronous."""
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


# --- preferences: DPO --------------------------------------------------------------------------


def count_pairs(batches: list[tuple[np.ndarray, ...]]) -> dict[str, int]:
    """What the sums of preferences over these batches are divided by."""
    pairs = sum(len(targets) for _, targets, *_ in batches) // 2
    chosen = sum(int((targets[::2] != IGNORE).sum()) for _, targets, *_ in batches)
    return dict.fromkeys(PREFERENCES, pairs) | {"sft": chosen}


PREFERENCES = ("dpo", "sft", "rewards_chosen", "rewards_rejected", "margin", "accuracy")
PREFERENCES += ("logp_chosen", "logp_rejected")


def preferences(
    model: torch.nn.Module,
    batch: PairBatch,
    beta: float = 0.1,
    form: str = "sigmoid",
    label_smoothing: float = 0.0,
    per_token: bool = False,
) -> dict[str, torch.Tensor]:
    """Sums over pairs, by the names of PREFERENCES: the loss of DPO, -log p of the chosen answers,
    and what tells how training goes. Chosen and rejected rows are read in one forward pass.

    Without a reference in the batch it is the model with its adapters off, in eval mode.
    per_token: an answer's log-probability is the mean of its tokens', not the sum.
    """
    idx, targets, *given = batch
    reference = given[0] if given else reference_log_prob(model, (idx, targets))
    log_p = sequence_log_prob(model, (idx, targets)).view(-1, 2)  # of chosen, of rejected
    policy = log_p
    if per_token:
        lengths = (targets != IGNORE).sum(dim=1).clamp_min(1).view(-1, 2)
        policy, reference = log_p / lengths, reference / lengths
    losses = dpo(policy, reference, beta, form, label_smoothing)
    rewards = beta * (policy - reference).detach()
    margins = rewards[:, 0] - rewards[:, 1]
    sums = (losses, -log_p[:, 0], *rewards.T, margins, (margins > 0).to(losses.dtype))
    return {
        name: values.sum()
        for name, values in zip(PREFERENCES, (*sums, *log_p.detach().T), strict=True)
    }


def dpo(
    policy: torch.Tensor,
    reference: torch.Tensor,
    beta: float,
    form: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The loss of each pair, (P,), from log-probabilities of its chosen and its rejected answer,
    (P, 2) each. With d = (policy - reference) of the chosen one less that of the rejected one:

    sigmoid     -log sigmoid(beta d), equation 7 of arXiv 2305.18290; with label_smoothing e, the
                share of pairs marked the wrong way round: (1 - e) of it and e of that for -d
    ipo         (d - 1 / (2 beta))^2, equation 17 of arXiv 2310.12036
    """
    chosen, rejected = (policy - reference).unbind(dim=1)
    d = chosen - rejected
    if form == "ipo":
        return (d - 1 / (2 * beta)).square()
    wrong = F.logsigmoid(-beta * d)
    return -(1 - label_smoothing) * F.logsigmoid(beta * d) - label_smoothing * wrong


def sequence_log_prob(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Log probability in nats of each row's targets, (B,); IGNORE does not count."""
    idx, targets = batch
    hidden = model(idx)
    trained = targets != IGNORE
    weights = [p for p in model.lm_head.parameters() if p.requires_grad]
    losses = ChunkedLosses.apply(model.head, hidden[trained], targets[trained], *weights)
    # in their places, so that a sum takes them in one order on any device
    return -losses.new_zeros(targets.shape).masked_scatter(trained, losses).sum(dim=1)


def reference_log_prob(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The same with the model's adapters off, in eval mode, without gradients; (B / 2, 2)."""
    was_training = model.training
    model.eval()
    with adapters_off(model):
        losses = target_losses(model, batch)
    model.train(was_training)
    return -losses.sum(dim=1).view(-1, 2)


class ChunkedLosses(torch.autograd.Function):
    """The loss of each of targets (N,), for hidden (N, n_embd). What each gradient is weighted with
    is known in the backward pass only, so each chunk's logits are made once more there: they take
    the head's forward pass twice, and the memory of one chunk. weights as in ChunkedLoss."""

    @staticmethod
    def forward(ctx, head, hidden, targets, *weights):
        ctx.head, ctx.weights = head, weights
        ctx.save_for_backward(hidden, targets)
        device = hidden.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return torch.cat([losses for _, losses in chunk_losses(head, hidden, targets)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden, targets = ctx.saved_tensors
        grads = [torch.empty_like(hidden), *(torch.zeros_like(w) for w in ctx.weights)]
        done = 0
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            for h, losses in chunk_losses(ctx.head, hidden, targets):
                end = done + len(h)
                loss = (losses * grad_output[done:end]).sum()
                h_grad, *w_grads = torch.autograd.grad(loss, (h, *ctx.weights))
                grads[0][done:end] = h_grad
                for grad, w_grad in zip(grads[1:], w_grads, strict=True):
                    grad.add_(w_grad)
                done = end
        return None, grads[0], None, *grads[1:]


def split_preferences(
    model: torch.nn.Module,
    data: Dataset,
    split: str,
    batch_size: int,
    device: str,
    reference: torch.Tensor | None = None,
    world: World = ALONE,
    **options: float | str,
) -> dict[str, float]:
    """Over a whole split of pairs, in eval mode: the means of preferences, `dpo` a pair, `sft` a
    token of the chosen answers. reference: of all pairs, (P, 2); world: the processes, which share
    the work; options: of preferences."""
    was_training = model.training
    model.eval()
    sums, counts = dict.fromkeys(PREFERENCES, 0.0), dict.fromkeys(PREFERENCES, 0)
    for (pairs, batch), is_own in world.deal(data.pair_batches(split, batch_size)):
        given = [] if reference is None else [reference[pairs].to(device)]
        with torch.no_grad():
            found = preferences(model, (*to_device(batch, device), *given), **options)
        for name, count in count_pairs([batch]).items() if is_own else ():
            sums[name] += found[name].double().item()
            counts[name] += count
    model.train(was_training)
    totals = zip(world.sums(list(sums.values())), world.sums(list(counts.values())), strict=True)
    return {
        name: total / max(1, count)
        for name, (total, count) in zip(PREFERENCES, totals, strict=True)
    }


def all_log_probs(
    model: torch.nn.Module,
    data: Dataset,
    split: str,
    batch_size: int,
    device: str,
    world: World = ALONE,
) -> torch.Tensor:
    """What the model makes of each pair of a split before it is trained, (P, 2) float32; each
    process of the world computes its part of them."""
    found = torch.zeros(data.n_rows(split, 0), 2)
    for (pairs, batch), is_own in world.deal(data.pair_batches(split, batch_size)):
        log_p = reference_log_prob(model, to_device(batch, device)).float().cpu()
        if is_own:
            found[pairs] = log_p
    return world.add(found)


# --- whole splits ------------------------------------------------------------------------------


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
    model: torch.nn.Module,
    data: Dataset,
    split: str,
    batch_size: int,
    device: str,
    world: World = ALONE,
) -> tuple[float, int, int]:
    """Over a whole split, in eval mode: the sum of -log p in nats, the targets, their UTF-8 bytes.

    perplexity = exp(nats / targets); bits per byte = nats / log(2) / bytes. The processes of the
    world share the work.
    """
    bytes_per_id = data.tokenizer.bytes_per_id
    nats, count, n_bytes = 0.0, 0, 0
    was_training = model.training
    model.eval()
    batches = data.eval_batches(split, model.config.block_size, batch_size)
    for batch, is_own in world.deal(batches):
        losses = target_losses(model, to_device(batch, device))
        if not is_own:
            continue
        trained = batch[1][batch[1] != IGNORE]
        count += len(trained)
        n_bytes += int(bytes_per_id[trained].sum())
        nats += losses.cpu().double().sum().item()
    model.train(was_training)
    return *world.sums([nats]), *world.sums([count, n_bytes])
