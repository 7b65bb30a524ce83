"""Training steps: speed beside Hugging Face's, share of the matmul roofline, memory, profile.

    python -m bench step --rounds=3
    python -m bench step --n_layer=6 --n_embd=512 --n_head=8 --dataset=sanguo_gpt2

First the same step with AdamW for all, on random ids: our GPT in three architectures, Hugging
Face's GPT-2 and Llama, in float32 and in what train.py takes on this device. The roofline of a step
is the time of its matmuls alone. Then train.py's own step on a prepared dataset, batch included,
with Muon and with AdamW.
"""

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch.profiler import record_function

import train as training
from bench import timing
from bench.generate import hugging_face_model
from bench.timing import measure, print_profile, profile_kinds, report, speed_ratio
from configurator import at_least
from data_utils import open_dataset
from miniglm.devices import pick_dtype
from miniglm.losses import next_token
from miniglm.optim import make_optimizers
from model import GPT, ModelConfig

LLAMA = {"qk_norm": False, "norm_eps": 1e-5}
ARCHITECTURES = {  # as our settings
    "Qwen3": {},  # our default
    "Llama": LLAMA,
    "GPT-2": LLAMA | {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True},
}
PEERS = {  # with the same matmuls
    "ours, Qwen3": "Hugging Face, Llama",
    "ours, Llama": "Hugging Face, Llama",
    "ours, GPT-2": "Hugging Face, GPT-2",
}
CONTENDERS = list(dict.fromkeys([*PEERS, *PEERS.values()]))
KINDS = {  # kind -> its events, forward and backward
    "head and loss": r"SummedLoss",
    "attention": r"CausalAttention|scaled_dot_product|ScaledDotProduct",
    "Muon": r"^Optimizer\..*#Muon\.",
    "AdamW": r"^Optimizer\..*#AdamW\.",
    "data": r"^data$",
    "matmuls of the blocks": r"^aten::(mm|addmm|bmm|baddbmm)$",
    "copies and casts": r"^aten::(to|_to_copy|copy_|clone|contiguous)$",
    "gradient norm": r"^aten::(_foreach_norm|linalg_vector_norm|_foreach_mul_)$",
}


@dataclass
class Settings(timing.Settings):
    batch_size: Annotated[int, at_least(1)] = 16  # rows of a step
    block_size: Annotated[int, at_least(2)] = 256  # tokens of a row
    dataset: str = "sanguo"  # what train.py's own step reads; its vocabulary is everyone's


def bench(config: Settings) -> dict:
    """Speeds, ratios and memory of the contenders by dtype, and of train.py's own step."""
    n_vocab = open_dataset(config.dataset).tokenizer.n_vocab
    print(
        f"step: {config.n_layer} layers x {config.n_embd}, vocabulary {n_vocab:,}, "
        f"{config.batch_size} x {config.block_size} tokens, {config.rounds} turns each"
    )
    dtypes = dtypes_of("auto", config.device)
    results = {dtype: race(config, n_vocab, dtype) for dtype in dtypes}
    for dtype, memory in peak_memory(config, n_vocab, dtypes).items():
        results[dtype]["memory"] = memory
    # from here on the process keeps freed memory, as train.py does
    return results | {"train.py": {dtype: race_own(config, dtype) for dtype in dtypes}}


def dtypes_of(setting: str, device: str) -> list[str]:
    """float32, and what train.py takes by that setting of dtype if it is another."""
    own = str(pick_dtype(setting, device)).removeprefix("torch.")
    return list(dict.fromkeys(["float32", own]))


# --- the same step -------------------------------------------------------------------------------


def race(config: Settings, n_vocab: int, dtype: str) -> dict:
    """The contenders in one dtype, and the matmuls of their steps."""
    calls, ratios = {}, {}
    for name in CONTENDERS:
        model = build(config, n_vocab, name)
        calls[name] = training_step(config, model, dtype)
        if name in PEERS:
            calls[matmuls_of(name)] = run_matmuls(step_matmuls(model, config.batch_size), dtype)
    seconds = measure(calls, config)
    for ours, peer in PEERS.items():
        ratios[f"{ours} / {peer}"] = speed_ratio(seconds, ours, peer)
    for name in CONTENDERS:
        ratios[f"{name}: of its matmul roofline"] = speed_ratio(seconds, name, matmuls_of(name))
    print(f" {dtype}, AdamW for all")
    return report(seconds, CONTENDERS, config.batch_size * config.block_size, ratios)


def matmuls_of(name: str) -> str:
    return f"matmuls, {name.partition(', ')[2]}"


def build(config: Settings, n_vocab: int, name: str) -> torch.nn.Module:
    """One of CONTENDERS, with random weights."""
    torch.manual_seed(config.seed)
    who, _, architecture = name.partition(", ")
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    ours = ModelConfig(**shape, **ARCHITECTURES[architecture], n_vocab=n_vocab, vocab_size=n_vocab)
    model = GPT(ours) if who == "ours" else hugging_face_model(ours)
    return model.to(config.device).train()


def training_step(config: Settings, model: torch.nn.Module, dtype: str) -> Callable[[], None]:
    """A step as train.py's: forward, loss, backward, clipping, fused AdamW."""
    settings = training.Settings(optimizer="adamw")
    [optimizer] = make_optimizers(model, settings, config.device)
    n_vocab = model.config.vocab_size
    ids = torch.randint(n_vocab, (config.batch_size, config.block_size + 1), device=config.device)
    idx, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def loss() -> torch.Tensor:
        if isinstance(model, GPT):
            return next_token(model, idx, targets) / targets.numel()
        return model(input_ids=idx, labels=idx, use_cache=False).loss

    def step() -> None:
        with torch.autocast(idx.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_matmuls(model: GPT, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs of matrices that a step multiplies, of random numbers: for each Linear forward, its
    input's gradient, its weight's; for attention two and four, on half of the heads, since the
    causal half of each is enough. 2 x their multiply-adds are 6 x parameters of Linear layers (the
    head is one) x tokens + 12 x n_layer x n_embd x T x tokens / 2."""
    c, device = model.config, model.wte.weight.device
    tokens, heads = rows * c.block_size, max(1, rows * c.n_head // 2)
    pairs = []
    for weight in (m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)):
        n, k = weight.shape
        x, g = torch.randn(tokens, k, device=device), torch.randn(tokens, n, device=device)
        pairs += [(x, weight.t()), (g, weight), (g.t(), x)]
    q = torch.randn(heads, c.block_size, c.head_dim, device=device)
    scores = torch.randn(heads, c.block_size, c.block_size, device=device)
    attention = 2 * [(q, q.mT), (scores, q), (scores.mT, q)]
    return pairs + c.n_layer * attention


def run_matmuls(matmuls: list, dtype: str) -> Callable[[], None]:
    """A function that computes them all, into memory that is already allocated."""
    pairs = [[matrix.to(getattr(torch, dtype)) for matrix in pair] for pair in matmuls]
    buffers = {}  # shape -> where results of that shape go
    outs = [buffers.setdefault(out.shape, out) for out in (left @ right for left, right in pairs)]

    def run() -> None:
        for (left, right), out in zip(pairs, outs, strict=True):
            torch.matmul(left, right, out=out)

    return run


# --- memory --------------------------------------------------------------------------------------


def peak_memory(config: Settings, n_vocab: int, dtypes: list[str]) -> dict[str, dict]:
    """dtype -> contender -> step_memory, each in a new process; on a Linux CPU only."""
    if config.device != "cpu" or not Path("/proc/self/status").is_file():
        return {}
    sizes = {dtype: {} for dtype in dtypes}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for dtype in dtypes:
            for name in CONTENDERS:
                size = pool.submit(step_memory, config, n_vocab, name, dtype).result()
                sizes[dtype][name] = size
                print(f"  {f'{name}, {dtype}':<50} {size / 1e6:,.0f} MB a step")
    return sizes


def step_memory(config: Settings, n_vocab: int, name: str, dtype: str) -> int:
    """What two steps add to this process's peak, in bytes."""
    step = training_step(config, build(config, n_vocab, name), dtype)
    built = peak_bytes()
    for _ in range(2):  # AdamW's moments come with the first
        step()
    return peak_bytes() - built


def peak_bytes() -> int:
    """From /proc: Linux includes the parent's peak in ru_maxrss."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])


# --- train.py's own step -------------------------------------------------------------------------


def race_own(config: Settings, dtype: str) -> dict:
    """Speeds with Muon and with AdamW alone; on a CPU also where the time with Muon goes."""
    names = ("n_layer", "n_head", "n_embd", "batch_size", "block_size", "dataset", "device", "seed")
    argv = [f"--{name}={getattr(config, name)}" for name in names]
    argv += [f"--dtype={dtype}", "--compile=False", "--dry_run"]
    calls = {}
    for optimizer in ("muon", "adamw"):
        calls[optimizer], model = own_step([*argv, f"--optimizer={optimizer}"])
    calls["matmuls"] = run_matmuls(step_matmuls(model, config.batch_size), dtype)
    seconds = measure(calls, config)
    ratios = {"muon / adamw": speed_ratio(seconds, "muon", "adamw")}
    ratios["muon: of its matmul roofline"] = speed_ratio(seconds, "muon", "matmuls")
    print(f" train.py's own step, {dtype}: Qwen3, batch included; Muon's matmuls do not count")
    tokens = config.batch_size * config.block_size
    results = report(seconds, ["muon", "adamw"], tokens, ratios)
    if config.device == "cpu":
        results["milliseconds"] = profile_kinds(calls["muon"], KINDS, 3)
        print_profile("muon", results["milliseconds"])
    return results


def own_step(argv: list[str]) -> tuple[Callable[[], None], torch.nn.Module]:
    """train.py's step on a new run's next batch, which it makes too; and the run's model."""
    run, state = training.start(argv)
    batches = training.steps(run, state)

    def step() -> None:
        with record_function("data"):
            micro, counts, _ = next(batches)
        training.train_step(run, state, micro, counts)

    return step, state.model
