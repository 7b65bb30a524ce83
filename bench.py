"""Speed beside Hugging Face's, and what a recipe reaches in a given time.

    pip install -r requirements-dev.txt
    python bench.py                          train, then generate
    python bench.py train --n_layer=6 --n_embd=512 --n_head=8
    python bench.py recipe --seconds=240     the demonstration against the reference

Figures are ratios within one run, since machines differ and are shared: the contenders take turns
(A B A B ...), medians are compared, and the range is that of the ratios turn by turn. On a busy
machine, OMP_NUM_THREADS=1 and --clock=cpu leave most of the neighbours' work out.

A training step counts as GPT.flops_per_token has it; a decoding step as one reading of all weights,
and of the cache at its mean length.
"""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Literal

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

GPT2_SHAPE = {
    "position": "learned",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "mlp": "gelu",
    "bias": True,
    "qk_norm": False,
}
SIDE = 2048  # of the square matrices whose product is timed
MEMORY = 2**28  # bytes whose reading is timed
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
    clock: Literal["wall", "cpu"] = "wall"  # cpu: the time of this process, on all its threads
    seconds: float = 240.0  # of each recipe's run, evaluations included
    evaluations: int = 6  # of each recipe's run; fewer where they took over a quarter of its time
    runs: str = "bench-recipe"  # where the recipes train
    out: str = "bench-results"  # where figures are written, a .json a part
    seed: int = 1337  # of weights and ids
    device: str = "cpu"  # of train and generate, in float32, not compiled

    def __post_init__(self):
        for name in self.names:
            if name not in PARTS:
                near = nearest(name, PARTS) or f"; there are {', '.join(PARTS)}"
                raise UserError(f"unknown part {name!r}{near}")
        for name in ("batch_size", "prompt_tokens", "new_tokens", "rounds", "evaluations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    config.device = pick_device(config.device)
    if config.names != ["recipe"]:
        import_transformers()  # before anything long
    for name in config.names or ["train", "generate"]:
        record = {
            "part": name,
            "environment": environment(config.device),
            "settings": dataclasses.asdict(config),
            "results": PARTS[name](config),
        }
        path = repo_path(config.out) / f"{name}.json"
        with written_aside(path) as aside:
            aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"  written to {show_path(path)}\n")


# --- timing ------------------------------------------------------------------------------------


def measure(contenders: dict[str, Callable], rounds: int, clock: str, device: str) -> Seconds:
    """Seconds of each contender's calls, which take turns; the first turn is not counted."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            began = now()
            run()
            if device != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(now() - began)
    return {name: turns[1:] for name, turns in seconds.items()}


def speed_ratio(seconds: Seconds, ours: str, other: str, work: float = 1.0) -> dict[str, float]:
    """ours' speed / other's, of the medians and the range; work: ours' in a turn over other's."""
    turns = [work * b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]
    ratio = work * median(seconds[other]) / median(seconds[ours])
    return {"ratio": ratio, "min": min(turns), "max": max(turns)}


def report(seconds: Seconds, names: list[str], tokens: int, ratios: dict[str, dict]) -> dict:
    """Prints and returns the speeds of the contenders that are named, and the ratios."""
    speeds = {name: tokens / median(seconds[name]) for name in names}
    for name, speed in speeds.items():
        print(f"  {name:<50} {speed:,.0f} tokens per second")
    for label, of in ratios.items():
        print(f"  {label:<50} {of['ratio']:.3g} ({of['min']:.3g} to {of['max']:.3g})")
    return {"tokens_per_second": speeds, "ratios": ratios, "seconds": seconds}


# --- train -------------------------------------------------------------------------------------


def bench_train(config: Settings) -> dict:
    """Training steps of our GPT in GPT-2's shape, of Hugging Face's GPT-2, of our default."""
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    vocab = {"n_vocab": config.vocab_size, "vocab_size": config.vocab_size}
    torch.manual_seed(config.seed)
    models = {
        "ours, GPT-2's shape": GPT(ModelConfig(**shape, **vocab, **GPT2_SHAPE)),
        "Hugging Face, GPT-2": hugging_face_gpt2(config),
        "ours, default architecture": GPT(ModelConfig(**shape, **vocab)),
    }
    ours, peer, default = models
    assert models[ours].n_params() == sum(p.numel() for p in models[peer].parameters())
    ids = torch.randint(config.vocab_size, (config.batch_size, config.block_size + 1))
    idx, targets = (part.to(config.device) for part in (ids[:, :-1], ids[:, 1:]))
    size = targets.numel()
    losses = {
        ours: lambda: next_token(models[ours], (idx, targets))["next_token"] / size,
        peer: lambda: models[peer](input_ids=idx, labels=idx, use_cache=False).loss,
        default: lambda: next_token(models[default], (idx, targets))["next_token"] / size,
    }
    steps = {name: training_step(models[name], losses[name], config.device) for name in models}
    square = torch.randn(SIDE, SIDE, device=config.device)
    product = "matrix product"
    steps[product] = lambda: square @ square
    seconds = measure(steps, config.rounds, config.clock, config.device)
    print(
        f"train: {config.n_layer} layers x {config.n_embd}, vocabulary {config.vocab_size}, "
        f"{config.batch_size} x {config.block_size} tokens a step, {config.rounds} turns each"
    )
    flops = {n: models[n].flops_per_token(config.block_size) * size for n in (ours, default)}
    work = {n: flops[n] / (2 * SIDE**3) for n in flops}
    ratios = {
        "ours / Hugging Face, GPT-2's shape": speed_ratio(seconds, ours, peer),
        "ours, default / Hugging Face, GPT-2": speed_ratio(seconds, default, peer),
    } | {
        f"{name}: share of product rate": speed_ratio(seconds, name, product, work[name])
        for name in work
    }
    rate = 2 * SIDE**3 / median(seconds[product])
    results = report(seconds, list(models), size, ratios)
    print(f"  a product of matrices runs at {rate / 1e9:,.0f} GFLOP/s in float32")
    return results | {"product_flops_per_second": rate}


def training_step(model: torch.nn.Module, loss: Callable, device: str) -> Callable[[], None]:
    """A step as train.py's: forward, loss, backward, clipping, fused AdamW."""
    settings = training.Settings()
    optimizer = training.make_optimizer(model.to(device).train(), settings, device)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --- generate ----------------------------------------------------------------------------------


def bench_generate(config: Settings) -> dict:
    """Greedy generation by our cache, by recomputing, and by Hugging Face on the same weights."""
    n = config.new_tokens
    model = random_model(config).to(config.device).eval().lay_out_for_decoding()
    prompt = torch.randint(config.vocab_size, (config.prompt_tokens,)).tolist()
    peer = hugging_face_qwen3(model)
    idx = torch.tensor([prompt], device=config.device)
    sampling = Sampling(max_new_tokens=n, temperature=0.0)
    peers_way = {"do_sample": False, "min_new_tokens": n, "max_new_tokens": n}
    peers_way |= {"attention_mask": torch.ones_like(idx)}
    ways = {
        "ours, cache": lambda: [id for [(_, id)] in generate(model, [prompt], sampling)],
        "ours, recomputing": lambda: recompute(model, idx, n),
        "Hugging Face, cache": lambda: peer.generate(idx, **peers_way)[0, len(prompt) :].tolist(),
    }
    ours, recomputing, other = ways
    ids = {name: way() for name, way in ways.items()}
    compared = untied_length(model, prompt, ids[ours])
    for name in ways:
        assert ids[name][:compared] == ids[ours][:compared], f"{name} has other ids"
    memory = torch.ones(MEMORY // 4, device=config.device)
    reading = "memory read"
    seconds = measure(ways | {reading: memory.sum}, config.rounds, config.clock, config.device)
    print(
        f"generate: {config.n_layer} layers x {config.n_embd}, {n} tokens after "
        f"{len(prompt)}, one row, {config.rounds} turns each; {compared} of {n} ids compared, equal"
    )
    c = model.config
    weights = 4 * model.n_params()
    mean_cache = 4 * 2 * c.n_layer * c.n_kv_head * c.head_dim * (len(prompt) + n / 2)
    work = n * (weights + mean_cache) / MEMORY
    ratios = {
        "ours / Hugging Face, both with a cache": speed_ratio(seconds, ours, other),
        "ours, cache / recomputing": speed_ratio(seconds, ours, recomputing),
        "ours, cache: share of memory rate": speed_ratio(seconds, ours, reading, work),
    }
    results = report(seconds, list(ways), n, ratios)
    rate = MEMORY / median(seconds[reading])
    print(f"  memory is read at {rate / 1e9:.1f} GB/s, the weights are {weights / 1e6:.1f} MB")
    if config.device == "cpu" and weights < processor_cache():
        size = processor_cache() / 1e6
        print(f"  they fit in the processor's cache of {size:.1f} MB: memory is not the limit")
    return results | {
        "memory_bytes_per_second": rate,
        "weight_bytes": weights,
        "mean_cache_bytes": mean_cache,
        "processor_cache_bytes": processor_cache(),
        "ids_compared": compared,
    }


def random_model(config: Settings) -> GPT:
    """Our default architecture, with random weights that do not repeat one token forever."""
    torch.manual_seed(config.seed)
    model = GPT(
        ModelConfig(
            block_size=max(1024, config.prompt_tokens + config.new_tokens),  # nothing is cut
            n_layer=config.n_layer,
            n_head=config.n_head,
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


@torch.inference_mode()
def recompute(model: GPT, idx: torch.Tensor, max_new_tokens: int) -> list[int]:
    """Greedy ids that follow idx (1, T), the whole text read anew for each."""
    T = idx.shape[1]
    for _ in range(max_new_tokens):
        best = model.head(model(idx)[:, -1]).argmax(dim=-1, keepdim=True)
        idx = torch.cat([idx, best], dim=1)
    return idx[0, T:].tolist()


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


def hugging_face_gpt2(config: Settings) -> torch.nn.Module:
    """A GPT2LMHeadModel of the settings' shape, without dropout."""
    transformers = import_transformers()
    shape = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = transformers.GPT2LMHeadModel(shape)
    model.loss_type = "ForCausalLM"  # what it takes anyway, after a warning
    return model


def hugging_face_qwen3(model: GPT) -> torch.nn.Module:
    """A Qwen3ForCausalLM in eval mode, with the weights of a model of our default architecture."""
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
        "model.embed_tokens": model.wte.weight,
        "model.norm": model.norm.weight,
        "lm_head": model.lm_head.weight,
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
        weights |= {f"model.layers.{layer}.{name}": weight for name, weight in of_layer.items()}
    peer = transformers.Qwen3ForCausalLM(config)
    peer.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    return peer.to(model.wte.weight.device).eval()


# --- recipe ------------------------------------------------------------------------------------


def recipes() -> dict[str, list[str]]:
    """train.py's words for the demonstration, and for the reference at the same depth and width."""
    demonstration = ["config/pretrain_sanguo.py"]
    settings = configure(training.Settings, demonstration)
    shape = [f"--{name}={getattr(settings, name)}" for name in ("n_layer", "n_head", "n_embd")]
    reference = ["config/pretrain_sanguo_reference.py", *shape]
    return {"demonstration": demonstration, "reference": reference}


def bench_recipe(config: Settings, words: dict[str, list[str]] | None = None) -> dict:
    """Trains two recipes for the same time, one after the other -> bits per byte, and a picture.

    words: train.py's, of each recipe; None is recipes().
    """
    words = words or recipes()
    for argv in words.values():
        dataset = configure(training.Settings, argv).dataset
        if dataset in PREPARE and not (ROOT / "data" / dataset / "meta.json").is_file():
            raise UserError(f"data/{dataset} is missing; run python {PREPARE[dataset]}")
    commands = {name: [*words[name], *flags] for name, flags in plan(config, words).items()}
    folder = repo_path(config.runs)
    runs = {name: run_recipe(folder / name, argv) for name, argv in commands.items()}
    print(f"recipe: {config.seconds:.0f} s each, evaluations included; validation bits per byte")
    for name, run in runs.items():
        print(
            f"  {name:<14} {run['steps']:,} steps in {run['seconds']:.0f} s: "
            f"{run['bits_at_end']:.3f} at the end, {run['bits_best']:.3f} at the best of "
            f"{run['evaluations']}"
        )
    (ours, our_run), (other, other_run) = runs.items()
    ratio = other_run["bits_best"] / our_run["bits_best"]
    print(f"  bits per byte at best, {other} / {ours}: {ratio:.3f}")
    drawn = f"--runs={','.join(str(folder / name) for name in runs)}"
    picture = f"--out={folder / 'curves.png'}"
    run_script("visualize.py", drawn, "--x=seconds", "--y=bits_per_byte", picture)
    return {"runs": runs, "bits_best_ratio": ratio}


def plan(config: Settings, words: dict[str, list[str]]) -> dict[str, list[str]]:
    """The flags with which train.py takes config.seconds, from a few steps of both in turns."""
    runs, calls, n_parts = {}, {}, {}
    for name, argv in words.items():
        # a dry run may start where the out_dir holds a run
        run = runs[name] = training.start([*argv, f"--out_dir={config.runs}/{name}", "--dry_run"])
        part = next(run.data.eval_batches("val", run.config.block_size, run.config.batch_size))
        n_parts[name] = (len(run.data.tokens["val"]) - 1) / count_terms([part])["next_token"]
        calls[name, "step"], calls[name, "part"] = calls_of(run, part)
    device = next(iter(runs.values())).device
    seconds = measure(calls, min(2, config.rounds), "wall", device)
    return {
        name: fitting(
            config,
            run.config,
            step=median(seconds[name, "step"]),
            evaluation=median(seconds[name, "part"]) * n_parts[name],
        )
        for name, run in runs.items()
    }


def calls_of(run: training.Run, part: tuple) -> tuple[Callable, Callable]:
    """Two functions: a real step on the run's next batch, and the evaluation of one batch."""
    batches = training.step_batches(run)

    def step() -> None:
        micro, counts, _ = next(batches)
        training.train_step(run, micro, counts)

    def evaluate() -> None:
        run.model.eval()
        target_losses(run.model, to_device(part, run.device))
        run.model.train()

    return step, evaluate


def fitting(
    config: Settings, settings: training.Settings, step: float, evaluation: float
) -> list[str]:
    """Flags for as many steps as fit, given the seconds of a step and of an evaluation."""
    affordable = max(1, int(EVALUATION_SHARE * config.seconds / evaluation))
    evaluations = min(config.evaluations, affordable)
    max_iters = int((config.seconds - evaluations * evaluation) / step)
    if max_iters < 1:
        raise UserError(
            f"seconds={config.seconds:g} is too short for {settings.dataset}: a step takes "
            f"{step:.1f} s and an evaluation {evaluation:.1f} s; pass a longer --seconds="
        )
    tenth = math.ceil(max_iters / 10)
    return [
        f"--max_iters={max_iters}",
        f"--lr_decay_iters={max_iters}",
        f"--eval_interval={math.ceil(max_iters / evaluations)}",
        f"--warmup_iters={min(settings.warmup_iters, tenth)}",
        f"--log_interval={min(settings.log_interval, tenth)}",
    ]


def run_recipe(out_dir: Path, argv: list[str]) -> dict:
    """Runs train.py into out_dir, in place of what was there -> its steps, seconds and bits."""
    shutil.rmtree(out_dir, ignore_errors=True)
    run_script("train.py", *argv, f"--out_dir={out_dir}")
    bits = [r["val_bits_per_byte"] for r in read_log(out_dir) if "val_bits_per_byte" in r]
    progress = read_run(out_dir, "latest")["progress"]
    return {
        "command": ["train.py", *argv],
        "steps": progress["iter"],
        "seconds": progress["seconds"],
        "evaluations": len(bits),
        "bits_at_end": bits[-1],
        "bits_best": min(bits),
    }


def run_script(name: str, *words: str) -> None:
    """Runs a script of this repository; UserError where it fails."""
    sys.stdout.flush()
    done = subprocess.run([sys.executable, str(ROOT / name), *words], check=False)
    if done.returncode:
        raise UserError(f"{name} ended with exit code {done.returncode}; its message is above")


PARTS = {"train": bench_train, "generate": bench_generate, "recipe": bench_recipe}


if __name__ == "__main__":
    command(main)
