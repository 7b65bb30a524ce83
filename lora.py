"""Low-rank adapters (LoRA, arXiv 2106.09685) on Linears of a trained model, which stays as it is:

    y = W x + alpha / rank x B A x        A (rank, in) and B (out, rank) are trained, W is not

B starts at zero, so at first y is that of W alone. Training is train.py's (lora_rank and others),
the files are checkpoint.py's: whatever loads a checkpoint gets W + alpha / rank B A in W's place.

    python lora.py merge --out_dir=out-lora --to=out-merged     # an adapter -> a whole checkpoint
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, command, configure, nearest, repo_path, show_path

PARTS = ("lora_A", "lora_B")  # names of the trained parameters, under their Linear's


class LoRALinear(nn.Module):
    """A Linear whose own weight is frozen, and its adapter. The names of its weights stay.

    It is no nn.Linear, so that nothing packs or quantizes it without its adapter.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.drop = alpha / rank, nn.Dropout(dropout)
        out_features, in_features = linear.weight.shape
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as loralib and peft do
        self.is_on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        if not self.is_on:
            return y
        return y + self.scale * F.linear(F.linear(self.drop(x), self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The one Linear that does the same."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        delta = self.scale * (self.lora_B @ self.lora_A)
        linear.weight, linear.bias = nn.Parameter(self.weight + delta), self.bias
        return linear


def find_targets(model: nn.Module, targets: list[str]) -> list[str]:
    """The names of the Linears that targets mean: c_attn and mlp.c_proj one of each block, blocks.0
    all of the first block. UserError for a target without one, and for a head that is tied."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = []
    for target in targets:
        named = [name for name in linears if f".{target}." in f".{name}."]
        if not named:
            parts = dict.fromkeys(part for name in linears for part in name.split("."))
            words = [part for part in parts if not part.isdigit()]
            near = nearest(target, words) or f"; it has {', '.join(words)}"
            raise UserError(f"lora_targets={target} is no Linear of this model{near}")
        found += named
    if "lm_head" in found and model.config.tie_weights:
        raise UserError(
            "lora_targets=lm_head: the head is the embedding (tie_weights=True), which an adapter "
            "would change, too; leave it out"
        )
    return list(dict.fromkeys(found))


def add_adapters(
    model: nn.Module, rank: int, alpha: float, targets: list[str], dropout: float = 0.0
) -> None:
    """Freezes the model and wraps its targets; the adapters are all that is trained."""
    names = find_targets(model, targets)
    model.requires_grad_(False)
    for name in names:
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, LoRALinear(linear, rank, alpha, dropout))


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {n: module for n, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A and B of each adapter, by name; nothing where there is no adapter."""
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in adapters(model).items()
        for part in PARTS
    }


def merge(model: nn.Module) -> None:
    """Puts W + alpha / rank B A in the place of each adapter: a plain model, trainable whole."""
    for name, module in adapters(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.merged())
    model.requires_grad_(True)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters were trained."""
    modules = adapters(model).values()
    for module in modules:
        module.is_on = False
    try:
        yield
    finally:
        for module in modules:
            module.is_on = True


# --- the command line --------------------------------------------------------------------------


@dataclass
class Settings:
    names: list[str] = field(default_factory=list)  # merge
    out_dir: str = "out-lora"  # of an adapter; its best checkpoint is merged
    to: str = ""  # out_dir to write


def main(argv: list[str]) -> None:
    # here, since checkpoint.py imports this file
    from checkpoint import claimed, has_checkpoint, load_checkpoint, save_checkpoint

    config = configure(Settings, argv)
    if config.names != ["merge"]:
        raise UserError("write python lora.py merge --out_dir=OUT_DIR --to=ANOTHER")
    if not config.to:
        raise UserError("where to? pass --to=, a new out_dir")
    source, to = repo_path(config.out_dir), repo_path(config.to)
    if has_checkpoint(to):
        raise UserError(f"{show_path(to)} already holds a run; pass another --to=")
    checkpoint = load_checkpoint(source)
    if "adapter" not in checkpoint.run:
        raise UserError(f"{show_path(source)} holds a whole model, and no adapter")
    run = {key: value for key, value in checkpoint.run.items() if key != "adapter"}
    run["settings"] = run["settings"] | {"lora_rank": 0}
    run["merged"] = {part: checkpoint.run["adapter"][part] for part in ("rank", "alpha", "targets")}
    with claimed(to):
        save_checkpoint(to, checkpoint.model, [], checkpoint.tokenizer, run, is_best=True)
    print(f"{show_path(to)}: {show_path(checkpoint.path)} merged into its base")


if __name__ == "__main__":
    command(main)
