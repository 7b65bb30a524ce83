"""Low-rank adapters (LoRA, arXiv 2106.09685) on Linears of a trained model, which stays frozen:

    y = W x + alpha / rank x B A x        A (rank, in) and B (out, rank) are trained, W is not

B starts at zero, so at first y is W x. A base that came in half precision stays so: W is cast to
the input's dtype where it is used, which loses nothing and halves its memory. train.py trains
adapters (--lora_rank and others), miniglm/checkpoint.py stores them; loading a checkpoint merges
them, W + alpha / rank B A replaces W. export.py --format=merged writes that as a checkpoint of its
own.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, nearest

PARTS = ("lora_A", "lora_B")  # names of the trained parameters, under their Linear's


class LoRALinear(nn.Module):
    """A Linear with a frozen weight, and its adapter. The names of its weights do not change.

    Not a subclass of nn.Linear, so that nothing packs or quantizes it without its adapter.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.drop = alpha / rank, nn.Dropout(0.0)
        out_features, in_features = linear.weight.shape
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, in_features, dtype=dtype))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(out_features, rank, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as loralib and peft do
        self.is_on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        casts = torch.is_autocast_enabled(x.device.type)  # by itself
        y = F.linear(x, self.weight if casts else self.weight.to(x.dtype), self.bias)
        if not self.is_on:
            return y
        return y + self.scale * F.linear(F.linear(self.drop(x), self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One Linear with the same output."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        delta = self.scale * (self.lora_B @ self.lora_A)
        linear.weight, linear.bias = nn.Parameter(self.weight + delta), self.bias
        return linear


def find_targets(model: nn.Module, targets: list[str]) -> list[str]:
    """The names of the Linears that match: c_attn and mlp.c_proj one of each block, blocks.0 all of
    the first block. Raises UserError for a target that matches none, and for a tied head."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = {}
    for target in targets:
        matches = [name for name in linears if f".{target}." in f".{name}."]
        if not matches:
            words = {part for name in linears for part in name.split(".") if not part.isdigit()}
            near = nearest(target, words) or f"; it has {', '.join(sorted(words))}"
            raise UserError(f"lora_targets={target} is no Linear of this model{near}")
        names |= dict.fromkeys(matches)
    if "lm_head" in names and model.config.tie_weights:
        raise UserError(
            "lora_targets=lm_head: the head is the embedding (tie_weights=True), which an adapter "
            "would change too; leave it out"
        )
    return list(names)


def add_adapters(model: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Freezes the model and wraps its targets; only the adapters are trained."""
    names = find_targets(model, targets)
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha))
    for module in model.modules():
        # of half precision: only adapters cast their input
        if isinstance(module, nn.Linear) and module.weight.dtype.itemsize < 4:
            module.float()


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {n: module for n, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A and B of each adapter, by name."""
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in adapters(model).items()
        for part in PARTS
    }


def merge(model: nn.Module) -> None:
    """Replaces each adapter by W + alpha / rank B A: a plain model, all of it trainable."""
    for name, module in adapters(model).items():
        model.set_submodule(name, module.merged())
    model.requires_grad_(True)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model, without its adapters."""
    modules = adapters(model).values()
    for module in modules:
        module.is_on = False
    try:
        yield
    finally:
        for module in modules:
            module.is_on = True
