"""Optimizers and their schedule: Muon for the blocks' matrices, AdamW for all else.

Muon moves each matrix by its momentum made nearly orthogonal, so that all directions move alike
(Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024), and its rows, the
neurons, nearly as far as each other (NorMuon, arXiv 2510.05491). The step has the size of AdamW's,
so that its rates serve (arXiv 2502.16982):

    M <- 0.95 M + 0.05 gradient;    U S V' = 0.95 M + 0.05 gradient;    D = U V'
    v <- 0.95 v + 0.05 mean(D^2 of each row);    D <- D / sqrt(v)
    W <- W - lr x (weight_decay W + 0.2 D / rms(D))

Ours works in the run's own dtype, on all matrices of one shape at once; torch.optim.Muon, which has
no v, works in bfloat16 whatever the hardware, matrix by matrix.
"""

import torch
from torch import nn

from miniglm.devices import pick_dtype
from miniglm.distributed import part_of, whole
from miniglm.lora import PARTS

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of the polynomial that lifts small values most
STEPS = 5
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """momentum: of both averages; dtype: of the matmuls."""

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            of_shape = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    # a sharded matrix is gathered alone: all at once would be the whole model
                    alone = id(parameter) if hasattr(parameter, "full_tensor") else None
                    of_shape.setdefault((parameter.shape, alone), []).append(parameter)
            for parameters in of_shape.values():
                self._step_together(parameters, group)

    def _step_together(self, parameters: list[torch.Tensor], group: dict) -> None:
        """Matrices of one shape in one batch: fewer and larger matmuls."""
        gradients, new = [parameter.grad for parameter in parameters], 1 - group["momentum"]
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            if "row_squares" not in state:  # nor has an older version's checkpoint
                # of all rows, also where the matrix is sharded
                state["row_squares"] = torch.zeros(len(parameter), 1, device=parameter.device)
        buffers = [state["momentum_buffer"] for state in states]
        row_squares = [state["row_squares"] for state in states]
        torch._foreach_lerp_(buffers, gradients, new)
        look_ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov's
        D = orthogonalize(torch.stack([*map(whole, look_ahead)]), self.dtype)  # of all, (N, ...)
        torch._foreach_lerp_(row_squares, [*D.square().mean(dim=2, keepdim=True)], new)
        D = D * (torch.stack(row_squares) + EPS**2).rsqrt()
        D = D / D.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=EPS)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, [*map(part_of, D, parameters)], alpha=-0.2 * group["lr"])


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(N, rows, columns) -> the same with singular values near 1, 0.7 to 1.2, by five steps of
    X <- a X + b (XX')X + c (XX')^2 X.

    All steps are polynomials in XX': for long matrices they are gathered in Q on the short side,
    which meets X once, at the end: half of the operations. bfloat16 is too coarse for that, since
    XX' squares the singular values.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices  # (N, short, long)
    X = (X / X.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)).to(dtype)
    short, long = X.shape[1:]
    if long < 2 * short or dtype != torch.float32:
        for _ in range(STEPS):
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    else:
        A, Q = X @ X.mT, None
        for step in range(STEPS):
            P = torch.baddbmm(A, A, A, beta=b, alpha=c)
            P.diagonal(dim1=1, dim2=2).add_(a)
            Q = P if Q is None else P @ Q
            if step < STEPS - 1:
                A = P @ (P @ A)
        X = Q @ X
    # lists of tensors are stepped in one kernel only if they lie in memory as the weights do
    return (X.mT if tall else X).to(matrices.dtype).contiguous()


def make_optimizers(model: nn.Module, config, device: str) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, or AdamW for all; only matrices decay.

    lr_ratio of a group: its learning rate over the schedule's. An LSTM's matrices and adapters get
    AdamW: the published rates and results are AdamW's.
    """
    of_kind = {"blocks": [], "embeddings": [], "matrices": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_kind[parameter_kind(name, parameter)].append(parameter)
    groups = {kind: {"params": of_kind[kind], "lr_ratio": 1.0} for kind in of_kind}
    groups["vectors"]["weight_decay"] = 0.0
    if config.embedding_lr is not None and config.learning_rate:
        groups["embeddings"]["lr_ratio"] = config.embedding_lr / config.learning_rate
    if config.embedding_decay is not None:
        groups["embeddings"]["weight_decay"] = config.embedding_decay
    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    muon = []
    if config.optimizer == "muon" and (blocks := groups.pop("blocks"))["params"]:
        muon = [Muon([blocks], dtype=pick_dtype(config.dtype, device), **common)]
    adamw = torch.optim.AdamW(
        [*groups.values()],
        betas=(config.beta1, config.beta2),
        fused=not device.startswith("mps"),
        **common,
    )
    return [*muon, adamw]


def parameter_kind(name: str, parameter: torch.Tensor) -> str:
    """Which group a parameter belongs to: blocks, embeddings (and head), matrices or vectors."""
    if parameter.dim() < 2:
        return "vectors"
    first = name.partition(".")[0]
    if first in ("wte", "wpe", "lm_head") and not name.endswith(PARTS):
        return "embeddings"
    return "blocks" if first == "blocks" and not name.endswith(PARTS) else "matrices"


def learning_rate(step: int, config) -> float:
    """Linear warm-up, then linear decay to min_lr (arXiv 2502.15938: best at a fixed budget)."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    end = config.decay_end
    left = max(0.0, (end - step) / max(1, end - config.warmup_iters))
    return config.min_lr + left * (config.learning_rate - config.min_lr)
