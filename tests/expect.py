"""How busy a GPU should be with each config that is written for one, on paper.

    python -m tests.expect
    python -m tests.expect config/pretrain_sanguo_gpu.py --batch_size=128

A step, from the forward pass to both optimizers, is taken with tensors that have no memory. Each
operation on them that is not a view has bytes to move, those of its inputs and outputs, and perhaps
a matmul to compute. It takes the longest of

    a launch, 5 microseconds;    bytes / bandwidth;    operations / (0.7 x the data sheet's peak)

and a step their sum. Compiled, only matmuls and attention count of the passes through the model,
head and loss apart, each with one fused loop beside it that moves as many bytes. MFU is train.py's:
operations by the model's flops_per_token, padding left out. All tokens of questions are taken for
trained, a pair for two questions. Python, communication, evaluations and saving are left out.
"""

import sys
from collections import namedtuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import model as models
from configurator import ROOT, configure
from miniglm import compiling, losses
from miniglm.devices import PEAKS
from miniglm.lora import add_adapters
from miniglm.optim import make_optimizers
from miniglm.preflight import architecture
from train import Settings

CONFIGS = sorted((ROOT / "config").glob("**/*.py"))
LAUNCH, REACHED = 5e-6, 0.7
BANDWIDTH = {"A100": 2.0e12, "RTX 4090": 1.008e12, "T4": 0.32e12}  # bytes per second
# of a dataset whose name has this: entries; then of questions the tokens of a row as it is padded,
# and without padding. Those of the novel are counted, the others assumed.
KINDS = {"sanguo_sft_gpt2": (50261, 192, 117), "sanguo_gpt2": (50261,), "sanguo": (4096, 128, 50)}
KINDS |= dict.fromkeys(("translation", "finance"), (6400, 64, 64)) | {"": (16384, 64, 64)}
FREE = ("detach", "alias", "empty", "new_empty", "_unsafe_view", "lift_fresh", "promote_types")
SPARSE = ("embedding", "gather", "index", "scatter_add_")  # touch little of their first input

Operation = namedtuple("Operation", "flops bytes")


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if space == "aten" and not func.is_view and not name.startswith(FREE):
            flops = flop_registry.get(func.overloadpacket, lambda *_, **__: 0)
            flops = flops(*args, out_val=out) / (2 if "attention" in name else 1)  # causal
            moved = tree_leaves((args[name in SPARSE :], kwargs, args if out is None else out))
            size = sum(x.nbytes for x in moved if isinstance(x, torch.Tensor))
            self.operations.append(Operation(flops, size))
        return out


def flash(q, k, v, mask=None, is_causal=False):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


def chunk_sizes(n, n_vocab, device, sizes=losses.chunk_sizes):
    return sizes(n, n_vocab, "cuda")


def settings(argv: list[str]) -> Settings:
    """Those of a config, which may take its model's shape from the one that trains that model."""
    config = configure(Settings, argv)
    for path in CONFIGS:
        if configure(Settings, [str(path)]).out_dir == config.init_from:
            return configure(Settings, argv, architecture(vars(settings([str(path)]))))
    return config


def count_step(config: Settings, vocab: int, rows: int, length: int):
    """The model; the operations of its second step, which has moments: those of the passes through
    the model, and those of head, loss, clipping and optimizers."""
    config.dtype = "bfloat16"
    with (
        FakeTensorMode(),
        patch.object(models, "attend", flash),
        patch.object(losses, "chunk_sizes", chunk_sizes),
        patch.object(F, "rms_norm", lambda *x: torch.ops.aten._fused_rms_norm(*x)[0]),
    ):
        model = models.GPT(models.ModelConfig(**architecture(vars(config)), n_vocab=vocab))
        if config.lora_rank:
            add_adapters(model, config.lora_rank, config.lora_alpha, ["blocks"])
        optimizers, idx = make_optimizers(model, config, "cuda"), torch.zeros(rows, length).long()
        for _ in range(2):
            passes, others = Count(), Count()
            with torch.autocast("cpu", torch.bfloat16):
                with passes:
                    hidden = model(idx).flatten(0, 1)
                with others:
                    head = model, hidden, idx.flatten(), *losses.head_weights(model)
                    loss = losses.SummedLoss.apply(*head)
            with passes:
                loss.backward()
            with others:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    return model, passes.operations, others.operations


def seconds(operations: list[Operation], gpu: str) -> float:
    rate = REACHED * PEAKS[gpu] * 1e12
    return sum(max(LAUNCH, op.bytes / BANDWIDTH[gpu], op.flops / rate) for op in operations)


def show(argv: list[str]) -> None:
    """Prints the table's lines of a config, one for each GPU."""
    config, gpus = settings(argv), 8 if "_8gpu" in argv[0] else 1
    vocab, *lengths = next(kind for part, kind in KINDS.items() if part in config.dataset)
    asks = "_sft" in config.dataset or "_dpo" in config.dataset
    length, own = lengths if asks else [config.block_size] * 2
    rows = config.rows_per_step // gpus * (2 if "_dpo" in config.dataset else 1)
    model, passes, others = count_step(config, vocab, rows, length)
    kept = [op for op in passes if op.flops]
    loops = [Operation(0, op.bytes) for op in kept]
    ways = [*passes, *others], [*kept, *loops, *others]
    step = rows * own * model.flops_per_token(own)
    work = step * gpus * config.max_iters
    pays = work >= compiling.LEAST["cuda"]
    cells = [argv[0], f"{model.n_params() / 1e6:.1f}M", f"{rows * own:,}", f"{step:.1e}"]
    moved = (f"{sum(op.bytes for op in way) / 1e9:.1f}" for way in ways)
    cells += [" / ".join(str(len(way)) for way in ways), " / ".join(moved)]
    for gpu in BANDWIDTH:
        times = [seconds(way, gpu) for way in ways]
        shares = [f"{s * 1e3:.1f}, {step / s / PEAKS[gpu] / 1e12:.0%}" for s in times]
        run = [f"{work:.1e}", f"{config.max_iters * times[pays] / 60:.1f}", "yes" if pays else "no"]
        print(f"| {' | '.join([*cells, gpu, *shares, *run])} |")


def main(argv: list[str]) -> None:
    heads = "config | parameters | tokens a step | operations | launches, eager / compiled | "
    heads += "GB moved | GPU | ms a step and MFU, eager | compiled | operations of the run | "
    print(f"| {heads}minutes | compiling pays |\n{'|---' * 12}|")
    on_gpu = [path for path in CONFIGS if "GPU" in path.read_text(encoding="utf-8")]
    for words in [argv] if argv else [[p.relative_to(ROOT).as_posix()] for p in on_gpu]:
        show(words)


if __name__ == "__main__":
    main(sys.argv[1:])
