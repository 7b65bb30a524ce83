"""Speed beside Hugging Face's, and what a recipe reaches in a given time. Needs requirements-dev.txt.

    python bench.py                          train, then generate
    python bench.py train --n_layer=6 --n_embd=512 --n_head=8
    python bench.py recipe --seconds=240     the demonstration against the reference

Figures are ratios within one run, since machines differ and are shared: the contenders take turns
(A B A B ...), medians are compared, and the range is that of the ratios turn by turn. A training
step counts as 6 x parameters in matrix products (with the head, without the look-up of embeddings)
x tokens + 12 x n_layer x n_embd x T x tokens / 2 (causal attention) floating-point operations,
a decoding step as one reading of all weights and of the cache at its mean length.
"""

import dataclasses
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

import train as training
from checkpoint import environment, read_log, read_run
from configurator import (
    ROOT,
    UserError,
    command,
    configure,
    nearest,
    repo_path,
    show_path,
    written_aside,
)
from model import GPT, ModelConfig, pick_device
from objectives import count_terms, next_token, target_losses, to_device
from sample import Sampling, generate

GPT2 = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "qk_norm": False}
GPT2["norm_eps"] = 1e-5
TIE = 1e-4  # two best logits nearer than this may change places between implementations
EVALUATION_SHARE = 0.25  # of a recipe's time, at most
PREPARE = {
    "sanguo": "data/sanguo/prepare.py",
    "sanguo_gpt2": "data/sanguo/prepare.py --tokenizer=gpt2 --out=data/sanguo_gpt2",
}

Seconds = dict[str, list[float]]  # of each contender, turn by turn


@dataclass
class Settings:
    names: list[str] = field(default_factory=list)  # train, generate, recipe; none: the first two
    n_layer: int = 4  # blocks, in train and generate; recipe has the demonstration's
    n_head: int = 4  # heads
    n_embd: int = 256  # width
    vocab_size: int = 4096  # ids
    batch_size: int = 16  # rows of a training step
    block_size: int = 256  # tokens of a training row
    prompt_tokens: int = 16  # that generation starts from
    new_tokens: int = 512  # that generation adds
    rounds: int = 7  # turns of each contender, after one to warm up
    seconds: float = 240  # of each recipe's run, evaluations included
    evaluations: int = 6  # of each recipe's run, fewer where they take over a quarter of its time
    runs: str = "bench-recipe"  # where the recipes train
    out: str = "bench-results"  # where figures are written, a .json a part
    seed: int = 1337  # of weights and ids
    device: str = "cpu"  # cuda, mps, cpu; all in float32, not compiled

    def __post_init__(self):
        for name in self.names:
            if name not in PARTS:
                near = nearest(name, PARTS) or f"; there are {', '.join(PARTS)}"
                raise UserError(f"unknown part {name!r}{near}")
        for name in ("vocab_size", "batch_size", "prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.seconds <= 0 or self.evaluations < 1:
            raise UserError("seconds must be above 0, and evaluations 1 or more")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    config.device = pick_device(config.device)
    for name in config.names or ["train", "generate"]:
        results = PARTS[name](config)
        record = {
            "part": name,
            "environment": environment(config.device),
            "settings": dataclasses.asdict(config),
            "results": results,
        }
        path = repo_path(config.out) / f"{name}.json"
        with written_aside(path) as aside:
            aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written to {show_path(path)}\n")


# --- timing ------------------------------------------------------------------------------------


def measure(contenders: dict[str, Callable[[], object]], rounds: int, device: str) -> Seconds:
    """Seconds of each contender, which take turns; the first turn is not counted."""
    seconds = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if device != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: turns[1:] for name, turns in seconds.items()}


def speed_ratio(seconds: Seconds, ours: str, other: str, factor: float = 1.0) -> dict[str, float]:
    """How many times as fast ours is as the other one, times factor: of medians, and the range."""
    turns = [factor * b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]
    ratio = factor * statistics.median(seconds[other]) / statistics.median(seconds[ours])
    return {"ratio": ratio, "min": min(turns), "max": max(turns)}


def show_ratio(label: str, ratio: dict[str, float], note: str = "") -> None:
    """Prints one line: a ratio and its range."""
    span = f"({ratio['min']:.3g} to {ratio['max']:.3g})"
    print(f"  {label:<46} {ratio['ratio']:.3g} {span}{note}")


def show_speed(seconds: Seconds, tokens: int) -> dict[str, float]:
    """Prints and returns the median tokens per second of each contender."""
    speeds = {name: tokens / statistics.median(turns) for name, turns in seconds.items()}
    for name, speed in speeds.items():
        print(f"  {name:<46} {speed:,.0f} tokens per second")
    return speeds


# --- train -------------------------------------------------------------------------------------


def bench_train(config: Settings) -> dict:
    """Training steps of our GPT in GPT-2's shape, of Hugging Face's GPT-2, of our default."""
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    vocab = {"n_vocab": config.vocab_size, "vocab_size": config.vocab_size}
    torch.manual_seed(config.seed)
    models = {
        "ours, GPT-2's shape": GPT(ModelConfig(**shape, **vocab, **GPT2)),
        "Hugging Face, GPT-2": hugging_face_gpt2(shape, config.vocab_size),
        "ours, default architecture": GPT(ModelConfig(**shape, **vocab)),
    }
    ours, peer, default = models
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert sizes[ours] == sizes[peer], sizes
    window = torch.randint(
        config.vocab_size, (config.batch_size, config.block_size + 1), device=config.device
    )
    batch = window[:, :-1], window[:, 1:]

    def our_loss(model: GPT) -> torch.Tensor:
        return next_token(model, batch)["next_token"] / batch[1].numel()

    def peer_loss(model: torch.nn.Module) -> torch.Tensor:
        return model(input_ids=batch[0], labels=batch[0], use_cache=False).loss

    contenders = {
        name: training_step(model, peer_loss if name == peer else our_loss, config.device)
        for name, model in models.items()
    }
    square = torch.randn(2048, 2048, device=config.device)
    contenders["matrix product"] = lambda: square @ square
    seconds = measure(contenders, config.rounds, config.device)
    rate = 2 * 2048**3 / statistics.median(seconds["matrix product"])  # operations per second
    tokens = batch[0].numel()
    print(
        f"train: {config.n_layer} layers, {config.n_embd} wide, vocabulary {config.vocab_size}, "
        f"{config.batch_size} x {config.block_size} tokens a step, medians of {config.rounds}"
    )
    speeds = show_speed({name: seconds[name] for name in models}, tokens)
    results = {
        "tokens_per_second": speeds,
        "seconds": seconds,
        "parameters": sizes,
        "matrix_product_flops_per_second": rate,
        "ours_to_hugging_face": speed_ratio(seconds, ours, peer),
        "default_to_hugging_face": speed_ratio(seconds, default, peer),
    }
    show_ratio("ours / Hugging Face, same shape", results["ours_to_hugging_face"])
    show_ratio("ours, default / Hugging Face, GPT-2", results["default_to_hugging_face"])
    results["share_of_matrix_product_rate"] = {}
    for name in (ours, default):
        share = step_flops(models[name], tokens) / (2 * 2048**3)
        ratio = speed_ratio(seconds, name, "matrix product", share)
        results["share_of_matrix_product_rate"][name] = ratio
        show_ratio(f"share of {rate / 1e9:,.0f} GFLOP/s, {name}", ratio)
    return results


def training_step(model: torch.nn.Module, loss: Callable, device: str) -> Callable[[], None]:
    """A step as train.py's: forward, loss, backward, clipping, fused AdamW."""
    settings = training.Settings()
    model.to(device).train()
    optimizer = training.make_optimizer(model, settings, device)

    def step() -> None:
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_flops(model: GPT, tokens: int) -> float:
    """Floating-point operations of a training step, as the head of this file counts them."""
    c = model.config
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() >= 2)
    matrices += model.lm_head.weight.numel()
    return 6 * matrices * tokens + 12 * c.n_layer * c.n_embd * c.block_size * tokens / 2


# --- generate ----------------------------------------------------------------------------------


def bench_generate(config: Settings) -> dict:
    """Greedy generation by our cache, by recomputing, and by Hugging Face on the same weights."""
    torch.manual_seed(config.seed)
    length = config.prompt_tokens + config.new_tokens
    model = GPT(
        ModelConfig(
            block_size=max(1024, length),  # so that nothing is cut
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_vocab=config.vocab_size,
            vocab_size=config.vocab_size,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(5)  # fresh weights would repeat one token forever
    model.to(config.device).eval()
    peer = hugging_face_qwen3(model)
    prompt = torch.randint(config.vocab_size, (config.prompt_tokens,)).tolist()
    sampling = Sampling(max_new_tokens=config.new_tokens, temperature=0.0)
    ids = {}

    def cached() -> None:
        ids[ours] = [id for [(_, id)] in generate(model, [prompt], sampling)]

    def recomputed() -> None:
        ids["ours, recomputing"] = recompute(model, prompt, config.new_tokens)

    def hugging_face() -> None:
        idx = torch.tensor([prompt], device=config.device)
        n = config.new_tokens
        out = peer.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            do_sample=False,
            min_new_tokens=n,
            max_new_tokens=n,
        )
        ids[other] = out[0, len(prompt) :].tolist()

    ours, other = "ours, cache", "Hugging Face, cache"
    memory = torch.ones(64 * 2**20, device=config.device)  # 256 MB
    contenders = {ours: cached, "ours, recomputing": recomputed, other: hugging_face}
    names = list(contenders)
    contenders["memory read"] = memory.sum
    seconds = measure(contenders, config.rounds, config.device)
    compared = untied_length(model, prompt, ids[ours])
    for name in names:
        assert ids[name][:compared] == ids[ours][:compared], f"{name} has other ids"
    print(
        f"generate: {config.n_layer} layers, {config.n_embd} wide, {config.new_tokens} tokens "
        f"after {config.prompt_tokens}, one row, medians of {config.rounds}; the same ids in "
        f"{compared} of {config.new_tokens} places"
    )
    c = model.config
    weights = 4 * model.n_params()
    mean_length = config.prompt_tokens + config.new_tokens / 2
    cache = 4 * 2 * c.n_layer * c.n_kv_head * c.head_dim * mean_length
    bytes_read = config.new_tokens * (weights + cache)
    rate = 4 * memory.numel() / statistics.median(seconds["memory read"])
    share = speed_ratio(seconds, ours, "memory read", bytes_read / (4 * memory.numel()))
    results = {
        "tokens_per_second": show_speed({n: seconds[n] for n in names}, config.new_tokens),
        "seconds": seconds,
        "ids_compared": compared,
        "weight_bytes": weights,
        "mean_cache_bytes": cache,
        "memory_bytes_per_second": rate,
        "cache_bytes_of_processor": processor_cache() if config.device == "cpu" else 0,
        "ours_to_hugging_face": speed_ratio(seconds, ours, other),
        "cache_to_recomputing": speed_ratio(seconds, ours, "ours, recomputing"),
        "share_of_memory_rate": share,
    }
    show_ratio("ours / Hugging Face, both cached", results["ours_to_hugging_face"])
    show_ratio("ours, cache / recomputing", results["cache_to_recomputing"])
    show_ratio(f"share of {rate / 1e9:.1f} GB/s of memory, ours, cache", share)
    if weights < results["cache_bytes_of_processor"]:
        print(
            f"  the weights, {weights / 1e6:.1f} MB, fit in the processor's cache of "
            f"{results['cache_bytes_of_processor'] / 1e6:.1f} MB: memory is not their limit"
        )
    return results


@torch.inference_mode()
def recompute(model: GPT, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy ids, the whole text read anew for each."""
    idx = torch.tensor([prompt], device=model.wte.weight.device)
    for _ in range(max_new_tokens):
        logits = model.head(model(idx)[:, -1])
        idx = torch.cat([idx, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return idx[0, len(prompt) :].tolist()


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


# --- Hugging Face ------------------------------------------------------------------------------


def import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "transformers is not installed; run pip install -r requirements-dev.txt"
        ) from None
    return transformers


def hugging_face_gpt2(shape: dict[str, int], vocab_size: int) -> torch.nn.Module:
    """A GPT2LMHeadModel of our shape, without dropout."""
    transformers = import_transformers()
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab_size,
            n_positions=shape["block_size"],
            n_layer=shape["n_layer"],
            n_head=shape["n_head"],
            n_embd=shape["n_embd"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    )


def hugging_face_qwen3(model: GPT) -> torch.nn.Module:
    """A Qwen3ForCausalLM in eval mode, of our default architecture and with our weights."""
    transformers = import_transformers()
    c = model.config
    config = transformers.Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.n_hidden,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_weights,
        attn_implementation="sdpa",
    )
    weights = {
        "model.embed_tokens.weight": model.wte.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    kv = c.n_kv_head * c.head_dim
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attn.c_attn.weight.split([c.n_embd, kv, kv])
        gate, up = block.mlp.c_fc.weight.chunk(2)
        of_layer = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attn.c_proj.weight,
            "self_attn.q_norm": block.attn.q_norm.weight,
            "self_attn.k_norm": block.attn.k_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.mlp.c_proj.weight,
            "input_layernorm": block.norm_1.weight,
            "post_attention_layernorm": block.norm_2.weight,
        }
        weights |= {f"model.layers.{layer}.{name}.weight": w for name, w in of_layer.items()}
    peer = transformers.Qwen3ForCausalLM(config)
    peer.load_state_dict(weights)
    return peer.to(model.wte.weight.device).eval()


# --- recipe ------------------------------------------------------------------------------------


def recipes() -> dict[str, list[str]]:
    """train.py's words for the demonstration, and for the reference at the same depth and width."""
    demonstration = ["config/pretrain_sanguo.py"]
    settings = configure(training.Settings, demonstration)
    shape = [f"--{name}={getattr(settings, name)}" for name in ("n_layer", "n_head", "n_embd")]
    reference = ["config/pretrain_sanguo_reference.py", *shape]
    return {"demonstration": demonstration, "reference": reference}


def bench_recipe(config: Settings, contenders: dict[str, list[str]] | None = None) -> dict:
    """Trains each recipe for the same time, one after the other -> bits per byte; and a picture.

    contenders: train.py's words of each; the second one's bits are divided by the first one's.
    """
    words = contenders or recipes()
    plans = plan(config, words)
    results = {}
    for name, argv in words.items():
        out_dir = repo_path(config.runs) / name
        shutil.rmtree(out_dir, ignore_errors=True)
        run_script("train.py", *argv, *plans[name], f"--out_dir={out_dir}")
        bits = [r["val_bits_per_byte"] for r in read_log(out_dir) if "val_bits_per_byte" in r]
        progress = read_run(out_dir, "latest")["progress"]
        results[name] = {
            "steps": progress["iter"],
            "seconds": progress["seconds"],
            "evaluations": len(bits),
            "bits_per_byte_at_end": bits[-1],
            "bits_per_byte_best": min(bits),
            "command": ["train.py", *argv, *plans[name]],
        }
    print(f"recipe: {config.seconds:.0f} s each, evaluations included; validation bits per byte")
    for name, run in results.items():
        print(
            f"  {name:<14} {run['steps']:>6} steps in {run['seconds']:.0f} s: "
            f"{run['bits_per_byte_at_end']:.3f} at the end, {run['bits_per_byte_best']:.3f} best"
        )
    ours, other = (run["bits_per_byte_best"] for run in results.values())
    first, second = results
    print(f"  {second} / {first}, best: {other / ours:.3f}")
    picture = repo_path(config.runs) / "curves.png"
    run_script(
        "visualize.py",
        f"--runs={','.join(str(repo_path(config.runs) / name) for name in words)}",
        "--x=seconds",
        "--y=bits_per_byte",
        f"--out={picture}",
    )
    return {"runs": results, "best_bits_other_to_first": other / ours}


def plan(config: Settings, words: dict[str, list[str]]) -> dict[str, list[str]]:
    """For each recipe, the flags with which train.py takes config.seconds, from steps measured."""
    timed, runs, parts = {}, {}, {}
    for name, argv in words.items():
        check_dataset(configure(training.Settings, argv).dataset)
        # a dry run may start where an out_dir holds another run
        run = training.start([*argv, f"--out_dir={config.runs}/{name}", "--dry_run"])
        runs[name] = run
        rows = run.data.eval_batches("val", run.config.block_size, run.config.batch_size)
        part = next(rows)
        parts[name] = count_terms([part])["next_token"] / (len(run.data.tokens["val"]) - 1)
        timed[f"{name} step"] = stepper(run)
        batch = to_device(part, run.device)
        timed[f"{name} evaluation"] = lambda run=run, batch=batch: target_losses(run.model, batch)
    device = next(iter(runs.values())).device
    seconds = measure(timed, min(3, config.rounds), device)
    return {
        name: flags(
            config,
            run.config,
            statistics.median(seconds[f"{name} step"]),
            statistics.median(seconds[f"{name} evaluation"]) / parts[name],
        )
        for name, run in runs.items()
    }


def stepper(run: training.Run) -> Callable[[], object]:
    """A call of it is one real step of the run, on its next batch."""
    batches = training.step_batches(run)

    def step() -> None:
        micro, counts, _ = next(batches)
        training.train_step(run, micro, counts)

    return step


def flags(
    config: Settings, settings: training.Settings, step: float, evaluation: float
) -> list[str]:
    """How many steps and evaluations fit, given the seconds of one of each."""
    affordable = int(EVALUATION_SHARE * config.seconds / evaluation)
    evaluations = max(1, min(config.evaluations, affordable))
    max_iters = max(1, int((config.seconds - evaluations * evaluation) / step))
    return [
        f"--max_iters={max_iters}",
        f"--eval_interval={math.ceil(max_iters / evaluations)}",
        f"--lr_decay_iters={max_iters}",
        # warm-up is a tenth of a run that is short
        f"--warmup_iters={min(settings.warmup_iters, math.ceil(max_iters / 10))}",
        f"--log_interval={max(1, min(settings.log_interval, max_iters // 10))}",
    ]


def check_dataset(name: str) -> None:
    if name in PREPARE and not (ROOT / "data" / name / "meta.json").is_file():
        raise UserError(f"data/{name} is not prepared; run python {PREPARE[name]}")


def run_script(name: str, *words: str) -> None:
    """Runs a script of this repository; UserError where it fails."""
    code = subprocess.run([sys.executable, str(ROOT / name), *words], cwd=ROOT).returncode
    if code:
        raise UserError(f"{name} stopped with exit code {code}; what it said is above")


PARTS = {"train": bench_train, "generate": bench_generate, "recipe": bench_recipe}


if __name__ == "__main__":
    command(main)
