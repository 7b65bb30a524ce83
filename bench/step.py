"""Training steps: speed beside Hugging Face's, share of the matmul roofline, memory, profile.

    python -m bench step --rounds=3
    python -m bench step --n_layer=6 --n_embd=512 --n_head=8 --dataset=sanguo_gpt2

First the same step with AdamW for all, on random ids: our GPT in three architectures, Hugging
Face's GPT-2 and Llama, in float32 and in what train.py takes on this device; where there is a
compiler, also compiled. The roofline of a step is the time of its matmuls alone. Then train.py's
own step on a prepared dataset, batch included, with Muon and with AdamW.
"""

import ctypes
import gc
import itertools
import multiprocessing
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
from bench.timing import FUSED, measure, print_profile, profile_kinds, report, speed_ratio
from configurator import at_least
from data_utils import open_dataset
from miniglm import compiling, devices
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
PEERS = [  # with the same matmuls
    ("ours, Qwen3", "Hugging Face, Llama"),
    ("ours, Llama", "Hugging Face, Llama"),
    ("ours, GPT-2", "Hugging Face, GPT-2"),
]
COMPILED = [
    ("ours, Qwen3, compiled", "Hugging Face, Llama"),
    ("ours, Llama, compiled", "Hugging Face, Llama"),
    ("ours, Llama, compiled", "Hugging Face, Llama, compiled"),
]
KINDS = {  # kind -> its events, forward and backward
    "head and loss": r"SummedLoss",
    "attention": r"^aten::(bmm|baddbmm|_softmax.*)$|scaled_dot_product|ScaledDotProduct",
    "Muon": r"^Optimizer\..*#Muon\.",
    "AdamW": r"^Optimizer\..*#AdamW\.",
    "data": r"^data$",
    "matmuls of the blocks": r"^aten::(mm|addmm)$",
    FUSED: r"CompiledFxGraph",
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
    peers = PEERS if compiling.what_lacks(config.device) else PEERS + COMPILED
    results = {dtype: race(config, n_vocab, dtype, peers) for dtype in dtypes}
    for dtype, memory in peak_memory(config, n_vocab, dtypes, contenders(peers)).items():
        results[dtype]["memory"] = memory
    # from here on the process keeps freed memory, as train.py does
    return results | {"train.py": {dtype: race_own(config, dtype) for dtype in dtypes}}


def dtypes_of(setting: str, device: str) -> list[str]:
    """float32, and what train.py takes by that setting of dtype if it is another."""
    own = str(pick_dtype(setting, device)).removeprefix("torch.")
    return list(dict.fromkeys(["float32", own]))


# --- the same step -------------------------------------------------------------------------------


def race(config: Settings, n_vocab: int, dtype: str, peers: list[tuple[str, str]]) -> dict:
    """The contenders in one dtype, and the matmuls of their steps."""
    calls, names = {}, contenders(peers)
    for name in names:
        model = build(config, n_vocab, name)
        calls[name] = training_step(config, model, dtype)
        if isinstance(model, GPT) and matmuls_of(name) not in calls:
            calls[matmuls_of(name)] = run_matmuls(step_matmuls(model, config.batch_size), dtype)
    seconds = measure(calls, config)
    ratios = {f"{ours} / {peer}": speed_ratio(seconds, ours, peer) for ours, peer in peers}
    for name in names:
        ratios[f"{name}: of its matmul roofline"] = speed_ratio(seconds, name, matmuls_of(name))
    print(f" {dtype}, AdamW for all")
    return report(seconds, names, config.batch_size * config.block_size, ratios)


def contenders(peers: list[tuple[str, str]]) -> list[str]:
    """Each name once: ours first, so that their matmuls are known."""
    return list(dict.fromkeys([*(ours for ours, _ in peers), *(peer for _, peer in peers)]))


def matmuls_of(name: str) -> str:
    return f"matmuls, {name.split(', ')[1]}"


def build(config: Settings, n_vocab: int, name: str) -> torch.nn.Module:
    """A contender, with random weights; compiled as train.py does it, or Hugging Face's whole."""
    torch.manual_seed(config.seed)
    who, architecture, *compiled = name.split(", ")
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    ours = ModelConfig(**shape, **ARCHITECTURES[architecture], n_vocab=n_vocab, vocab_size=n_vocab)
    model = GPT(ours) if who == "ours" else hugging_face_model(ours)
    model = model.to(config.device).train()
    if compiled and who == "ours":
        compiling.compile_blocks(model)
    elif compiled:
        model.compile()
    return model


def training_step(config: Settings, model: torch.nn.Module, dtype: str) -> Callable[[], None]:
    """A step as train.py's: forward, loss, backward, clipping, fused AdamW."""
    settings = training.Settings(optimizer="adamw")
    [optimizer] = make_optimizers(model, settings, config.device)
    n_vocab = model.config.vocab_size
    ids = torch.randint(n_vocab, (config.batch_size, config.block_size + 1), device=config.device)
    idx, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    places = torch.arange(targets.numel(), device=config.device)

    def loss() -> torch.Tensor:
        if isinstance(model, GPT):
            return next_token(model, idx, targets, places) / targets.numel()
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


def peak_memory(
    config: Settings, n_vocab: int, dtypes: list[str], names: list[str]
) -> dict[str, dict]:
    """dtype -> contender -> step_memory, each in a new process; on a Linux CPU only."""
    if config.device != "cpu" or not Path("/proc/self/status").is_file():
        return {}
    sizes = {dtype: {} for dtype in dtypes}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for dtype in dtypes:
            for name in names:
                size = pool.submit(step_memory, config, n_vocab, name, dtype).result()
                sizes[dtype][name] = size
                print(f"  {f'{name}, {dtype}':<50} {size / 1e6:,.0f} MB a step")
    return sizes


def step_memory(config: Settings, n_vocab: int, name: str, dtype: str) -> int:
    """What the third step adds to this process's memory at its peak, in bytes: the first ones bring
    AdamW's moments, and the compiler's own memory."""
    step = training_step(config, build(config, n_vocab, name), dtype)
    for _ in range(2):
        step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = devices.peak_memory("cpu")
    step()
    return devices.peak_memory("cpu") - before


# --- train.py's own step -------------------------------------------------------------------------


def race_own(config: Settings, dtype: str) -> dict:
    """Speeds with Muon and with AdamW alone; on a CPU also where the time with Muon goes."""
    names = ("n_layer", "n_head", "n_embd", "batch_size", "block_size", "dataset", "device", "seed")
    argv = [f"--{name}={getattr(config, name)}" for name in names]
    argv += [f"--dtype={dtype}", "--dry_run"]
    calls = {}
    for optimizer, compiles in itertools.product(("muon", "adamw"), (False, True)):
        words = [*argv, f"--optimizer={optimizer}", f"--compile={compiles}"]
        calls[optimizer + compiles * ", compiled"], model = own_step(words)
    calls["matmuls"] = run_matmuls(step_matmuls(model, config.batch_size), dtype)
    seconds = measure(calls, config)
    names = [name for name in calls if name != "matmuls"]
    ratios = {
        f"{name}: of its matmul roofline": speed_ratio(seconds, name, "matmuls") for name in names
    }
    ratios |= {"muon / adamw": speed_ratio(seconds, "muon", "adamw")}
    ratios |= {"compiled / not, muon": speed_ratio(seconds, "muon, compiled", "muon")}
    print(f" train.py's own step, {dtype}: Qwen3, batch included; Muon's matmuls do not count")
    tokens = config.batch_size * config.block_size
    results = report(seconds, names, tokens, ratios)
    if config.device == "cpu":
        for name in ("muon", "muon, compiled"):
            results[f"milliseconds, {name}"] = profile_kinds(calls[name], KINDS, 3)
            print_profile(name, results[f"milliseconds, {name}"])
    return results


def own_step(argv: list[str]) -> tuple[Callable[[], None], torch.nn.Module]:
    """train.py's step on a new run's next batch, which it makes too; and the run's model."""
    run, state = training.start(argv)
    if run.config.compile:
        compiling.compile_blocks(state.model)
    batches = training.steps(run, state)

    def step() -> None:
        with record_function("data"):
            micro, counts, _ = next(batches)
        training.train_step(run, state, micro, counts)

    return step, state.model
