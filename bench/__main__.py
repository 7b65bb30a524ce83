"""Speed beside Hugging Face's, and what three recipes reach in the same time.

    pip install -r requirements-dev.txt
    python -m bench                          step, then generate
    python -m bench step --n_layer=6 --n_embd=512 --n_head=8
    python -m bench start --out_dir=out-sanguo-sft      from the command to the first character
    python -m bench llama --llama_cpp=PYTHON --out_dir=out-sanguo-sft    beside llama.cpp
    python -m bench quality                  ours, MiniMind's, the reference's: some three hours
    python -m bench data --size_mb=100       a large text prepared, beside other ways
    python -m bench loader                   batches of 10^11 tokens
    python -m bench save                     what log and checkpoints take of a run's time
    python -m bench quality --only=ours-2    one run of these; Ctrl-C and the same command go on

Figures are ratios within one run, since machines differ and are shared: the contenders take turns
(A B A B ...), medians are compared, and the range is that of the ratios turn by turn. On a busy
machine, OMP_NUM_THREADS=1 and --clock=cpu leave most of the neighbours' work out.

A training step counts as the floating-point operations of its matrix products: 6 x parameters of
Linear layers (the head is one) x tokens + 12 x n_layer x n_embd x T x tokens / 2 (causal
attention); a decoding step as one reading of all weights, and of the cache at its mean length.
"""

import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch

import train as training
from bench.data import bench_data
from bench.generate import bench_generate, bench_llama, bench_start
from bench.loader import bench_loader
from bench.peers import hugging_face_model, import_transformers
from bench.profile import numbers, print_profile, profile_step, whole_step
from bench.quality import (
    PATIENCE,
    Trial,
    budget,
    choose,
    is_finished,
    judge,
    print_quality,
    quality_figure,
    read_trial,
    train_trial,
)
from bench.save import bench_save
from bench.timing import Seconds, measure, report, speed_ratio
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
from miniglm.checkpoint import environment
from miniglm.objectives import count_terms, next_token, target_losses, to_device
from model import GPT, ModelConfig, pick_device
from visualize import save_figure

ARCHITECTURES = {  # as our settings
    "Qwen3": {},  # our default
    "Llama": {"qk_norm": False, "norm_eps": 1e-5},
    "GPT-2": {
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "mlp": "gelu",
        "bias": True,
        "qk_norm": False,
    },
}
CONTENDERS = [
    *(("ours", "Qwen3"), ("ours", "Llama"), ("Hugging Face", "Llama")),
    *(("ours", "GPT-2"), ("Hugging Face", "GPT-2")),
]
LIMITS = {"Llama": ("Qwen3", "Llama"), "GPT-2": ("GPT-2",)}  # whose products are whose too
SIDE = 2048  # of the square matrices whose product is timed
PREPARE = {
    "sanguo": "data/sanguo/prepare.py",
    "sanguo_6400": "data/sanguo/prepare.py --vocab_size=6400 --out=data/sanguo_6400",
    "sanguo_gpt2": "data/sanguo/prepare.py --tokenizer=gpt2 --out=data/sanguo_gpt2",
}


@dataclass
class Settings:
    names: list[str] = field(
        default_factory=list
    )  # step, generate, start, llama, quality, data, loader, save; none: two
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads
    n_kv_head: int | None = None  # key and value heads, in generate; None is n_head
    n_embd: int = 256  # width
    vocab_size: int = 4096  # ids, in step and generate; quality's recipes have their own
    batch_size: int = 16  # rows of a training step, in step
    block_size: int = 256  # tokens of a training row, in step
    prompt_tokens: int = 16  # that generation starts from
    new_tokens: int = 512  # that generation adds to one prompt; to each of many, a quarter
    prompts: int = 32  # in generate, how many
    out_dir: str = "out-sanguo-sft"  # of the model that start and llama load
    llama_cpp: str = ""  # python of an environment with llama-cpp-python, see bench/llama.py
    rounds: int = 7  # turns of each contender, after one to warm up
    clock: Literal["wall", "cpu"] = "wall"  # cpu: of this process, on all threads; not in quality
    ours_minutes: list[float] = field(default_factory=lambda: [2, 3, 4, 6.67])  # a run each
    minimind_minutes: float = 20.0  # of each of its runs
    minimind_rates: list[float] = field(default_factory=lambda: [5e-4, 1e-3, 2e-3])  # a run each
    reference_minutes: float = 60.0  # of its run
    only: list[str] = field(default_factory=list)  # of quality: ours-2, or a recipe; of data: ours
    runs: str = "bench-quality"  # where quality trains
    size_mb: int = 1000  # of the text that data prepares
    tokens: int = 10**11  # of the corpus that loader reads
    out: str = "bench-results"  # where figures are written, a .json a part
    seed: int = 1337  # of weights and ids, and of quality's runs
    device: str = "cpu"  # nothing is compiled; generate is in float32

    def __post_init__(self):
        for name in self.names:
            if name not in PARTS:
                near = nearest(name, PARTS) or f"; there are {', '.join(PARTS)}"
                raise UserError(f"unknown part {name!r}{near}")
        for name in ("batch_size", "prompt_tokens", "new_tokens", "prompts", "rounds", "size_mb"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("ours_minutes", "minimind_minutes", "minimind_rates", "reference_minutes"):
            value = getattr(self, name)
            numbers = value if isinstance(value, list) else [value]
            different = {f"{number:g}" for number in numbers}  # as list_trials names them
            if not 0 < len(numbers) == len(different):
                raise UserError(f"{name}={value} must hold one number or more, none of them twice")
            if min(numbers) <= 0:
                raise UserError(f"{name}={value} must be above 0")
        if "quality" in self.names and self.clock != "wall":
            raise UserError(f"quality has the wall clock's minutes; leave out --clock={self.clock}")


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    config.device = pick_device(config.device)
    names = config.names or ["step", "generate"]
    if {"step", "generate"} & {*names}:
        import_transformers()  # before anything long
    for name in names:
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


# --- step --------------------------------------------------------------------------------------


def bench_step(config: Settings) -> dict:
    """Training steps of ours and of Hugging Face's, in float32 and in what train.py takes here:
    their speed, also as a share of the rate of matrix products, and their memory."""
    auto = str(training.pick_dtype(training.Settings(), config.device)).removeprefix("torch.")
    dtypes = list(dict.fromkeys(["float32", auto]))
    memory = peak_memory(config, dtypes)
    models = {contender: build(config, *contender) for contender in CONTENDERS}
    steps = {contender: training_step(config, model) for contender, model in models.items()}
    products = {of: matrix_products(models["ours", of], config.batch_size) for of in LIMITS}
    square = torch.randn(SIDE, SIDE, device=config.device)
    calls = {}
    for dtype in dtypes:
        to = getattr(torch, dtype)
        calls |= {label(*contender, dtype): partial(steps[contender], to) for contender in steps}
        calls |= {label("products", of, dtype): run_products(products[of], to) for of in products}
        calls[label("product", dtype)] = run_products([(square, square)], to)
    seconds = measure(calls, config.rounds, config.clock, config.device)
    flops = {of: n_flops(products[limit]) for limit, shapes in LIMITS.items() for of in shapes}
    results = rate_steps(config, dtypes, seconds, flops)
    for row in results["steps"]:
        row["memory"] = memory[row["name"]]
    print_steps(config, results)
    with own_process() as pool:
        own, profiles, work = pool.submit(whole_steps, config, dtypes).result()
    shares = muon_shares(own, work, results["flops_per_second"])
    return results | {"whole_steps": report_whole_steps(config, own, profiles, shares)}


def build(config: Settings, who: str, architecture: str) -> torch.nn.Module:
    """One of CONTENDERS, with random weights."""
    torch.manual_seed(config.seed)
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    shape |= {"n_vocab": config.vocab_size, "vocab_size": config.vocab_size}
    ours = ModelConfig(**shape, **ARCHITECTURES[architecture])
    model = GPT(ours) if who == "ours" else hugging_face_model(ours)
    return model.to(config.device).train()


def training_step(config: Settings, model: torch.nn.Module) -> Callable[[torch.dtype], None]:
    """A step as train.py's in a dtype: forward, loss, backward, clipping, fused AdamW."""
    settings = training.Settings(optimizer="adamw")
    [optimizer] = training.make_optimizers(model, settings, config.device)
    ids = torch.randint(config.vocab_size, (config.batch_size, config.block_size + 1))
    idx, targets = (part.to(config.device) for part in (ids[:, :-1], ids[:, 1:]))

    def loss() -> torch.Tensor:
        if isinstance(model, GPT):
            return next_token(model, (idx, targets))["next_token"] / targets.numel()
        return model(input_ids=idx, labels=idx, use_cache=False).loss

    def step(dtype: torch.dtype) -> None:
        on = dtype != torch.float32
        with torch.autocast(torch.device(config.device).type, dtype if on else None, enabled=on):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def matrix_products(model: GPT, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs of matrices that a step multiplies, of random numbers: for each Linear forward, its
    input's gradient, its weight's; for attention two and four, on half of the heads, since the
    causal half of each is enough."""
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


def n_flops(products: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(2 * left.numel() * right.shape[-1] for left, right in products)


def run_products(products: list, dtype: torch.dtype) -> Callable[[], None]:
    """A function that computes them all, into memory that is already there."""
    pairs = [(left.to(dtype), right.to(dtype)) for left, right in products]
    shared = {}  # shape -> where its products go
    outs = [shared.setdefault(out.shape, out) for out in (left @ right for left, right in pairs)]

    def run() -> None:
        for (left, right), out in zip(pairs, outs, strict=True):
            torch.matmul(left, right, out=out)

    return run


def rate_steps(
    config: Settings, dtypes: list[str], seconds: Seconds, flops: dict[str, int]
) -> dict:
    """Tokens per second, shares of the two rates, and the ratios of ours to Hugging Face's."""
    tokens = config.batch_size * config.block_size
    rows, ratios, rates = [], {}, {}
    for dtype in dtypes:
        product = label("product", dtype)
        rates[product] = 2 * SIDE**3 / median(seconds[product])
        for limit, architectures in LIMITS.items():
            products = label("products", limit, dtype)
            rates[products] = flops[limit] / median(seconds[products])
            for who, of in (c for c in CONTENDERS if c[1] in architectures):
                name = label(who, of, dtype)
                rows.append(
                    {
                        "name": name,
                        "tokens_per_second": tokens / median(seconds[name]),
                        "share_of_product": speed_ratio(
                            seconds, name, product, flops[of] / (2 * SIDE**3)
                        ),
                        "share_of_own_products": speed_ratio(seconds, name, products),
                    }
                )
        for ours, peer in (("GPT-2", "GPT-2"), ("Llama", "Llama"), ("Qwen3", "Llama")):
            names = label("ours", ours, dtype), label("Hugging Face", peer, dtype)
            ratios[" / ".join(names)] = speed_ratio(seconds, *names)
    return {"steps": rows, "ratios": ratios, "flops_per_second": rates, "seconds": seconds}


def print_steps(config: Settings, results: dict) -> None:
    print(
        f"step: {config.n_layer} layers x {config.n_embd}, vocabulary {config.vocab_size}, "
        f"{config.batch_size} x {config.block_size} tokens, {config.rounds} turns each\n"
        f"  {'':<32}  tokens/s  of {SIDE} cubed  of its products  MB of a step (+ before it)"
    )
    for row in results["steps"]:
        shares = [row[key]["ratio"] for key in ("share_of_product", "share_of_own_products")]
        memory = row["memory"]
        size = "not measured"
        if memory:
            size = f"{memory['step'] / 1e6:,.0f} (+ {memory['built'] / 1e6:,.0f})"
        print(
            f"  {row['name']:<32}  {row['tokens_per_second']:>8,.0f}  {shares[0]:>13.2f}  "
            f"{shares[1]:>15.2f}  {size:>26}"
        )
    for name, of in results["ratios"].items():
        print(f"  {name:<60} {of['ratio']:.3g} ({of['min']:.3g} to {of['max']:.3g})")
    for name, rate in results["flops_per_second"].items():
        print(f"  {name:<32}  {rate / 1e9:,.0f} GFLOP/s")


def label(*words: str) -> str:
    return ", ".join(words)


# --- whole step --------------------------------------------------------------------------------


def whole_steps(config: Settings, dtypes: list[str]) -> tuple[Seconds, dict[str, dict], int]:
    """train.py's own steps, batch included: seconds with Muon and with AdamW alone, in turns; on a
    CPU the milliseconds by kind of those with Muon, in each dtype; and the flops of a step."""
    training.keep_freed_memory()  # as train.py does; it holds for the whole process
    steps = {}
    with numbers() as data:
        # fewer ids than the dataset has cannot read it
        wide = max(config.vocab_size, data.tokenizer.n_vocab)
        config = dataclasses.replace(config, vocab_size=wide)
        for dtype, optimizer in itertools.product(dtypes, ("muon", "adamw")):
            sizes = {"batch_size": config.batch_size, "block_size": config.block_size}
            own = training.Settings(optimizer=optimizer, dtype=dtype, device=config.device, **sizes)
            steps[label(optimizer, dtype)] = whole_step(build(config, "ours", "Qwen3"), data, own)
        seconds = measure(steps, config.rounds, config.clock, config.device)
        profiled = dtypes if config.device == "cpu" else []
        profiles = {dtype: profile_step(steps[label("muon", dtype)]) for dtype in profiled}
    shapes = build(dataclasses.replace(config, device="meta"), "ours", "Qwen3")
    return seconds, profiles, n_flops(matrix_products(shapes, config.batch_size))


def muon_shares(seconds: Seconds, flops: int, rates: dict[str, float]) -> dict[str, dict]:
    """By dtype, what the steps with Muon have of the rates that rate_steps measured. Muon's own
    products are none of their flops."""
    shares = {}
    for dtype in (name.removeprefix("muon, ") for name in seconds if name.startswith("muon, ")):
        rate = flops / median(seconds[label("muon", dtype)])
        shares[dtype] = {
            "share_of_product": rate / rates[label("product", dtype)],
            "share_of_own_products": rate / rates[label("products", "Llama", dtype)],
        }
    return shares


def report_whole_steps(
    config: Settings, seconds: Seconds, profiles: dict[str, dict], shares: dict[str, dict]
) -> dict:
    """Prints and returns the speeds, their shares of the products', and where the time goes."""
    print("train.py's own step: ours, Qwen3, batch included, with Muon and with AdamW alone")
    pairs = [(label("muon", dtype), label("adamw", dtype)) for dtype in shares]
    ratios = {" / ".join(pair): speed_ratio(seconds, *pair) for pair in pairs}
    results = report(seconds, list(seconds), config.batch_size * config.block_size, ratios)
    for dtype, of in shares.items():
        cubed, own = of["share_of_product"], of["share_of_own_products"]
        name = label("muon", dtype)
        print(f"  {name:<50} {cubed:.2f} of {SIDE} cubed, {own:.2f} of its products")
    if profiles:
        print("where its time goes, with Muon, under the profiler")
        print_profile(profiles)
    return results | {"shares": shares, "milliseconds": profiles}


# --- memory ------------------------------------------------------------------------------------


def own_process() -> ProcessPoolExecutor:
    """Runs each task in a new process."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def peak_memory(config: Settings, dtypes: list[str]) -> dict[str, dict | None]:
    """step_memory of each contender in each dtype, each in a process of its own."""
    contenders = [(*contender, dtype) for dtype in dtypes for contender in CONTENDERS]
    with own_process() as pool:
        measured = pool.map(partial(step_memory, config), *zip(*contenders, strict=True))
        return {label(*c): memory for c, memory in zip(contenders, measured, strict=True)}


def step_memory(config: Settings, who: str, architecture: str, dtype: str) -> dict | None:
    """Bytes that this process has had at most when the model is built, and what two steps add to
    them. None where it cannot be told: on a GPU, on Windows."""
    model = build(config, who, architecture)
    step = training_step(config, model)
    built = peak_bytes()
    if built is None or config.device != "cpu":
        return None
    for _ in range(2):  # AdamW's moments come with the first
        step(getattr(torch, dtype))
    return {"built": built, "step": peak_bytes() - built}


def peak_bytes() -> int | None:
    """The most memory that this process has had; None on Windows."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux counts what the parent had into ru_maxrss
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8"))[1])
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS has bytes


# --- quality -----------------------------------------------------------------------------------


def recipe_words(config: Settings) -> dict[str, list[str]]:
    """train.py's words for each recipe, all of the same depth and width."""
    same = [f"--{name}={getattr(config, name)}" for name in ("n_layer", "n_head", "n_embd")]
    same += [f"--device={config.device}", "--compile=False", f"--patience={PATIENCE}"]
    same += [f"--seed={config.seed}"]
    return {
        "ours": ["config/pretrain_sanguo.py", *same],
        "minimind": ["config/minimind.py", *same, f"--n_kv_head={max(1, config.n_head // 4)}"],
        "reference": ["config/pretrain_sanguo_reference.py", *same],
    }


def list_trials(config: Settings, words: dict[str, list[str]]) -> list[Trial]:
    trials = []
    for minutes in config.ours_minutes:
        trials.append(Trial(f"ours-{minutes:g}", "ours", minutes, words["ours"]))
    minutes = config.minimind_minutes
    for rate in config.minimind_rates:
        more = [f"--learning_rate={rate:g}", f"--min_lr={rate / 10:g}"]
        name = f"minimind-{minutes:g}-{rate:g}"
        trials.append(Trial(name, "minimind", minutes, [*words["minimind"], *more]))
    minutes = config.reference_minutes
    return [*trials, Trial(f"reference-{minutes:g}", "reference", minutes, words["reference"])]


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
    missing = [n for n, argv in commands.items() if not is_finished(folder / n, argv)]
    if missing:
        print(f"quality: still to be trained: {', '.join(missing)}")
        return None
    runs = {t.name: read_trial(folder / t.name, t, commands[t.name], costs) for t in trials}
    results = {"costs": costs, "runs": runs} | judge(runs, costs)
    print_quality(results)
    save_figure(quality_figure(results), folder / "quality.png")
    print(f"  drawn in {show_path(folder / 'quality.png')}")
    return results


def plan(config: Settings, words: dict[str, list[str]]) -> dict[str, dict]:
    """What a step and an evaluation of each recipe cost, in seconds, measured in turns.

    A step in float32 too, where the recipe's own dtype is another. Kept in plan.json.
    """
    path = repo_path(config.runs) / "plan.json"
    recipes = {n: dataclasses.asdict(configure(training.Settings, words[n])) for n in words}
    if path.is_file():
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            earlier, costs, where = (plan[key] for key in ("recipes", "costs", "environment"))
            changes = {
                name: [key for key in before if before[key] != recipes[name].get(key)]
                for name, before in earlier.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{show_path(path)} is damaged; delete it, and the costs are measured anew"
            ) from None
        for name, changed in changes.items():
            if changed:
                raise UserError(
                    f"{show_path(path)} is of another {', '.join(changed)} of {name}; "
                    "pass another --runs="
                )
        print(f"costs as in {show_path(path)}; without that file they are measured anew")
        if where != environment(config.device):
            print("note: they were measured on another machine, or with other threads")
        return costs
    calls, dtypes, n_parts, n_steps = {}, {}, {}, {}
    for name, argv in words.items():
        # a dry run may start where the out_dir holds a run
        run = training.start([*argv, f"--out_dir={config.runs}/{name}", "--dry_run"])
        own = str(training.pick_dtype(run.config, run.device)).removeprefix("torch.")
        n_steps[name] = len(kinds_of_step(run))
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
            "step": {d: median(seconds[f"{name}, {d}"]) / n_steps[name] for d in own},
            "evaluation": median(seconds[f"{name}, evaluation"]) * n_parts[name],
        }
        for name, own in dtypes.items()
    }
    plan = {"environment": environment(config.device), "recipes": recipes, "costs": costs}
    with written_aside(path) as aside:
        aside.write_text(json.dumps(plan | {"seconds": seconds}, indent=1) + "\n", encoding="utf-8")
    return costs


def kinds_of_step(run: training.Run) -> list[int]:
    """short_iters by which the next step is of one kind, or of the other: a run has as many of
    both."""
    return [0, sys.maxsize] if run.config.short_block else [0]


def step_call(run: training.Run, dtype: str) -> Callable[[], None]:
    """A real step of each kind on the run's next batches, which are made too."""
    batches = training.step_batches(run)

    def step() -> None:
        run.config.dtype = dtype
        for kind in kinds_of_step(run):
            run.config.short_iters = kind
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


PARTS = {
    "step": bench_step,
    "generate": bench_generate,
    "start": bench_start,
    "llama": bench_llama,
    "quality": bench_quality,
    "data": bench_data,
    "loader": bench_loader,
    "save": bench_save,
}


if __name__ == "__main__":
    command(main)
