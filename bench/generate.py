"""The speed of generation: beside Hugging Face's and llama.cpp's, beside recomputing, beside
memory's own rate."""

import copy
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from bench.llama import LlamaCpp
from bench.peers import with_our_weights
from bench.timing import measure, report, speed_ratio
from configurator import ROOT, UserError, repo_path
from export import write_gguf
from miniglm.checkpoint import load_checkpoint
from miniglm.decoding import Int8Linear, PackedLinear, pack, quantize
from miniglm.generation import Sampling, generate
from miniglm.text import load_for_sampling, stream
from model import GPT, ModelConfig

MEMORY = 2**29  # bytes whose reading is timed
KINDS = {
    "products": r"^mkldnn::|^aten::linear$",
    "attention": r"scaled_dot_product",
    "norms": r"vector_norm|square_|rsqrt_|aten::add_$",
    "choice of the id": r"argmax|aten::item",
}
TIE = 1e-4  # two best logits nearer than this may change places between implementations


def bench_generate(config) -> dict:
    """Greedy ids of one prompt and of many: our cache in float32 and with weights of 8 bits,
    recomputing, and Hugging Face's on the same weights; ids are compared first."""
    model = random_model(config).to(config.device).eval()
    peer = with_our_weights(model)
    n_weights = sum(p.numel() for p in model.blocks.parameters()) + model.lm_head.weight.numel()
    models = {"ours": pack(copy.deepcopy(model))}
    if config.device == "cpu":
        models["ours, int8"] = quantize(copy.deepcopy(model))
    print(
        f"generate: {config.n_layer} layers x {config.n_embd}, {config.n_head} heads, "
        f"{model.config.n_kv_head} for keys and values, vocabulary {config.vocab_size}, "
        f"prompts of {config.prompt_tokens} tokens, {config.rounds} turns each"
    )
    one = one_prompt(config, model, models, peer, 4 * n_weights)
    return {"one": one, "many": many_prompts(config, model, models, peer)}


def one_prompt(config, model: GPT, models: dict[str, GPT], peer, weights: int) -> dict:
    """weights: bytes that each token reads of them in float32."""
    n, prompts = config.new_tokens, random_prompts(config, 1)
    ways = {name: ours(one, prompts, n) for name, one in models.items()}
    ways["Hugging Face"] = hugging_face(peer, prompts, n)
    idx = torch.tensor(prompts, device=config.device)
    ways["recomputing"] = lambda: [recompute(model, idx, n)]
    compare(model, prompts, {name: way for name, way in ways.items() if "int8" not in name})
    memory = torch.ones(MEMORY // 4, device=config.device)
    alone = {}
    if config.device == "cpu":
        alone = {f"products of {name} alone": products(one, n) for name, one in models.items()}
    calls = ways | alone | {"memory read": memory.sum}
    seconds = measure(calls, config.rounds, config.clock, config.device)
    c = model.config
    cache = 4 * 2 * c.n_layer * c.n_kv_head * c.head_dim * (config.prompt_tokens + n / 2)
    ratios = {
        "ours / Hugging Face": speed_ratio(seconds, "ours", "Hugging Face"),
        "ours / recomputing": speed_ratio(seconds, "ours", "recomputing"),
        "ours, share of memory's rate": speed_ratio(
            seconds, "ours", "memory read", n * (weights + cache) / MEMORY
        ),
    }
    for name in models if alone else ():
        other = f"products of {name} alone"
        ratios[f"{name}: its products' share"] = speed_ratio(seconds, name, other)
    if "ours, int8" in models:
        ratios["ours, int8 / ours"] = speed_ratio(seconds, "ours, int8", "ours")
    print(f" one prompt, {n} tokens")
    results = report(seconds, list(ways), n, ratios)
    rate = MEMORY / median(seconds["memory read"])
    print(f"  memory is read at {rate / 1e9:.1f} GB/s, a token reads {weights / 1e6:.1f} MB")
    if config.device == "cpu" and weights < processor_cache():
        size = processor_cache() / 1e6
        print(f"  they fit in the processor's cache of {size:.1f} MB: memory is not the limit")
    times = {}
    if config.device == "cpu":
        times = by_operation(ways["ours"], n)
        parts = ", ".join(f"{kind} {microseconds:.0f}" for kind, microseconds in times.items())
        print(f"  microseconds of a token, under the profiler: {parts}")
    embeddings = 4 * model.wte.weight.numel()  # stored beside a tied head once matrices are packed
    sizes = {"ours": embeddings + weights, "ours, int8": embeddings + weights // 4}
    for name in models:
        print(f"  weights of {name} in memory: {sizes[name] / 1e6:.1f} MB")
    return results | {
        "microseconds": times,
        "memory_bytes_per_second": rate,
        "weight_bytes": weights,
        "mean_cache_bytes": cache,
        "processor_cache_bytes": processor_cache(),
    }


def many_prompts(config, model: GPT, models: dict[str, GPT], peer) -> dict:
    n, prompts = max(1, config.new_tokens // 4), random_prompts(config, config.prompts)
    ways = {name: ours(one, prompts, n) for name, one in models.items()}
    ways["Hugging Face"] = hugging_face(peer, prompts, n)
    compare(model, prompts, {name: way for name, way in ways.items() if "int8" not in name})
    seconds = measure(ways, config.rounds, config.clock, config.device)
    ratios = {"ours / Hugging Face": speed_ratio(seconds, "ours", "Hugging Face")}
    if "ours, int8" in models:
        ratios["ours, int8 / ours"] = speed_ratio(seconds, "ours, int8", "ours")
    print(f" {len(prompts)} prompts, {n} tokens each")
    return report(seconds, list(ways), n * len(prompts), ratios)


# --- contenders --------------------------------------------------------------------------------


def random_model(config) -> GPT:
    """Our default architecture, with random weights that do not repeat one token forever."""
    torch.manual_seed(config.seed)
    model = GPT(
        ModelConfig(
            block_size=max(1024, config.prompt_tokens + config.new_tokens),  # nothing is cut
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_kv_head=config.n_kv_head,
            n_embd=config.n_embd,
            n_vocab=config.vocab_size,
            vocab_size=config.vocab_size,
            init="gpt2",
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(5)
    return model


def random_prompts(config, count: int) -> list[list[int]]:
    return torch.randint(config.vocab_size, (count, config.prompt_tokens)).tolist()


def ours(model: GPT, prompts: list[list[int]], n: int) -> Callable[[], list[list[int]]]:
    sampling = Sampling(max_new_tokens=n, temperature=0.0)

    def run() -> list[list[int]]:
        rows = [[] for _ in prompts]
        for step in generate(model, prompts, sampling):
            for row, id in step:
                rows[row].append(id)
        return rows

    return run


def hugging_face(peer, prompts: list[list[int]], n: int) -> Callable[[], list[list[int]]]:
    idx = torch.tensor(prompts, device=peer.device)
    way = {"do_sample": False, "min_new_tokens": n, "max_new_tokens": n}
    way |= {"attention_mask": torch.ones_like(idx)}
    return lambda: peer.generate(idx, **way)[:, idx.shape[1] :].tolist()


@torch.inference_mode()
def recompute(model: GPT, idx: torch.Tensor, n: int) -> list[int]:
    """Greedy ids that follow idx (1, T), the whole text read anew for each."""
    T = idx.shape[1]
    for _ in range(n):
        best = model.head(model(idx)[:, -1]).argmax(dim=-1, keepdim=True)
        idx = torch.cat([idx, best], dim=1)
    return idx[0, T:].tolist()


def products(model: GPT, n: int) -> Callable[[], None]:
    """The products of weights with one row that n tokens need, and nothing else."""
    linears = [m for m in model.modules() if isinstance(m, PackedLinear | Int8Linear)]
    pairs = [(linear.forward, torch.randn(1, linear.in_features)) for linear in linears]

    @torch.inference_mode()
    def run() -> None:
        for _ in range(n):
            for product, x in pairs:
                product(x)

    return run


def by_operation(run: Callable[[], object], n: int) -> dict[str, float]:
    """Microseconds of each of n tokens by kind of operation; the profiler lengthens small ones."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        run()
        wall = time.perf_counter() - began
    times = dict.fromkeys([*KINDS, "other operations", "Python"], 0.0)
    for event in profiled.events():
        if event.cpu_parent is None:  # what is inside another counts as that
            kinds = (kind for kind, names in KINDS.items() if re.search(names, event.name))
            times[next(kinds, "other operations")] += event.cpu_time_total / n
    times["Python"] = 1e6 * wall / n - sum(times.values())
    return times


def compare(model: GPT, prompts: list[list[int]], ways: dict[str, Callable]) -> None:
    """AssertionError where two ways give a row other ids before the first near tie."""
    first, *others = ways
    rows = ways[first]()
    for name in others:
        for prompt, wanted, ids in zip(prompts, rows, ways[name](), strict=True):
            compared = untied_length(model, prompt, wanted)
            assert ids[:compared] == wanted[:compared], f"{name} has other ids than {first}"


@torch.inference_mode()
def untied_length(model: GPT, prompt: list[int], ids: list[int]) -> int:
    """How many of the greedy ids come before the first whose two best logits are a tie."""
    idx = torch.tensor([prompt + ids], device=model.wte.weight.device)
    best = model.head(model(idx)[0, len(prompt) - 1 : -1]).topk(2).values
    ties = (best[:, 0] - best[:, 1] < TIE).nonzero()
    return int(ties[0]) if len(ties) else len(ids)


def processor_cache() -> int:
    """Bytes of the largest cache that Linux tells of; 0 where it does not."""
    units = {"K": 2**10, "M": 2**20}
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [path.read_text(encoding="utf-8").strip() for path in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts), default=0)


# --- llama.cpp ---------------------------------------------------------------------------------


def bench_llama(config) -> dict:
    """Greedy ids of one prompt by sample.py and by llama.cpp, on the same weights of an out_dir in
    float32, with as many threads as torch has; ids are compared first."""
    if not config.llama_cpp or config.clock == "cpu":
        raise UserError(
            "llama takes --llama_cpp=, the python of an environment with llama-cpp-python "
            "(bench/llama.py says how to build one), and --clock=wall"
        )
    checkpoint = load_for_sampling(config.out_dir, "cpu")
    unpacked = load_checkpoint(repo_path(config.out_dir))
    plain, c = unpacked.model, checkpoint.model.config
    n = min(config.new_tokens, c.block_size - config.prompt_tokens)
    if n < 1:
        raise UserError(f"prompt_tokens={config.prompt_tokens} must be below {c.block_size}")
    checkpoint.tokenizer.stop_ids = ()  # n tokens, whatever they are
    torch.manual_seed(config.seed)
    prompt = torch.randint(c.n_vocab, (config.prompt_tokens,)).tolist()
    sampling = Sampling(max_new_tokens=n, temperature=0.0)
    print(
        f"llama: {config.out_dir}, {c.n_layer} layers x {c.n_embd}, {plain.n_params() / 1e6:.2f}M "
        f"parameters, one prompt of {len(prompt)} tokens, {n} more, {torch.get_num_threads()} "
        f"threads, {config.rounds} turns each"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(unpacked, file)
        with LlamaCpp(config.llama_cpp, file, len(prompt) + n, torch.get_num_threads()) as llama:
            ways = {
                "sample.py": lambda: list(stream(checkpoint, prompt, sampling)),
                "llama.cpp": lambda: llama.ask("greedy", ids=prompt, n=n),
            }
            ids = {
                "sample.py": ours(checkpoint.model, [prompt], n),
                "llama.cpp": lambda: [llama.ask("greedy", ids=prompt, n=n)],
            }
            compare(plain, [prompt], ids)
            seconds = measure(ways, config.rounds, config.clock, "cpu")
    ratios = {"sample.py / llama.cpp": speed_ratio(seconds, "sample.py", "llama.cpp")}
    return report(seconds, list(ways), n, ratios) | {"threads": torch.get_num_threads()}


# --- start -------------------------------------------------------------------------------------

START = """
import sys, time
began = time.perf_counter()
import torch
laps = {"import torch": time.perf_counter()}
import sample, watch
laps["other imports"] = time.perf_counter()
checkpoint = sample.load_for_sampling(sys.argv[1], sys.argv[2])
laps["load"] = time.perf_counter()
text = "却说"
prompt = sample.prompt_ids(checkpoint, text)
sampling = sample.default_temperature(checkpoint, sample.Sampling())
pieces = sample.stream(checkpoint, prompt, sampling)
while not next(pieces):
    pass
laps["first character"] = time.perf_counter()
seconds = {"interpreter": watch.process_seconds() - (time.perf_counter() - began)}
for name, now in laps.items():
    seconds[name], began = now - began, now
import json
print(json.dumps(seconds))
"""


def bench_start(config) -> dict:
    """From the command to the first character of a model's own text, and what it is made of."""
    turns = []
    for _ in range(config.rounds + 1):
        words = [sys.executable, "-c", START, config.out_dir, config.device]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise UserError((done.stderr.strip().splitlines() or ["it ended"])[-1])
        turns.append(json.loads(done.stdout.splitlines()[-1]))
    turns = turns[1:]  # the first reads files from the disk
    seconds = {name: median(turn[name] for turn in turns) for name in turns[0]}
    total = median(sum(turn.values()) for turn in turns)
    parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    print(f"start: first character of {config.out_dir} after {total:.2f} s: {parts}")
    return {"seconds": total, "parts": seconds}
