"""Trains a model: settings, and the one loop for every stage.

python train.py config/pretrain_sanguo.py
python train.py config/sft_sanguo.py --learning_rate=5e-4
python train.py --out_dir=out-sanguo --resume
python train.py --init_from=out-sanguo --dataset=mine --lora_rank=8 --out_dir=out-lora
torchrun --standalone --nproc_per_node=2 train.py config/pretrain_sanguo.py

What a stage reads and computes is its objective's, miniglm/objectives.py.
"""

import dataclasses
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from configurator import (
    UserError,
    above,
    at_least,
    at_most,
    below,
    command,
    configure,
    defaults_of,
    repo_path,
    show_path,
)

# isort: split
import numpy as np
import torch

from data_utils import Dataset, Mixture, open_dataset
from miniglm import checkpoint as checkpoints
from miniglm import compiling, devices, distributed, monitor, preflight
from miniglm.checkpoint import Checkpoint
from miniglm.devices import Peak
from miniglm.distributed import ALONE, LossModule, World
from miniglm.lora import adapters, add_adapters
from miniglm.losses import chunk_sizes
from miniglm.monitor import Stopwatch, Window
from miniglm.objectives import Batch, Objective
from miniglm.optim import learning_rate, make_optimizers
from miniglm.preflight import Start, architecture
from miniglm.stages import objective_of
from miniglm.trackers import check_trackers, open_trackers
from model import Architecture, ModelConfig

CONTEXT = 5e8  # bytes of a GPU's memory that CUDA and its libraries take


@dataclass
class Settings(Architecture):
    out_dir: str = "out"  # checkpoints and log
    dataset: str = "sanguo"  # a name under data/, or a path; several: news:3,novels:1
    mix_weight: Annotated[float, at_least(0)] = 0.5  # of the texts beside questions in a mixture
    init_from: str = "scratch"  # or an out_dir, a Hugging Face directory, nanoGPT's ckpt.pt
    resume: bool = False  # go on from out_dir's latest checkpoint, if there is one
    dry_run: bool = False  # print parameters, memory and time expected, and stop
    seed: Annotated[int, at_least(0), below(2**63)] = 1337  # of weights, order of rows and dropout
    max_iters: Annotated[int | None, at_least(1)] = None  # steps; None: epochs, else 2000
    epochs: Annotated[float | None, above(0), at_most(1e6)] = None  # readings of the data instead
    batch_size: Annotated[int, at_least(1)] = 16  # rows of a micro-batch, computed at once
    gradient_accumulation_steps: Annotated[int, at_least(1)] = 1  # x batch_size: rows of a step
    short_block: Annotated[int | None, at_least(1)] = None  # tokens of rows, first half of decay
    lora_rank: Annotated[int, at_least(0)] = 0  # of adapters on a frozen init_from; 0: train all
    lora_alpha: Annotated[float, above(0)] = 16.0  # adapters add lora_alpha / lora_rank x B A
    lora_targets: list[str] | None = None  # names of Linears; None: all those of the blocks
    beta: Annotated[float, at_least(0)] = 0.1  # of preferences, marks, rewards: how near to stay
    dpo_sft_weight: Annotated[float, at_least(0)] = 0.0  # of the chosen answers' mean loss
    reward: list[str] = field(default_factory=list)  # chrf, bleu, rouge_l, form, or a file.py
    num_samples: Annotated[int, at_least(2)] = 8  # with reward: answers to each question
    optimizer: Literal["muon", "adamw"] = "muon"  # of the blocks' matrices; AdamW for all else
    learning_rate: Annotated[float, at_least(0)] = 1e-3  # at its highest
    embedding_lr: Annotated[float | None, at_least(0)] = None  # of embeddings and head
    warmup_iters: Annotated[int, at_least(0)] = 50  # steps of linear rise
    lr_decay_iters: Annotated[int | None, at_least(1)] = None  # where min_lr is; None: max_iters
    min_lr: Annotated[float, at_least(0)] = 0.0  # learning rate at the end of the linear decay
    weight_decay: Annotated[float, at_least(0)] = 0.1  # of matrices, not of norms and biases
    embedding_decay: Annotated[float | None, at_least(0)] = None  # of embeddings and head
    beta1: Annotated[float, at_least(0), below(1)] = 0.9  # AdamW
    beta2: Annotated[float, at_least(0), below(1)] = 0.95  # AdamW
    grad_clip: Annotated[float, at_least(0)] = 1.0  # norm gradients are clipped to; 0 is off
    eval_interval: Annotated[int, at_least(1)] = 250  # steps between evaluations and checkpoints
    keep_last: Annotated[int, at_least(1)] = 1  # newest checkpoints kept, besides the best one
    best_by: Literal["val_loss", "last"] = "val_loss"  # what sampling and init_from take
    patience: Annotated[int | None, at_least(1)] = None  # evaluations without a better one; off
    log_interval: Annotated[int, at_least(1)] = 10  # steps between lines of log.jsonl
    track: list[str] = field(default_factory=list)  # tensorboard, wandb, trackio, swanlab
    prompts: list[str] | None = None  # of samples at evaluations; None: of the data; empty: none
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # bfloat16 where it is native
    compile: bool | None = None  # torch.compile; None: where it can be had and pays
    checkpoint_activations: bool = False  # compute blocks again in the backward pass: less memory
    shard: bool = False  # shard weights, gradients and moments over processes: less memory

    def __post_init__(self):
        super().__post_init__()
        if self.embedding_lr and not self.learning_rate:
            raise UserError(
                f"embedding_lr={self.embedding_lr:g} follows the schedule of learning_rate, which "
                "is 0; raise it, or leave embedding_lr out"
            )
        if self.short_block is not None and self.block_size % self.short_block:
            raise UserError(
                f"short_block={self.short_block} must divide block_size={self.block_size}"
            )
        for name in ("checkpoint_activations", "shard", "compile"):
            if getattr(self, name) and self.model == "lstm":
                raise UserError(f"{name}=True is for model='gpt'; leave it out")
        check_trackers(self.track)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def decay_end(self) -> int:
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters


@dataclass
class Progress:
    """Where a run stands: with the weights and the optimizer, all that resuming needs."""

    iter: int = 0  # steps done
    rows: int = 0  # training rows consumed
    tokens: int = 0  # input tokens seen, padding left out
    seconds: float = 0.0  # of training and evaluation
    best_val_loss: float | None = None  # nats per target
    worse: int = 0  # evaluations since the best one

    def is_finished(self, config: Settings) -> bool:
        out_of_patience = config.patience is not None and self.worse >= config.patience
        return self.iter >= config.max_iters or out_of_patience


@dataclass(frozen=True)
class Run:
    """What stays as it is while a run trains."""

    config: Settings
    out_dir: Path
    data: Dataset | Mixture
    objective: Objective
    device: str
    world: World  # the processes of which this is one
    adapter: dict | None  # what run.json says of the adapter that is trained


@dataclass
class State:
    """What training changes."""

    model: torch.nn.Module
    loss: torch.nn.Module  # the objective's sums; its gradients are those of all processes
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # of losses under float16; does nothing otherwise
    progress: Progress


def main(argv: list[str]) -> None:
    startup = Stopwatch()
    with distributed.together() as world, alone_in_out_dir(argv, world) as check_out_dir:
        if configure(Settings, argv).dry_run:  # whole rows: short ones take less memory and time
            argv = [*argv, "--short_block=None"]
        run, state = start(argv, world, startup)
        peak = devices.find_peak(run.device, devices.pick_dtype(run.config.dtype, run.device))
        peak = dataclasses.replace(peak, rate=peak.rate * world.size)
        startup.lap("peak")
        print(headline(run, state, peak))
        if run.config.dry_run:
            dry_run(run, state, peak)
        elif state.progress.is_finished(run.config):
            print(f"finished at step {state.progress.iter}, nothing to do")
        else:
            train(run, state, peak, startup, check_out_dir)


def alone_in_out_dir(argv: list[str], world: World):
    """The first process holds the out_dir for all: it is the one that writes."""
    config = configure(Settings, argv)
    writes = world.is_first and not config.dry_run
    return checkpoints.claimed(repo_path(config.out_dir)) if writes else nullcontext(lambda: None)


# --- the start ---------------------------------------------------------------------------------


def start(
    argv: list[str], world: World = ALONE, startup: Stopwatch | None = None
) -> tuple[Run, State]:
    """A run at its first step, or where its latest checkpoint stands."""
    startup = startup or Stopwatch()
    devices.keep_freed_memory()
    config, begins, data = read_settings(argv)
    device = devices.pick_device(config.device)
    preflight.check(config, begins, data, device, world)
    startup.lap("data")
    device = distributed.join(world, device)
    startup.lap("processes")
    torch.manual_seed(config.seed)
    out_dir = repo_path(config.out_dir)
    model, checkpoint = load_model(config, begins, data, world, device)
    progress = Progress()
    if begins.resumes:
        saved = begins.run["progress"]
        progress = checkpoints.typed(
            checkpoint.path, Progress, lambda: {name: saved[name] for name in vars(progress)}
        )
    compiles, why = False, "an LSTM has no blocks"
    if config.model == "gpt":
        work = work_left(config, data, model, progress.iter)
        compiles, why = compiling.decide(config.compile, device, work)
    print(f"steps are {'' if compiles else 'not '}compiled: {why}")
    config = dataclasses.replace(config, compile=compiles)  # a run that is resumed keeps to it
    if begins.resumes:
        preflight.note_changes(begins.run, config, device, world)
    objective = objective_of(config, data)(config, data, device, world)
    adapter = prepare_model(config, begins, model, checkpoint, objective, world)
    if config.shard and world.size > 1:
        distributed.shard(model, device, world)
    scaled = devices.pick_dtype(config.dtype, device) == torch.float16
    state = State(
        model,
        LossModule(model, objective.sums),
        make_optimizers(model, config, device),
        torch.amp.GradScaler(torch.device(device).type, enabled=scaled),
        progress,
    )
    if begins.resumes:
        checkpoints.load_optimizers(checkpoint.path, model, state.optimizers)
        if begins.run["scaler"]:
            state.scaler.load_state_dict(begins.run["scaler"])
        if world.is_first and not config.dry_run:
            checkpoints.rewind(out_dir)
    preflight.check_same_steps(config, data, state.progress.iter, device, world)
    if world.size > 1 and not distributed.is_sharded(model):
        state.loss = distributed.replicate(state.loss)
    startup.lap("model")
    return Run(config, out_dir, data, objective, device, world, adapter), state


def read_settings(argv: list[str]) -> tuple[Settings, Start, Dataset | Mixture]:
    """The settings, with those that a checkpoint brings; the checkpoint; the data."""
    asked = config = configure(Settings, argv)
    begins = preflight.find_start(config, argv)
    if begins.run:
        changes = {"out_dir": config.out_dir}  # it may have been renamed
        if not begins.resumes:
            objective = objective_of(config, open_dataset(config.dataset))
            changes = {"dropout": 0.0} if objective.needs_a_model else {}  # it would be noise
        config = configure(Settings, argv, begins.settings() | changes)
    data = open_dataset(config.dataset)
    max_iters = preflight.count_steps(config, asked, argv, data, begins)
    return dataclasses.replace(config, max_iters=max_iters, epochs=None), begins, data


def load_model(
    config: Settings, begins: Start, data: Dataset | Mixture, world: World, device: str
) -> tuple[torch.nn.Module, Checkpoint | None]:
    """The model that a run goes on from, or a new one; whole, even if it will be sharded."""
    place = "cpu" if config.shard and world.size > 1 else device
    if not begins.run:
        model_config = ModelConfig(**architecture(vars(config)), n_vocab=data.tokenizer.n_vocab)
        return checkpoints.MODELS[config.model](model_config).to(place), None
    checkpoint = checkpoints.load_checkpoint(
        begins.path,
        "latest" if begins.resumes else "best",
        place,
        merged=not begins.resumes,
        frozen=bool(config.lora_rank),
        dropout=config.dropout,
        block_size=config.block_size,
    )
    data.check_tokenizer(checkpoint.tokenizer, checkpoint.path)
    return checkpoint.model.train(), checkpoint


def work_left(
    config: Settings, data: Dataset | Mixture, model: torch.nn.Module, step: int
) -> float:
    """Operations of the steps from this one on, from the mean length of some rows."""
    some = data.step_rows(config.seed, 0, 64 * config.rows_per_step, config.block_size)
    length = data.input_tokens(some, config.block_size) / len(some)
    samples = config.num_samples if config.reward else 1
    rows = (config.max_iters - step) * config.rows_per_step * samples
    return rows * length * model.flops_per_token(length)


def prepare_model(
    config: Settings,
    begins: Start,
    model: torch.nn.Module,
    checkpoint: Checkpoint | None,
    objective: Objective,
    world: World,
) -> dict | None:
    """Adds adapters if settings ask for some -> what run.json says of them."""
    adapter = None
    if begins.resumes:
        adapter = begins.run.get("adapter")
        objective.restore(begins.run)
    elif config.lora_rank:
        if world.is_first and not config.dry_run:
            checkpoints.keep_base(checkpoint.path, repo_path(config.out_dir))
        shape = (config.lora_rank, config.lora_alpha, config.lora_targets or ["blocks"])
        adapter = checkpoints.adapter_of(repo_path(config.out_dir), checkpoint.path, *shape)
        add_adapters(model, *shape)
    elif checkpoint:
        objective.start_from(checkpoint.path)
    for module in adapters(model).values():
        module.drop.p = config.dropout
    model.checkpoint_activations = config.checkpoint_activations
    return adapter


# --- the loop ----------------------------------------------------------------------------------


def train(
    run: Run, state: State, peak: Peak, startup: Stopwatch, check_out_dir: Callable[[], None]
) -> None:
    """Step, log, evaluate, save; until max_iters, out of patience or Ctrl-C.

    check_out_dir: raises UserError if out_dir is no longer this run's.
    """
    config, progress, world = run.config, state.progress, run.world
    if config.compile:
        compiling.compile_blocks(state.model)
    # run.json's part that sampling asks for
    view = Checkpoint(run.out_dir, state.model, run.data.tokenizer, {"dataset": identity(run.data)})
    prompts = monitor.sample_prompts(view, run.data, config.prompts)
    if world.is_first and progress.iter == 0:
        checkpoints.rewind(run.out_dir)
    run.objective.begin(state.model, run.out_dir, progress.iter)
    startup.lap("objective")
    track = config.track if world.is_first else []
    with (
        open_trackers(track, run.out_dir, progress.iter, dataclasses.asdict(config)) as trackers,
        monitor.catch_interrupt(world) as interrupts,
        monitor.progress_bar(run.out_dir.name, config.max_iters, progress.iter, world) as bar,
    ):
        began, window, first = time.perf_counter() - progress.seconds, Window(), True
        for batches, counts, tokens in steps(run, state):
            losses, grad_norm = train_step(run, state, batches, counts)
            progress.iter += 1
            progress.rows += config.rows_per_step
            progress.tokens += tokens
            window.add(losses, grad_norm, config.rows_per_step, tokens)
            bar.update()
            if first:
                grad_norm.item()  # waits for a GPU
                startup.lap("first step")
                bar.write(str(startup), file=sys.stdout)
                first = False
            stops = world.any(bool(interrupts))
            evaluates = progress.iter % config.eval_interval == 0 or progress.is_finished(config)
            if not (evaluates or stops or progress.iter % config.log_interval == 0):
                continue
            check_steps(run, state, window)
            record = log_record(run, state, window, peak, time.perf_counter() - began)
            rate = f"{devices.show_rate(record['tflops'] * 1e12)}, {record['mfu']:.0%} of peak"
            bar.set_postfix_str(f"{show_loss(record)}, {rate}", refresh=False)
            samples = []
            if evaluates:
                record |= evaluate(run, state)
                bar.write(evaluation_line(run, record), file=sys.stdout)
                samples = sample(run, state, view, prompts)
                for text in samples:
                    bar.write(text, file=sys.stdout)
            progress.seconds = time.perf_counter() - began
            if world.is_first:
                check_out_dir()
                checkpoints.append_log(run.out_dir, record)
            if evaluates or stops:
                lowest = evaluates and progress.worse == 0
                is_last_best = config.best_by == "last" or "val" not in run.data.splits
                save(run, state, is_best=lowest or is_last_best)
            for tracker in trackers:
                tracker.log(record, "\n".join(samples))
            if stops or progress.is_finished(config):
                break
            window = Window()
    end(run, progress, interrupts)


def steps(run: Run, state: State) -> Iterator[tuple[list[Batch], dict[str, int], int]]:
    """For each step from here on: its micro-batches on the device, the counts of all processes,
    the tokens of all. Each is made while a GPU still computes the one before."""
    objective, rows, number = run.objective, state.progress.rows, state.progress.iter
    pending = None
    while True:
        batches, tokens = objective.batches(rows, number)
        counts = objective.counts(batches)
        counts = dict(zip(counts, run.world.sums(list(counts.values())), strict=True))
        on_device = [objective.to_device(batch) for batch in batches]
        if pending:
            yield pending
        pending = on_device, counts, tokens
        if objective.needs_newest_weights:
            yield pending
            pending = None
        rows, number = rows + run.config.rows_per_step, number + 1


def train_step(
    run: Run, state: State, batches: list[Batch], counts: dict[str, int]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One step of the optimizers -> what each of this process's micro-batches adds to the mean of
    each term, (micro-batches,); the norm of the whole gradient, a scalar."""
    config, world, weights = run.config, run.world, run.objective.weights
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.progress.iter, config) * group["lr_ratio"]
    # a step may lack a term: a mixture's rows may be of one kind
    had = [name for name, count in counts.items() if count] or ["loss"]
    losses = {name: torch.zeros(len(batches), device=run.device) for name in had}
    for micro, batch in enumerate(batches):
        seed_dropout(config.seed, state.progress.iter, micro, world.rank)
        with nullcontext() if micro == len(batches) - 1 else state.loss.no_sync():
            sums = state.loss(batch)
            means = {name: total / max(1, counts[name]) for name, total in sums.items()}
            loss = sum(weights[name] * mean for name, mean in means.items() if name in weights)
            # the processes' gradients are averaged, and counts are already those of all
            state.scaler.scale(loss * world.size).backward()
        for name in means.keys() & losses:
            losses[name][micro] += means[name].detach()
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    limit = config.grad_clip or math.inf
    grad_norm = distributed.whole(torch.nn.utils.clip_grad_norm_(state.model.parameters(), limit))
    # the scaler looks at each optimizer's gradients alone, but clipping has spread what is infinite
    usable = not state.scaler.is_enabled() or grad_norm.isfinite()
    for optimizer in state.optimizers:
        if usable:
            state.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    state.scaler.update()
    return losses, grad_norm


def seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    """Dropout depends on (seed, step, micro-batch, process) alone, so a resumed run draws the same;
    the first process draws what a run of one process does."""
    words = [seed, step, micro, rank] if rank else [seed, step, micro]
    torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))


def evaluate(run: Run, state: State) -> dict[str, float]:
    """The objective's scores on the whole validation split, none without one; keeps count of the
    best. Raises UserError if a score is no number: nothing is saved then."""
    if "val" not in run.data.splits:
        return {}
    scores, progress = run.objective.evaluate(state.model), state.progress
    if not all(map(math.isfinite, scores.values())):
        raise UserError(
            f"the validation loss is {scores['val_loss']} after step {progress.iter}; lower "
            f"--learning_rate={run.config.learning_rate:g}; {checkpoints.what_stays(run.out_dir)}"
        )
    if progress.best_val_loss is None or scores["val_loss"] < progress.best_val_loss:
        progress.best_val_loss, progress.worse = scores["val_loss"], 0
    else:
        progress.worse += 1
    return scores


def sample(run: Run, state: State, view: Checkpoint, prompts: list) -> list[str]:
    """What the first process shows of the model; all help to gather one that is sharded."""
    if not prompts:
        return []
    view.model = checkpoints.whole_model(state.model, run.adapter, run.world)
    texts = []
    if run.world.is_first:
        texts = monitor.write_samples(view, prompts, run.config.seed, run.config.compile)
    view.model = state.model  # one that was gathered is freed
    return texts


def save(run: Run, state: State, is_best: bool) -> None:
    """A checkpoint of the run as it stands."""
    # not those of an instance, whose n_kv_head follows from its own n_head
    settings, defaults = dataclasses.asdict(run.config), defaults_of(Settings)
    record = {
        "settings": settings,
        "changed": [name for name in settings if settings[name] != defaults[name]],
        "dataset": identity(run.data),
        "tokenizer_sha256": run.data.tokenizer.sha256,
        "progress": dataclasses.asdict(state.progress),
        "scaler": state.scaler.state_dict(),
        "environment": preflight.run_environment(run.config, run.device, run.world),
        **({"adapter": run.adapter} if run.adapter else {}),
        **run.objective.saved(),
    }
    tokenizer = run.data.tokenizer
    checkpoints.save_checkpoint(
        run.out_dir, state.model, state.optimizers, tokenizer, record, is_best, run.world
    )


def identity(data: Dataset | Mixture) -> dict[str, str]:
    """What run.json says of a dataset."""
    facts = {"name": data.name, "kind": data.kind, "fingerprint": data.fingerprint}
    return facts | {key: data.meta[key] for key in ("question_end",) if key in data.meta}


def end(run: Run, progress: Progress, interrupts: list[int]) -> None:
    """Says how the run ended; exits as a signal wants it."""
    if not progress.is_finished(run.config):
        print(
            f"stopped at step {progress.iter} and saved; go on with\n"
            f"  {run.world.launcher} train.py --out_dir={shlex.quote(run.config.out_dir)} --resume"
        )
        sys.exit(128 + (interrupts or [signal.SIGINT])[0])
    why = "" if progress.iter == run.config.max_iters else " (out of patience)"
    best = f"best validation loss {progress.best_val_loss:.3f}; " if progress.best_val_loss else ""
    print(
        f"finished at step {progress.iter}{why} in {progress.seconds:.0f} s; "
        f"{best}{show_path(run.out_dir)} is ready"
    )


# --- what a run says of itself -----------------------------------------------------------------


def headline(run: Run, state: State, peak: Peak) -> str:
    """What is printed of a run before it begins."""
    config, size = run.config, run.world.size
    rows = run.data.n_rows("train", config.block_size)
    trained = f", {n_trained(state.model) / 1e6:.2f}M of them trained," if run.adapter else ""
    processes = f" in {size} processes" if size > 1 else ""
    left = config.max_iters - state.progress.iter
    epochs = (state.progress.rows + left * config.rows_per_step) / run.data.epoch(config.block_size)
    first = f" of {run.data.parts[0].name}" if isinstance(run.data, Mixture) else ""
    return (
        f"{show_path(run.out_dir)}: {state.model.n_params() / 1e6:.2f}M parameters{trained} on "
        f"{run.device}{processes} ({peak}); {rows:,} {run.objective.unit} of {run.data.name}; "
        f"{config.max_iters:,} steps of {config.rows_per_step} are {epochs:.3g} epochs{first}"
    )


def n_trained(model: torch.nn.Module) -> int:
    """Parameters that are trained: all, or those of adapters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def log_record(
    run: Run, state: State, window: Window, peak: Peak, seconds: float
) -> dict[str, float]:
    """A line of log.jsonl, without what an evaluation adds."""
    progress = state.progress
    length = run.objective.row_length(window.tokens, window.rows, progress.iter - 1)
    return {
        "iter": progress.iter,
        "tokens": progress.tokens,
        "seconds": round(seconds, 3),
        **window.means(run.world),
        "lr": learning_rate(progress.iter - 1, run.config),
        "grad_norm": window.norms[-1].item(),
        **window.speed(state.model.flops_per_token(length), peak.rate),
    }


def evaluation_line(run: Run, record: dict) -> str:
    line = f"step {record['iter']}: {show_loss(record)} in training"
    return f"{line}, {run.objective.describe(record)}" if "val_loss" in record else line


def show_loss(record: dict) -> str:
    if "reward" in record:
        return f"reward {record['reward']:.3f}"
    name = next(name for name in record if name.startswith("train_loss"))
    return f"{name.removeprefix('train_')} {record[name]:.3f}"


def check_steps(run: Run, state: State, window: Window) -> None:
    """Raises UserError if one of the window's steps had a loss or a gradient that is no number:
    which step, and what it read."""
    fault = window.find_fault(run.world, tolerates_norms=state.scaler.is_enabled())
    if not fault:
        return
    step = state.progress.iter - fault.steps_ago
    if fault.micro is None:
        what = f"norm of the gradient is nan or infinite at step {step}, of all its micro-batches"
    else:
        rows = state.progress.rows - (1 + fault.steps_ago) * run.config.rows_per_step
        process = f" of process {fault.rank}" if run.world.size > 1 else ""
        shown = run.objective.show_rows(rows, step - 1, fault.rank, fault.micro)
        what = (
            f"loss is nan or infinite at step {step}, of micro-batch {fault.micro + 1}{process}, "
            f"which has {shown}"
        )
    raise UserError(
        f"the {what}; lower --learning_rate={run.config.learning_rate:g}, or mend the rows; "
        f"{checkpoints.what_stays(run.out_dir)}"
    )


def dry_run(run: Run, state: State, peak: Peak, timed: int = 3) -> None:
    """Prints parameters, memory and time expected, from a few steps that are not kept."""
    run.objective.begin(state.model, None, 0)
    batches, counts, _ = next(steps(run, state))
    of_each_term = {batch.term: batch for batch in batches}.values()  # not held together
    activations = max(activation_bytes(run, state, batch) for batch in of_each_term)
    if run.config.compile:
        compiling.compile_blocks(state.model)
    train_step(run, state, batches, counts)  # warms up
    devices.synchronize(run.device)
    window, made = Window(), steps(run, state)
    for _ in range(timed):
        batches, counts, tokens = next(made)
        losses, grad_norm = train_step(run, state, batches, counts)
        window.add(losses, grad_norm, run.config.rows_per_step, tokens)
    grad_norm.item()  # waits for a GPU
    seconds = window.seconds() / timed
    length = run.objective.row_length(window.tokens, window.rows, 0)
    rate = window.tokens / timed / seconds
    flops = rate * state.model.flops_per_token(length)
    parameters, trained = state.model.n_params(), n_trained(state.model)
    # weights and gradients; two moments of each parameter (AdamW), or one (Muon)
    moments = [t for o in state.optimizers for s in o.state.values() for t in s.values()]
    tensors = [*state.model.parameters(), *moments]
    kept = 4 * trained + sum(tensor.nbytes for tensor in tensors)
    left = run.config.max_iters - state.progress.iter
    used = devices.peak_memory(run.device) or kept + activations
    print(
        f"parameters  {parameters:,}{f', {trained:,} of them trained' if run.adapter else ''}\n"
        f"memory      {used / 1e9:.2f} GB at its highest: {kept / 1e9:.2f} of weights, "
        f"gradients and optimizer, {activations / 1e9:.2f} of activations\n"
        f"{on_a_gpu(run, kept + activations)}"
        f"speed       {rate:,.0f} tokens per second, {seconds:.3f} s a step\n"
        f"            {devices.show_rate(flops)}, {flops / peak.rate:.0%} of the peak\n"
        f"time        {left * seconds / 60:.1f} minutes for {left:,} steps, evaluations left out"
    )


def on_a_gpu(run: Run, known: int) -> str:
    """A line on the memory that the run would take on a GPU, where there is none; known: bytes of
    weights, gradients, moments and activations here."""
    config, n_vocab = run.config, run.data.tokenizer.n_vocab
    if run.device != "cpu" or config.model != "gpt":
        return ""
    # a chunk's logits and their gradient in half precision, log-probabilities in float32
    rows = chunk_sizes(config.batch_size * config.block_size, n_vocab, "cuda")[0]
    total = known + 8 * rows * n_vocab + CONTEXT
    return f"            on a GPU about {total / 1e9:.1f} GB, an estimate\n"


def activation_bytes(run: Run, state: State, batch: Batch) -> int:
    """What a forward pass keeps for the backward pass, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    saved = {}  # storages: address -> bytes

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run.objective.sums(state.model, batch)
    return sum(size for address, size in saved.items() if address not in weights)


if __name__ == "__main__":
    command(main)
