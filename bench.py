"""Speed beside Hugging Face's, and what three recipes reach in the same time.

    pip install -r requirements-dev.txt
    python bench.py                          train, then generate
    python bench.py train --n_layer=6 --n_embd=512 --n_head=8
    python bench.py quality                  ours, MiniMind's, the reference's: some three hours
    python bench.py quality --only=ours-2    one run of these; Ctrl-C and the same command go on

Figures are ratios within one run, since machines differ and are shared: the contenders take turns
(A B A B ...), medians are compared, and the range is that of the ratios turn by turn. On a busy
machine, OMP_NUM_THREADS=1 and --clock=cpu leave most of the neighbours' work out.

A training step counts as 6 x parameters in matrix products (with the head, without the look-up of
embeddings) x tokens + 12 x n_layer x n_embd x T x tokens / 2 (causal attention) floating-point
operations; a decoding step as one reading of all weights, and of the cache at its mean length.
"""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import torch

import train as training
from bench_peers import hugging_face_gpt2, hugging_face_qwen3, import_transformers
from bench_quality import judge, own_step, print_quality, quality_figure
from checkpoint import environment, has_checkpoint, read_log, read_run
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
from visualize import save_figure

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
EVALUATIONS = 20  # of a run in quality
EVALUATION_SHARE = 0.1  # of its time, at most
PREPARE = {
    "sanguo": "data/sanguo/prepare.py",
    "sanguo_6400": "data/sanguo/prepare.py --vocab_size=6400 --out=data/sanguo_6400",
    "sanguo_gpt2": "data/sanguo/prepare.py --tokenizer=gpt2 --out=data/sanguo_gpt2",
}

Seconds = dict[str, list[float]]  # of each contender, turn by turn


@dataclass
class Settings:
    names: list[str] = field(default_factory=list)  # train, generate, quality; none: the first two
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads
    n_embd: int = 256  # width
    vocab_size: int = 4096  # ids, in train and generate; quality's recipes have their own
    batch_size: int = 16  # rows of a training step in train
    block_size: int = 256  # tokens of a training row in train
    prompt_tokens: int = 16  # that generation starts from
    new_tokens: int = 512  # that generation adds
    rounds: int = 7  # turns of each contender, after one to warm up
    clock: Literal["wall", "cpu"] = "wall"  # cpu: the time of this process, on all its threads
    ours_minutes: list[float] = field(default_factory=lambda: [2, 4, 6.67, 20])  # a run each
    minimind_minutes: float = 20.0  # of each of its runs
    minimind_rates: list[float] = field(default_factory=lambda: [5e-4, 1e-3, 2e-3])  # a run each
    reference_minutes: float = 60.0  # of its run
    only: list[str] = field(default_factory=list)  # runs of quality, as ours-2, or a recipe's
    runs: str = "bench-quality"  # where quality trains
    out: str = "bench-results"  # where figures are written, a .json a part
    seed: int = 1337  # of weights and ids
    device: str = "cpu"  # nothing is compiled; train and generate are in float32

    def __post_init__(self):
        for name in self.names:
            if name not in PARTS:
                near = nearest(name, PARTS) or f"; there are {', '.join(PARTS)}"
                raise UserError(f"unknown part {name!r}{near}")
        for name in ("batch_size", "prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    config.device = pick_device(config.device)
    if config.names != ["quality"]:
        import_transformers()  # before anything long
    for name in config.names or ["train", "generate"]:
        results = PARTS[name](config)
        if results is None:  # what was asked for is done, but it is not all
            continue
        record = {
            "part": name,
            "environment": environment(config.device),
            "settings": dataclasses.asdict(config),
            "results": results,
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
    gpt2 = ModelConfig(**shape, **vocab, **GPT2_SHAPE)
    models = {
        "ours, GPT-2's shape": GPT(gpt2),
        "Hugging Face, GPT-2": hugging_face_gpt2(gpt2),
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
    work = {n: step_flops(models[n], size) / (2 * SIDE**3) for n in (ours, default)}
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


def step_flops(model: GPT, tokens: int) -> float:
    """Floating-point operations of a training step, as the head of this file counts them."""
    c = model.config
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() >= 2)
    matrices += model.lm_head.weight.numel()
    return 6 * matrices * tokens + 12 * c.n_layer * c.n_embd * c.block_size * tokens / 2


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


# --- quality -----------------------------------------------------------------------------------


@dataclass
class Trial:
    """A run of quality: a recipe and its time."""

    name: str  # of its out_dir
    recipe: str
    minutes: float  # of training steps at their measured cost; evaluations are not counted
    words: list[str]  # train.py's, without what depends on the cost


def recipe_words(config: Settings) -> dict[str, list[str]]:
    """train.py's words for each recipe, all of the same depth and width."""
    same = [f"--{name}={getattr(config, name)}" for name in ("n_layer", "n_head", "n_embd")]
    same += [f"--device={config.device}", "--compile=False", "--patience=None"]
    return {
        "ours": ["config/pretrain_sanguo.py", *same],
        "minimind": ["config/minimind.py", *same, f"--n_kv_head={max(1, config.n_head // 4)}"],
        "reference": ["config/pretrain_sanguo_reference.py", *same],
    }


def list_trials(config: Settings, words: dict[str, list[str]]) -> list[Trial]:
    ours = [("ours", minutes, []) for minutes in config.ours_minutes]
    minimind = [
        (
            "minimind",
            config.minimind_minutes,
            [f"--learning_rate={rate:g}", f"--min_lr={rate / 10:g}"],
        )
        for rate in config.minimind_rates
    ]
    reference = [("reference", config.reference_minutes, [])]
    return [
        Trial(
            "-".join([recipe, f"{minutes:g}", *(w.partition("=")[2] for w in rate[:1])]),
            recipe,
            minutes,
            [*words[recipe], *rate],
        )
        for recipe, minutes, rate in [*ours, *minimind, *reference]
    ]


def bench_quality(config: Settings, words: dict[str, list[str]] | None = None) -> dict | None:
    """Trains the trials that are missing -> who has which bits per byte when, and a picture.

    words: train.py's, of each recipe; None is recipe_words(config). None while trials are missing.
    """
    words = words or recipe_words(config)
    trials = list_trials(config, words)
    chosen = choose(trials, config.only)
    for dataset in [configure(training.Settings, argv).dataset for argv in words.values()]:
        if dataset in PREPARE and not (ROOT / "data" / dataset / "meta.json").is_file():
            raise UserError(f"data/{dataset} is missing; run python {PREPARE[dataset]}")
    folder = repo_path(config.runs)
    costs = plan(config, words)
    commands = {trial.name: [*trial.words, *budget(trial, costs)] for trial in trials}
    for trial in chosen:
        train_trial(folder / trial.name, commands[trial.name])
    steps = {name: steps_wanted(argv) for name, argv in commands.items()}
    missing = [name for name in steps if steps_done(folder / name) < steps[name]]
    if missing:
        print(f"quality: still to be trained: {', '.join(missing)}")
        return None
    runs = {t.name: read_trial(folder / t.name, t, commands[t.name], costs) for t in trials}
    results = {"costs": costs, "runs": runs} | judge(runs, costs)
    print_quality(results)
    save_figure(quality_figure(results), folder / "quality.png")
    print(f"  drawn in {show_path(folder / 'quality.png')}")
    return results


def choose(trials: list[Trial], only: list[str]) -> list[Trial]:
    """The trials that `only` names, themselves or by their recipe; all where it is empty."""
    names = {name for trial in trials for name in (trial.name, trial.recipe)}
    for name in only:
        if name not in names:
            have = ", ".join(trial.name for trial in trials)
            raise UserError(f"only={name!r} names no run{nearest(name, names)}; there are {have}")
    return [t for t in trials if not only or t.name in only or t.recipe in only]


def plan(config: Settings, words: dict[str, list[str]]) -> dict[str, dict]:
    """What a step and an evaluation of each recipe cost, in seconds, measured in turns.

    A step in float32 too, where the recipe's own dtype is another. Kept in plan.json.
    """
    path = repo_path(config.runs) / "plan.json"
    recipes = {n: dataclasses.asdict(configure(training.Settings, words[n])) for n in words}
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        for name, before in plan["recipes"].items():
            if changed := [key for key in before if before[key] != recipes[name].get(key)]:
                raise UserError(
                    f"{show_path(path)} is of another {', '.join(changed)} of {name}; "
                    "pass another --runs="
                )
        print(f"costs as in {show_path(path)}; without that file they are measured anew")
        return plan["costs"]
    calls, dtypes, n_parts = {}, {}, {}
    for name, argv in words.items():
        # a dry run may start where the out_dir holds a run
        run = training.start([*argv, f"--out_dir={config.runs}/{name}", "--dry_run"])
        own = str(training.pick_dtype(run.config, run.device)).removeprefix("torch.")
        dtypes[name] = list(dict.fromkeys([own, "float32"]))
        part = next(run.data.eval_batches("val", run.config.block_size, run.config.batch_size))
        n_parts[name] = (len(run.data.tokens["val"]) - 1) / count_terms([part])["next_token"]
        calls |= {f"{name}, {dtype}": step_call(run, dtype) for dtype in dtypes[name]}
        calls[f"{name}, evaluation"] = evaluation_call(run, part, own)
    print(f"measuring the cost of a step, {config.rounds + 1} turns of {len(calls)} contenders")
    seconds = measure(calls, config.rounds, "wall", config.device)
    costs = {
        name: {
            "dtype": own[0],
            "step": {dtype: median(seconds[f"{name}, {dtype}"]) for dtype in own},
            "evaluation": median(seconds[f"{name}, evaluation"]) * n_parts[name],
        }
        for name, own in dtypes.items()
    }
    plan = {"environment": environment(config.device), "recipes": recipes, "costs": costs}
    with written_aside(path) as aside:
        aside.write_text(json.dumps(plan | {"seconds": seconds}, indent=1) + "\n", encoding="utf-8")
    return costs


def step_call(run: training.Run, dtype: str) -> Callable[[], None]:
    """A real step on the run's next batch, which is made too."""
    batches = training.step_batches(run)

    def step() -> None:
        run.config.dtype = dtype
        micro, counts, _ = next(batches)
        training.train_step(run, micro, counts)

    return step


def evaluation_call(run: training.Run, part: tuple, dtype: str) -> Callable[[], None]:
    """The evaluation of one batch."""

    def evaluate() -> None:
        run.config.dtype = dtype
        run.model.eval()
        with training.autocast(run):
            target_losses(run.model, to_device(part, run.device))
        run.model.train()

    return evaluate


def budget(trial: Trial, costs: dict[str, dict]) -> list[str]:
    """train.py's flags for as many steps as the trial's minutes have."""
    settings = configure(training.Settings, trial.words)
    step, evaluation = own_step(costs, trial.recipe), costs[trial.recipe]["evaluation"]
    seconds = 60 * trial.minutes
    max_iters = int(seconds / step)
    if max_iters < 1:
        raise UserError(
            f"{trial.name}: a step takes {step:.1f} s; give {trial.recipe} more minutes"
        )
    evaluations = max(2, min(EVALUATIONS, int(EVALUATION_SHARE * seconds / evaluation)))
    tenth = math.ceil(max_iters / 10)
    return [
        f"--max_iters={max_iters}",
        f"--eval_interval={math.ceil(max_iters / evaluations)}",
        f"--warmup_iters={min(settings.warmup_iters, tenth)}",
        f"--log_interval={min(settings.log_interval, tenth)}",
        f"--dtype={costs[trial.recipe]['dtype']}",
    ]


def steps_wanted(argv: list[str]) -> int:
    return configure(training.Settings, argv).max_iters


def steps_done(out_dir: Path) -> int:
    return read_run(out_dir, "latest")["progress"]["iter"] if has_checkpoint(out_dir) else 0


def train_trial(out_dir: Path, argv: list[str]) -> None:
    """Trains from the start, or from where it was stopped; not at all where it is finished."""
    if has_checkpoint(out_dir):
        before = read_run(out_dir, "latest")["settings"]["max_iters"]
        if before != steps_wanted(argv):
            raise UserError(
                f"{show_path(out_dir)} is a run of {before} steps, the plan has "
                f"{steps_wanted(argv)}; delete it, or pass another --runs="
            )
    if steps_done(out_dir) < steps_wanted(argv):
        run_script("train.py", *argv, f"--out_dir={out_dir}", "--resume")


def run_script(name: str, *words: str) -> None:
    """Runs a script of this repository. UserError where it fails; Ctrl-C is left to it."""
    sys.stdout.flush()
    # subprocess.run would kill a script that is saving; a handler is not inherited, SIG_IGN is
    before = signal.signal(signal.SIGINT, lambda signum, frame: None)
    try:
        code = subprocess.Popen([sys.executable, str(ROOT / name), *words]).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if code == 130:
        raise UserError("stopped; the same command goes on with it")
    if code:
        raise UserError(f"{name} ended with exit code {code}; its message is above")


def read_trial(out_dir: Path, trial: Trial, argv: list[str], costs: dict[str, dict]) -> dict:
    """A finished trial: its curve on the axis of its steps' cost, and its best evaluation."""
    minutes = own_step(costs, trial.recipe) / 60
    evaluated = [r for r in read_log(out_dir) if "val_bits_per_byte" in r]
    curve = [(r["iter"] * minutes, r["val_bits_per_byte"]) for r in evaluated]
    at, best = min(curve, key=lambda point: point[1])
    progress = read_run(out_dir, "latest")["progress"]
    return {
        "recipe": trial.recipe,
        "minutes": trial.minutes,
        "command": ["train.py", *argv],
        "steps": progress["iter"],
        "clock_seconds": progress["seconds"],
        "curve": curve,
        "bits_best": best,
        "minutes_at_best": at,
        "bits_at_end": curve[-1][1],
    }


PARTS = {"train": bench_train, "generate": bench_generate, "quality": bench_quality}


if __name__ == "__main__":
    command(main)
