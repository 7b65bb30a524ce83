"""Trains a model: settings, schedule, optimizer, and the one loop for every stage.

python train.py config/pretrain_sanguo.py
python train.py config/sft_sanguo.py --learning_rate=5e-4
python train.py --out_dir=out-sanguo --resume
python train.py --init_from=out-sanguo --dataset=mine --lora_rank=8 --out_dir=out-lora
torchrun --standalone --nproc_per_node=2 train.py config/pretrain_sanguo.py
"""

import ctypes
import dataclasses
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError, command, configure, no_memory, repo_path, show_path
from data_utils import Dataset, Mixture, open_dataset
from lstm_model import LSTM
from miniglm.checkpoint import (
    MODELS,
    Checkpoint,
    adapter_of,
    append_log,
    claimed,
    environment,
    has_checkpoint,
    has_model,
    keep_base,
    load_checkpoint,
    load_optimizers,
    load_reference,
    read_run,
    rewind,
    save_checkpoint,
    save_reference,
    tracking_id,
    weights_sha256,
    what_stays,
    whole_model,
)
from miniglm.devices import Peak, find_peak, show_rate
from miniglm.distributed import (
    ALONE,
    Objective,
    World,
    is_sharded,
    join,
    replicate,
    shard,
    together,
    whole,
)
from miniglm.lora import PARTS, adapters, add_adapters
from miniglm.objectives import (
    PREFERENCES,
    all_log_probs,
    count_pairs,
    count_terms,
    next_token,
    preferences,
    split_preferences,
    split_sums,
    to_device,
)
from miniglm.optim import Muon
from miniglm.tokenizer import Tokenizer
from miniglm.trackers import Tracked, check_trackers, open_trackers
from miniglm.watch import Stopwatch, sample_prompts, write_samples
from model import GPT, Architecture, ModelConfig, pick_device


@dataclass
class Settings(Architecture):
    out_dir: str = "out"  # checkpoints and log
    dataset: str = "sanguo"  # a name under data/, or a path; several texts: news:3,novels:1
    init_from: str = "scratch"  # or an out_dir, a Hugging Face directory, nanoGPT's ckpt.pt
    resume: bool = False  # go on from out_dir's latest checkpoint, if there is one
    dry_run: bool = False  # print parameters, memory and time expected, and stop
    seed: int = 1337  # of weights, order of rows and dropout
    max_iters: int = 2000  # steps of the optimizer
    batch_size: int = 16  # rows of a micro-batch, the most that a process computes at once
    mix_dataset: str | None = None  # mixed in as a term of its own: pretraining text, say
    mix_batch_size: int = 4  # rows of it in each micro-batch, beside batch_size
    mix_weight: float = 1.0  # of its mean loss, beside the dataset's own at 1
    lora_rank: int = (
        0  # of adapters on a frozen model of init_from, miniglm/lora.py; 0: train all of it
    )
    lora_alpha: float = 16.0  # what adapters add is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # of what adapters read
    lora_targets: list[str] | None = None  # names of Linears; None: all those of the blocks
    dpo_beta: float = 0.1  # of preference pairs: how much their log-probabilities count
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"  # arXiv 2305.18290, or 2310.12036
    dpo_label_smoothing: float = 0.0  # share of pairs marked the wrong way round; sigmoid only
    dpo_per_token: bool = False  # log-probabilities are means over an answer's tokens, not sums
    dpo_sft_weight: float = 0.0  # of the mean loss of the chosen answers, beside the pairs' at 1
    gradient_accumulation_steps: int = 1  # x batch_size: rows of a step, whoever computes them
    short_block: int | None = None  # rows of text are first cut to this many tokens; None: never
    short_iters: int | None = None  # steps with such rows; None is half of max_iters
    optimizer: Literal["muon", "adamw"] = "muon"  # of the blocks' matrices; AdamW for all else
    learning_rate: float = 1e-3  # at its highest
    embedding_lr: float | None = None  # of embeddings and head at its highest; None: the same
    warmup_iters: int = 50  # steps of linear rise
    lr_decay_iters: int | None = None  # step at which min_lr is reached; None is max_iters
    min_lr: float = 0.0  # learning rate at the end of the linear decay
    weight_decay: float = 0.1  # of matrices, not of norms and biases
    embedding_decay: float | None = None  # of embeddings and head; None: the same
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # norm that gradients are clipped to; 0 is off
    skip_spikes: float = 0.0  # leave out updates of this many times the usual norm; 0 is off
    eval_interval: int = 250  # steps between evaluations, each with a checkpoint
    keep_last: int = 1  # newest checkpoints that stay, besides the best one
    best_by: Literal["val_loss", "last"] = "val_loss"  # what sampling and init_from take
    patience: int | None = None  # evaluations without a lower validation loss before it stops
    log_interval: int = 10  # steps between lines of log.jsonl
    track: list[str] = field(default_factory=list)  # tensorboard, wandb, trackio, swanlab
    prompts: list[str] | None = None  # of samples at evaluations; None: from val.bin; empty: none
    device: str = "auto"  # cuda, mps, cpu; auto is the first of them that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # bfloat16 where it is native
    compile: bool | None = None  # torch.compile; None: on CUDA, where triton serves it
    checkpoint_activations: bool = False  # compute blocks anew in the backward pass: less memory
    shard: bool = False  # share weights, gradients and moments out among processes: less memory

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_iters", "batch_size", "gradient_accumulation_steps", "eval_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("learning_rate", "min_lr", "warmup_iters", "weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if self.mix_batch_size < 1:
            raise UserError(f"mix_batch_size={self.mix_batch_size} must be 1 or more")
        if self.mix_weight < 0:
            raise UserError(f"mix_weight={self.mix_weight:g} must not be negative")
        for name in ("embedding_lr", "embedding_decay"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name}={getattr(self, name):g} must not be negative")
        if self.embedding_lr and not self.learning_rate:
            raise UserError(
                f"embedding_lr={self.embedding_lr:g} follows the schedule of learning_rate, which "
                "is 0; raise it, or leave embedding_lr out"
            )
        if self.short_block is not None and (
            self.short_block < 1 or self.block_size % self.short_block
        ):
            raise UserError(
                f"short_block={self.short_block} must divide block_size={self.block_size}"
            )
        if self.short_iters is not None and self.short_iters < 0:
            raise UserError(f"short_iters={self.short_iters} must not be negative")
        if self.skip_spikes and not self.skip_spikes > 1:
            raise UserError(f"skip_spikes={self.skip_spikes:g} must be above 1, or 0, which is off")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name):g} must be at least 0 and below 1")
        if self.keep_last < 1:
            raise UserError(f"keep_last={self.keep_last} must be 1 or more")
        if self.log_interval < 1 or (self.patience is not None and self.patience < 1):
            raise UserError("log_interval and patience must be 1 or more")
        for name in ("checkpoint_activations", "shard"):
            if getattr(self, name) and self.model == "lstm":
                raise UserError(f"{name}=True is for model='gpt'; leave it out")
        if self.lora_rank < 0 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise UserError(
                f"lora_rank={self.lora_rank} must not be negative, lora_alpha={self.lora_alpha:g} "
                f"be above 0, lora_dropout={self.lora_dropout:g} at least 0 and below 1"
            )
        if self.dpo_beta <= 0 or self.dpo_sft_weight < 0:
            raise UserError(
                f"dpo_beta={self.dpo_beta:g} must be above 0, and "
                f"dpo_sft_weight={self.dpo_sft_weight:g} not negative"
            )
        if not 0 <= self.dpo_label_smoothing < 0.5 or (
            self.dpo_label_smoothing and self.dpo_loss == "ipo"
        ):
            raise UserError(
                f"dpo_label_smoothing={self.dpo_label_smoothing:g} must be at least 0 and below "
                "0.5, and goes with dpo_loss='sigmoid' only"
            )
        check_trackers(self.track)

    def dpo(self) -> dict:
        """What objectives.preferences takes."""
        names = {"beta": "dpo_beta", "form": "dpo_loss", "label_smoothing": "dpo_label_smoothing"}
        names |= {"per_token": "dpo_per_token"}
        return {name: getattr(self, setting) for name, setting in names.items()}


@dataclass
class Progress:
    """Where a run stands: with the weights and the optimizer, all that resuming needs."""

    iter: int = 0  # steps done
    rows: int = 0  # training rows consumed
    tokens: int = 0  # input tokens seen, padding left out
    seconds: float = 0.0  # of training and evaluation
    best_val_loss: float | None = None  # nats per target
    worse: int = 0  # evaluations since the best one
    norms: list[float] = field(default_factory=list)  # of the latest updates, with skip_spikes
    skipped: int = 0  # updates that skip_spikes left out
    skipped_in_a_row: int = 0

    def is_finished(self, config: Settings) -> bool:
        out_of_patience = config.patience is not None and self.worse >= config.patience
        return self.iter >= config.max_iters or out_of_patience


@dataclass
class Run:
    """All that a run holds."""

    config: Settings
    out_dir: Path
    data: Dataset | Mixture
    tokenizer: Tokenizer
    model: GPT | LSTM
    optimizers: list[torch.optim.Optimizer]
    progress: Progress
    device: str
    scaler: torch.amp.GradScaler
    startup: Stopwatch
    mix: Dataset | None = None  # the one of mix_dataset
    adapter: dict | None = None  # what run.json says of the adapter that is trained
    reference_key: dict | None = None  # of which model and data the reference's log-probs are
    reference: dict[str, torch.Tensor] | None = None  # them, (pairs, 2) a split
    world: World = ALONE  # the processes of which this is one
    objective: torch.nn.Module | None = None  # term_sums, with gradients that are all processes'

    def __post_init__(self):
        self.objective = Objective(self.model, partial(term_sums, self))
        if self.world.size > 1 and not is_sharded(self.model):
            self.objective = replicate(self.objective)


def main(argv: list[str]) -> None:
    with together() as world, alone_in_out_dir(argv, world) as check_out_dir:
        run = start(argv, world)
        peak = find_peak(run.device, pick_dtype(run.config, run.device))
        peak = dataclasses.replace(peak, rate=peak.rate * world.size)
        run.startup.lap("peak")
        print(headline(run, peak))
        if run.config.dry_run:
            dry_run(run, peak)
        elif run.progress.is_finished(run.config):
            print(f"finished at step {run.progress.iter}, nothing to do")
        else:
            with told_of_memory(run):
                train(run, peak, check_out_dir)


def alone_in_out_dir(argv: list[str], world: World) -> AbstractContextManager[Callable[[], None]]:
    """The first process holds the out_dir for all: it is the one that writes."""
    config = configure(Settings, argv)
    writes = world.is_first and not config.dry_run
    return claimed(repo_path(config.out_dir)) if writes else nullcontext(lambda: None)


@contextmanager
def told_of_memory(run: Run) -> Iterator[None]:
    """Says which settings to lower where there is no memory left."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (said := no_memory(error)):
            raise
        config = run.config
        lower = (
            f"lower --batch_size={config.batch_size} and raise --gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} as much, for steps of as many rows"
        )
        if config.model == "gpt" and not config.checkpoint_activations:
            lower += ", or pass --checkpoint_activations"
        raise UserError(
            f"out of memory after step {run.progress.iter} ({said}); {lower}, or lower "
            f"--block_size={config.block_size}; {what_stays(run.out_dir)}"
        ) from None


def headline(run: Run, peak: Peak) -> str:
    """What is printed of a run before it begins."""
    rows = run.data.n_rows("train", run.config.block_size)
    size = run.world.size
    return (
        f"{show_path(run.out_dir)}: {run.model.n_params() / 1e6:.2f}M parameters"
        + (f", {n_trained(run.model) / 1e6:.2f}M of them trained," if run.adapter else "")
        + f" on {run.device}{f' in {size} processes' if size > 1 else ''} ({peak}); {rows:,} "
        f"{'pairs' if run.data.kind == 'dpo' else 'rows'} of {run.data.name}, "
        f"{rows_per_step(run.config)} a step"
        + (f", and {mix_rows_per_step(run.config)} of {run.mix.name}" if run.mix else "")
    )


def start(argv: list[str], world: World = ALONE) -> Run:
    """A run at its first step, or where its latest checkpoint stands."""
    startup = Stopwatch()
    keep_freed_memory()
    config = configure(Settings, argv)
    out_dir = repo_path(config.out_dir)
    resumes = config.resume and has_checkpoint(out_dir)
    if has_checkpoint(out_dir) and not config.resume and not config.dry_run:
        raise UserError(
            f"{show_path(out_dir)} already holds a run; pass --resume to go on with it, "
            "or another --out_dir="
        )
    source, which = (out_dir, "latest") if resumes else (repo_path(config.init_from), "best")
    saved = None
    if not resumes and config.init_from != "scratch" and not has_model(source):
        raise UserError(
            f"no checkpoint in {show_path(source)}; train it first, or pass --init_from="
        )
    if resumes or config.init_from != "scratch":
        saved = read_run(source, which)
        # what the checkpoint has stands, unless argv says otherwise
        # a run that is older than the setting `optimizer` had AdamW
        saved["settings"] = {"optimizer": "adamw"} | saved["settings"]
        if resumes:
            base = saved["settings"] | {"out_dir": config.out_dir}  # it may have been renamed
        else:
            base = architecture(saved["architecture"])
        if not resumes and open_dataset(config.dataset).kind == "dpo":
            base["dropout"] = 0.0  # noise in both log-probabilities, unless it is asked for
        config = configure(Settings, argv, base)
        check_shape(config, saved, source)
        before = saved["settings"]["optimizer"]
        if resumes and config.optimizer != before:
            raise UserError(
                f"optimizer={config.optimizer}, but {show_path(source)} has the state of {before}; "
                "leave it out, or begin another run with --init_from="
            )
    data = open_dataset(config.dataset)
    tokenizer = data.tokenizer
    for split in ("train", "val"):
        data.check(config.block_size, split)
    mix = open_mix(config, data)
    check_start(config, data)
    device = pick_device(config.device)
    check_shares(config, device, world)
    startup.lap("data")
    device = join(world, device)
    if world.size > 1:
        startup.lap("processes")
    torch.manual_seed(config.seed)
    shares_out = config.shard and world.size > 1
    # where the model is whole for the last time
    place = "cpu" if shares_out else device
    if saved:
        changes = {"dropout": config.dropout, "block_size": config.block_size}
        checkpoint = load_checkpoint(source, which, place, merged=not resumes, **changes)
        data.check_tokenizer(checkpoint.tokenizer, checkpoint.path)
        model = checkpoint.model.train()
    else:
        model_config = ModelConfig(**architecture(config), n_vocab=tokenizer.n_vocab)
        model = MODELS[config.model](model_config).to(place)
    adapter = reference_key = None
    if resumes:
        adapter, reference_key = saved.get("adapter"), saved.get("reference")
        check_adapter(config, saved, source)
    elif config.lora_rank:
        if world.is_first and not config.dry_run:
            keep_base(checkpoint.path, out_dir)
        lora = config.lora_rank, config.lora_alpha, config.lora_targets or ["blocks"]
        adapter = adapter_of(out_dir, checkpoint.path, *lora)
        add_adapters(model, *lora)
    elif data.kind == "dpo":
        reference_key = reference_of(checkpoint.path, data, config, device)
    for module in adapters(model).values():
        module.drop.p = config.lora_dropout
    model.checkpoint_activations = config.checkpoint_activations
    if shares_out:
        shard(model, device, world)
    optimizers = make_optimizers(model, config, device)
    scaler = make_scaler(config, device)
    progress = Progress()
    if resumes:
        warn_of_changes(saved, config, data, mix, device, world)
        load_optimizers(checkpoint.path, model, optimizers)
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        progress = Progress(**saved["progress"])
        if world.is_first and not config.dry_run:
            rewind(out_dir)
    check_together(config, data, progress, device, world)
    state = model, optimizers, progress, device, scaler, startup, mix, adapter, reference_key
    run = Run(config, out_dir, data, tokenizer, *state, world=world)
    startup.lap("model")
    return run


def check_shares(config: Settings, device: str, world: World) -> None:
    """UserError where the processes cannot share a step's rows."""
    if rows_per_step(config) < world.size:
        raise UserError(
            f"batch_size={config.batch_size} x gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} are the rows of a step, too few for "
            f"{world.size} processes; raise --batch_size="
        )
    if not config.shard or world.size == 1:
        return
    if config.dry_run:
        raise UserError("dry_run=True does not know shard=True; leave one of them out")
    if pick_dtype(config, device) == torch.float16:
        raise UserError("shard=True does not go with float16; pass --dtype=bfloat16 or float32")
    for name in ("batch_size", "mix_batch_size") if config.mix_dataset else ("batch_size",):
        rows = getattr(config, name) * config.gradient_accumulation_steps
        if rows % world.size:
            raise UserError(
                f"with shard=True {world.size} processes take as many rows each, and {name} x "
                f"gradient_accumulation_steps is {rows}; change --{name}="
            )


def check_together(
    config: Settings, data: Dataset, progress: Progress, device: str, world: World
) -> None:
    """UserError where the processes would not take the same steps: machines may see other files."""
    settings = {name: value for name, value in vars(config).items() if name != "out_dir"}
    facts = {"settings": settings, "dataset": data.fingerprint, "step": progress.iter}
    world.check_same(facts | {"precision": pick_dtype(config, device)})


def check_start(config: Settings, data: Dataset) -> None:
    """UserError where adapters or preference pairs have no model to start from."""
    if config.init_from == "scratch" and (config.lora_rank or data.kind == "dpo"):
        why = f"lora_rank={config.lora_rank} adapts" if config.lora_rank else "preferences change"
        raise UserError(f"{why} a trained model; pass its out_dir as --init_from=")
    if data.kind == "dpo" and config.lora_dropout and "lm_head" in (config.lora_targets or []):
        raise UserError(
            f"lora_dropout={config.lora_dropout:g} does not go with lora_targets=lm_head on "
            "preferences, whose logits are made twice; leave one of them out"
        )


def check_adapter(config: Settings, saved: dict, source: Path) -> None:
    """What an adapter that is resumed is cannot be changed; its dropout can."""
    for name in ("lora_rank", "lora_alpha", "lora_targets"):
        before = saved["settings"].get(name, getattr(Settings(), name))
        if getattr(config, name) != before:
            raise UserError(
                f"{name}={getattr(config, name)}, but {show_path(source)} has {name}={before}; "
                "leave it out, or begin another run with --init_from="
            )


def reference_of(path: Path, data: Dataset, config: Settings, device: str) -> dict[str, str]:
    """What a reference's log-probabilities depend on."""
    splits = {split: data.meta["splits"][split]["fingerprint"] for split in ("train", "val")}
    precision = str(pick_dtype(config, device)).removeprefix("torch.")
    return splits | {"model": weights_sha256(path), "precision": precision}


def open_reference(run: Run) -> dict[str, torch.Tensor]:
    """The log-probabilities of all pairs before the first step, (pairs, 2) a split: read from the
    out_dir, or computed and written there, once."""
    val = run.data.meta["splits"]["val"]["fingerprint"]
    if run.reference_key["val"] != val:
        raise UserError(
            f"{show_path(run.data.path)}/val.bin is not what this run began with; train again in "
            "another --out_dir="
        )
    found = load_reference(run.out_dir, run.reference_key)
    if not run.world.any(found is None):
        return found
    if run.progress.iter:
        raise UserError(
            f"{show_path(run.out_dir)} has lost its reference.safetensors, the log-probabilities "
            "of the model it started from; train again in another --out_dir="
        )
    print(f"reading {run.data.name} with the model as it is, for reference.safetensors")
    with autocast(run):
        where = run.config.batch_size, run.device, run.world
        found = {
            split: all_log_probs(run.model, run.data, split, *where) for split in ("train", "val")
        }
    if run.world.is_first:
        save_reference(run.out_dir, found, run.reference_key)
    return found


def open_mix(config: Settings, data: Dataset) -> Dataset | None:
    """The dataset that is mixed in, if any. UserError where it does not go with data."""
    if config.mix_dataset is None:
        return None
    mix = Dataset(config.mix_dataset)
    if mix.kind == "dpo":
        raise UserError(f"{show_path(mix.path)} holds preferences; they are for --dataset=")
    mix.check_tokenizer(data.tokenizer, data.path)
    for split in ("train", "val"):
        mix.check(config.block_size, split)
    return mix


def train(run: Run, peak: Peak, check_out_dir: Callable[[], None]) -> None:
    """The loop: step, log, evaluate, save; until max_iters, out of patience or Ctrl-C.

    check_out_dir: raises a UserError where out_dir is no longer this run's."""
    config, progress, world = run.config, run.progress, run.world
    compiled = compiles(config, run.device)
    if compiled:
        run.model.compile()
    about = {"dataset": {"kind": run.data.kind}}  # what sampling asks of a checkpoint's run.json
    checkpoint = Checkpoint(run.out_dir, run.model, run.tokenizer, about)
    prompts = sample_prompts(checkpoint, run.data, config.prompts)
    if world.is_first and progress.iter == 0:
        rewind(run.out_dir)
    if run.reference_key:
        run.reference = open_reference(run)
        run.startup.lap("reference")
    track = config.track if world.is_first else []
    with (
        open_trackers(track, tracked(run, track)) as trackers,
        catch_interrupt(world) as interrupts,
        progress_bar(run) as bar,
    ):
        began = time.perf_counter() - progress.seconds
        losses, norms, last = [], [], mark(progress)
        if trackers:
            run.startup.lap("trackers")
        first = progress.iter + 1
        for batches, counts, tokens in one_ahead(step_batches(run)):
            step_losses, grad_norm = train_step(run, batches, counts)
            progress.iter += 1
            progress.rows += rows_per_step(config)
            progress.tokens += tokens
            bar.update()
            if progress.skipped_in_a_row:
                bar.write(skip_line(run, grad_norm.item()), file=sys.stdout)
            if not progress.skipped_in_a_row or grad_norm.isfinite():
                losses.append(step_losses)
                norms.append(grad_norm)
            if progress.iter == first:
                grad_norm.item()  # waits for a GPU
                run.startup.lap("first step")
                bar.write(str(run.startup), file=sys.stdout)
            stops = world.any(bool(interrupts))
            evaluates = progress.iter % config.eval_interval == 0 or progress.is_finished(config)
            if not (evaluates or stops or progress.iter % config.log_interval == 0):
                continue
            if losses:
                means = mean_losses(run, losses)
                check_steps(run, losses, norms, means)
            else:  # all had gradients that are no number, and were left out
                means = mean_losses(run, [{n: v * math.nan for n, v in step_losses.items()}])
            train_loss = means["train_loss"]
            speed = speed_since(last, run, peak)
            record = log_record(run, time.perf_counter() - began, means, grad_norm, speed)
            rate, share = show_rate(speed["tflops"] * 1e12), f"{speed['mfu']:.0%} of peak"
            bar.set_postfix_str(f"loss {train_loss:.3f}, {rate}, {share}", refresh=False)
            samples = []
            if evaluates:
                record |= evaluate(run)
                bar.write(evaluation_line(run, record), file=sys.stdout)
                if prompts:
                    checkpoint.model = whole_model(run.model, run.adapter, world)
                    if world.is_first:
                        samples = write_samples(checkpoint, prompts, config.seed, compiled)
                    checkpoint.model = run.model  # one that was put together goes
                for sample in samples:
                    bar.write(sample, file=sys.stdout)
            progress.seconds = time.perf_counter() - began
            if world.is_first:
                check_out_dir()
                append_log(run.out_dir, record)
            if evaluates or stops:
                lowest = evaluates and progress.worse == 0
                save(run, is_best=lowest or config.best_by == "last")
            for tracker in trackers:
                tracker.log(record, "\n".join(samples))
            if stops or progress.is_finished(config):
                break
            losses, norms, last = [], [], mark(progress)
    if stops and not progress.is_finished(config):
        print(
            f"stopped at step {progress.iter} and saved; go on with\n"
            f"  {world.launcher} train.py --out_dir={shlex.quote(config.out_dir)} --resume"
        )
        sys.exit(128 + (interrupts or [signal.SIGINT])[0])
    why = "" if progress.iter == config.max_iters else " (out of patience)"
    print(
        f"finished at step {progress.iter}{why} in {progress.seconds:.0f} s; "
        f"best validation loss {progress.best_val_loss:.3f}; {show_path(run.out_dir)} is ready"
    )


def log_record(
    run: Run,
    seconds: float,
    means: dict[str, float],
    grad_norm: torch.Tensor,
    speed: dict[str, float],
) -> dict[str, float]:
    """A line of log.jsonl, without what an evaluation adds."""
    progress, config = run.progress, run.config
    return {
        "iter": progress.iter,
        "tokens": progress.tokens,
        "seconds": round(seconds, 3),
        **means,
        "lr": learning_rate(progress.iter - 1, config),
        "grad_norm": grad_norm.item(),
        **({"skipped": progress.skipped} if config.skip_spikes else {}),
        **speed,
    }


def mean_losses(run: Run, losses: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The means of what some steps measured in all processes, as log.jsonl names them."""
    names = {"next_token": "train_loss", "dpo": "train_loss", "sft": "train_loss_sft"}
    names["mix"] = "train_loss_mix"
    values = torch.stack([torch.stack(list(step.values())) for step in losses])
    means = run.world.sums(values.sum(dim=2).mean(dim=0).tolist())  # of (steps, terms, micro)
    return {names.get(name, name): mean for name, mean in zip(losses[0], means, strict=True)}


def check_steps(
    run: Run,
    losses: list[dict[str, torch.Tensor]],
    norms: list[torch.Tensor],
    means: dict[str, float],
) -> None:
    """UserError where one of the latest steps had a loss or a gradient that is no number: which
    step, and what it read. Only a line of the log asks, since a GPU would be waited for."""
    usable = torch.stack(norms).isfinite().cpu()
    usable |= run.scaler.is_enabled()  # which leaves such a step out
    if usable.all() and all(map(math.isfinite, means.values())):
        return
    world, progress = run.world, run.progress
    # of each step and process: 1 + the place of its first loss that is no number, or 0
    faults = torch.zeros(len(losses), world.size, dtype=torch.int64)
    for number, step in enumerate(losses):
        finite_losses = torch.stack(list(step.values()), dim=1).isfinite().flatten().tolist()
        if not all(finite_losses):
            faults[number, world.rank] = 1 + finite_losses.index(False)
    faults = world.add(faults)
    number = int((faults.any(dim=1) | ~usable).byte().argmax())
    steps_ago = len(losses) - 1 - number
    rank = int(faults[number].ne(0).byte().argmax())
    place = int(faults[number, rank]) - 1
    if place < 0:
        what, where = "norm of the gradient", "of all its micro-batches"
    else:
        micro, term = divmod(place, len(losses[0]))
        name = list(losses[0])[term]
        what = "loss"
        where = f"of micro-batch {micro + 1}" + (f" of process {rank}" if world.size > 1 else "")
        where += f", which has {shown_rows(run, name, steps_ago, rank, micro)}"
    raise UserError(
        f"the {what} is nan or infinite at step {progress.iter - steps_ago}, {where}; lower "
        f"--learning_rate={run.config.learning_rate:g}, or mend the rows; {what_stays(run.out_dir)}"
    )


def shown_rows(run: Run, term: str, steps_ago: int, rank: int, micro: int) -> str:
    """Where the rows lie that a micro-batch of a process had, in one of the latest steps."""
    data, config = (run.mix if term == "mix" else run.data), run.config
    if term == "mix":
        start = (run.progress.iter - 1 - steps_ago) * mix_rows_per_step(config)
        batch_size = config.mix_batch_size
    else:
        start = run.progress.rows - (1 + steps_ago) * rows_per_step(config)
        batch_size = config.batch_size
    world = dataclasses.replace(run.world, rank=rank)
    return data.show_rows(step_parts(config, data, start, batch_size, world)[1][micro])


def evaluation_line(run: Run, record: dict) -> str:
    """What is printed of an evaluation."""
    head = f"step {record['iter']}: loss {record['train_loss']:.3f} in training, "
    if run.data.kind == "dpo":
        line = (
            f"{record['val_loss']:.3f} in validation (nats per pair); there the chosen answer has "
            f"the higher reward in {record['val_accuracy']:.0%}, by {record['val_margin']:.3f}"
        )
    else:
        line = (
            f"{record['val_loss']:.3f} in validation (nats per token), "
            f"{record['val_bits_per_byte']:.3f} bits per byte"
        )
    kept = f", {record['val_bits_per_byte_mix']:.3f} of {run.mix.name}" if run.mix else ""
    return head + line + kept


def mark(progress: Progress) -> tuple[float, int, int]:
    """Where speed is measured from: the clock, tokens and rows."""
    return time.perf_counter(), progress.tokens, progress.rows


def speed_since(last: tuple[float, int, int], run: Run, peak: Peak) -> dict[str, float]:
    """Tokens per second, the model's TFLOP/s, and their share of the peak since `last`.

    Padding does not count; rows of questions count at their mean length, as if each of their
    tokens were trained.
    """
    seconds, tokens, rows = (now - then for now, then in zip(mark(run.progress), last, strict=True))
    rate = tokens * run.model.flops_per_token(row_length(run, tokens, rows)) / seconds
    return {
        "tokens_per_second": round(tokens / seconds),
        "tflops": round(rate / 1e12, 6),
        "mfu": round(rate / peak.rate, 4),
    }


def row_length(run: Run, tokens: int, rows: int) -> float:
    """The mean length of the rows that held these tokens, as attention saw them."""
    config = run.config
    if run.data.kind == "pretrain" and is_short(config, run.progress.iter - 1):
        return config.short_block
    mixed = mix_rows_per_step(config) if run.mix else 0
    own = 2 if run.data.kind == "dpo" else 1
    return tokens / (rows * (own + mixed / rows_per_step(config)))


def tracked(run: Run, track: list[str]) -> Tracked:
    """What trackers know the run by; its id is for those that there are."""
    settings = dataclasses.asdict(run.config)
    id = tracking_id(run.out_dir, new=run.progress.iter == 0) if track else ""
    return Tracked(id, run.out_dir.name, run.out_dir, run.progress.iter, settings)


def finite(run: Run, loss: float) -> float:
    """The validation loss. UserError where it is no number: nothing is saved then."""
    if not math.isfinite(loss):
        raise UserError(
            f"the validation loss is {loss} after step {run.progress.iter}; lower "
            f"--learning_rate={run.config.learning_rate:g}; {what_stays(run.out_dir)}"
        )
    return loss


def train_step(
    run: Run, batches: list, counts: dict[str, int]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One step of the optimizer over its micro-batches, as step_batches makes them -> the mean
    loss of each term, and what else preferences tell, by name, as the sum of what each of this
    process's micro-batches adds to it; the norm of the whole gradient, a scalar."""
    config = run.config
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.progress.iter, config) * group["lr_ratio"]
    weights = {"next_token": 1.0, "mix": config.mix_weight, "dpo": 1.0}
    if config.dpo_sft_weight:
        weights["sft"] = config.dpo_sft_weight
    losses = {name: torch.zeros(len(batches), device=run.device) for name in counts}
    for micro, terms in enumerate(batches):
        seed_dropout(config.seed, run.progress.iter, micro, run.world.rank)
        for name, batch in terms.items():
            is_last = micro == len(batches) - 1 and name == list(terms)[-1]
            with nullcontext() if is_last else run.objective.no_sync():
                sums = run.objective(name, batch)
                means = {key: value / max(1, counts[key]) for key, value in sums.items()}
                # a backward pass for each batch, so that the activations of only one are held
                loss = sum(weights[key] * mean for key, mean in means.items() if key in weights)
                # the processes' gradients are averaged, and counts are already those of all
                run.scaler.scale(loss * run.world.size).backward()
            for key, mean in means.items():
                losses[key][micro] += mean.detach()
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    limit = config.grad_clip or math.inf
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit))
    applied = is_applied(run, grad_norm)
    for optimizer in run.optimizers:
        if applied:
            run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    return losses, grad_norm


RECENT = 32  # updates whose median norm is the usual one
FEWEST = 8  # updates before there is a usual norm
SKIPS = 10  # updates left out one after another that are no spike but the end of a run


def is_applied(run: Run, grad_norm: torch.Tensor) -> bool:
    """Whether an update is made; keeps count of those that skip_spikes leaves out. All processes
    agree on it."""
    progress = run.progress
    in_a_row, progress.skipped_in_a_row = progress.skipped_in_a_row, 0
    if run.scaler.is_enabled() and not grad_norm.isfinite():
        return False  # the scaler looks at each optimizer's gradients alone; clipping has spread it
    if not run.config.skip_spikes:
        return True
    norm = grad_norm.item()
    usual = median(progress.norms) if len(progress.norms) >= FEWEST else math.inf
    is_usable = math.isfinite(norm) and norm <= run.config.skip_spikes * usual
    if run.world.any(not is_usable):
        progress.skipped += 1
        progress.skipped_in_a_row = in_a_row + 1
        return False
    progress.norms = [*progress.norms, norm][-RECENT:]
    return True


def skip_line(run: Run, norm: float) -> str:
    """What is printed of an update that was left out. UserError where none has been made lately."""
    progress, usual = run.progress, median(run.progress.norms or [math.nan])
    if progress.skipped_in_a_row >= SKIPS:
        raise UserError(
            f"{SKIPS} updates in a row were left out, up to step {progress.iter}, whose gradient "
            f"has a norm of {norm:.3g}, usual are {usual:.3g}; lower --learning_rate="
            f"{run.config.learning_rate:g}, or raise --skip_spikes={run.config.skip_spikes:g}; "
            + what_stays(run.out_dir)
        )
    return f"step {progress.iter}: left out, its gradient has a norm of {norm:.3g}, not {usual:.3g}"


def term_sums(run: Run, name: str, batch: tuple) -> dict[str, torch.Tensor]:
    """What the objective of a term makes of its batch."""
    with autocast(run):
        if name == "dpo":
            return preferences(run.model, batch, **run.config.dpo())
        return {name: next_token(run.model, batch)["next_token"]}


def step_batches(run: Run) -> Iterator[tuple[list, dict, int]]:
    """For each step from here on: its micro-batches on the device, their counts, their tokens.

    A micro-batch has a batch for each term: next_token or dpo, of the dataset, and mix, of
    mix_dataset, whose rows so far follow from the steps done: nothing more need be kept to resume.
    """
    config, consumed, step = run.config, run.progress.rows, run.progress.iter
    while True:
        first = "dpo" if run.data.kind == "dpo" else "next_token"
        sources = {first: (run.data, consumed, config.batch_size)}
        if run.mix:
            mixed = step * mix_rows_per_step(config)
            sources["mix"] = (run.mix, mixed, config.mix_batch_size)
        batches, counts, tokens = {}, {}, 0
        for name, (data, start, batch_size) in sources.items():
            batches[name], n_tokens = micro_batches(run, data, start, batch_size)
            if data.kind == "pretrain" and is_short(config, step):
                batches[name] = [cut(batch, config.short_block) for batch in batches[name]]
            if name == "dpo":
                counts |= count_pairs(batches[name])
            else:
                counts[name] = count_terms(batches[name])["next_token"]
            tokens += n_tokens
        counts = dict(zip(counts, run.world.sums(list(counts.values())), strict=True))
        micro = [
            {
                name: to_device(batch, run.device)
                for name, batch in zip(batches, parts, strict=True)
                if batch
            }
            for parts in zip_longest(*batches.values())  # a share may have less of one
        ]
        yield micro, counts, tokens
        consumed += rows_per_step(config)
        step += 1


def is_short(config: Settings, step: int) -> bool:
    """Whether a step's rows are cut: early, when far context teaches least (arXiv 2108.06084)."""
    end = config.max_iters // 2 if config.short_iters is None else config.short_iters
    return config.short_block is not None and step < end


def cut(batch: tuple[np.ndarray, np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """idx and targets (B, T) -> (B T / length, length): the same targets, from less context."""
    return tuple(np.ascontiguousarray(part).reshape(-1, length) for part in batch)


def micro_batches(run: Run, data: Dataset, start: int, batch_size: int) -> tuple[list, int]:
    """The batches of this process's share of one step of a dataset, which begins after `start`
    rows, and the tokens of the whole step."""
    config = run.config
    multiple = 64 if run.device.startswith("cuda") else 1  # few shapes, so compiled code is reused
    rows, parts = step_parts(config, data, start, batch_size, run.world)
    batches = [data.batch(part, config.block_size, multiple) for part in parts]
    if data is run.data and run.reference:
        given = [run.reference["train"][part].numpy() for part in parts]
        batches = [(*batch, log_p) for batch, log_p in zip(batches, given, strict=True)]
    return batches, data.input_tokens(rows, config.block_size)


def step_parts(
    config: Settings, data: Dataset, start: int, batch_size: int, world: World
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The rows of the step that begins after `start` rows, and those of each micro-batch of this
    process."""
    count = batch_size * config.gradient_accumulation_steps
    rows = data.step_rows(config.seed, start, count, config.block_size)
    mine = world.share(rows)
    return rows, np.array_split(mine, -(-len(mine) // batch_size)) if len(mine) else []


def one_ahead(steps: Iterator) -> Iterator:
    """The same steps, each made while the one before is still being computed on a GPU."""
    pending = next(steps)
    for following in steps:
        yield pending
        pending = following


def evaluate(run: Run) -> dict[str, float]:
    """Loss and bits per byte on the whole validation split, or what preferences tell, and bits per
    byte on that of the mixed dataset; keeps count of the best."""
    scores = evaluate_pairs(run) if run.data.kind == "dpo" else evaluate_tokens(run)
    val_loss, progress = finite(run, scores["val_loss"]), run.progress
    if progress.best_val_loss is None or val_loss < progress.best_val_loss:
        progress.best_val_loss, progress.worse = val_loss, 0
    else:
        progress.worse += 1
    if run.mix:
        nats, _, n_bytes = validation_sums(run, run.mix)
        scores["val_bits_per_byte_mix"] = finite(run, nats / math.log(2) / n_bytes)
    return scores


def evaluate_tokens(run: Run) -> dict[str, float]:
    nats, count, n_bytes = validation_sums(run, run.data)
    return {"val_loss": nats / count, "val_bits_per_byte": nats / math.log(2) / n_bytes}


def evaluate_pairs(run: Run) -> dict[str, float]:
    config = run.config
    where = "val", config.batch_size, run.device, run.reference and run.reference["val"], run.world
    with autocast(run):
        means = split_preferences(run.model, run.data, *where, **config.dpo())
    names = {"dpo": "val_loss", "sft": "val_loss_sft"}
    return {names.get(name, f"val_{name}"): means[name] for name in PREFERENCES}


def validation_sums(run: Run, data: Dataset) -> tuple[float, int, int]:
    with autocast(run):
        return split_sums(run.model, data, "val", run.config.batch_size, run.device, run.world)


def save(run: Run, is_best: bool) -> None:
    """A checkpoint of the run as it stands."""
    state = {
        "settings": dataclasses.asdict(run.config),
        "dataset": identity(run.data),
        "mix": identity(run.mix) if run.mix else None,
        "tokenizer_sha256": run.tokenizer.sha256,
        "progress": dataclasses.asdict(run.progress),
        "scaler": run.scaler.state_dict(),
        "environment": run_environment(run.config, run.device, run.world),
    }
    parts = {"adapter": run.adapter, "reference": run.reference_key}
    state |= {name: part for name, part in parts.items() if part}
    about = run.tokenizer, state, is_best, run.world
    save_checkpoint(run.out_dir, run.model, run.optimizers, *about)


def run_environment(config: Settings, device: str, world: World) -> dict:
    """What equal bits need: a processor without bfloat16 takes float32 where dtype is auto."""
    precision = str(pick_dtype(config, device)).removeprefix("torch.")
    return environment(device) | {"precision": precision, "processes": world.size}


def identity(data: Dataset) -> dict[str, str]:
    """What run.json says of a dataset."""
    about = {"name": data.name, "kind": data.kind, "fingerprint": data.fingerprint}
    return about | {key: data.meta[key] for key in ("question_end",) if key in data.meta}


def dry_run(run: Run, peak: Peak, steps: int = 3) -> None:
    """Prints parameters, memory and time expected, from a few steps that are not kept."""
    config = run.config
    config.short_block = None  # whole rows: short ones take less of both
    saved = {}  # storages that backward needs: address -> bytes

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if run.reference_key:  # of any numbers, which cost as much as the right ones
        run.reference = {"train": torch.zeros(run.data.n_rows("train", config.block_size), 2)}
    batches = step_batches(run)
    micro, counts, tokens = next(batches)
    weights = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    activations = 0  # of the largest term: they are not held together
    for name, batch in micro[0].items():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            sums = term_sums(run, name, batch)
        held = sum(size for address, size in saved.items() if address not in weights)
        activations = max(activations, held)
        del sums
    train_step(run, micro, counts)  # warms up
    began = time.perf_counter()
    for _ in range(steps):
        micro, counts, tokens = next(batches)
        _, grad_norm = train_step(run, micro, counts)
    grad_norm.item()  # waits for a GPU
    seconds = (time.perf_counter() - began) / steps
    length = row_length(run, tokens, rows_per_step(config))
    rate = tokens * run.model.flops_per_token(length) / seconds
    parameters, trained = run.model.n_params(), n_trained(run.model)
    # float32 weights and gradients
    state = 4 * (parameters + trained) + optimizer_bytes(run.optimizers)
    left = config.max_iters - run.progress.iter
    print(
        f"parameters  {parameters:,}{f', {trained:,} of them trained' if run.adapter else ''}\n"
        f"memory      {(state + activations) / 1e9:.2f} GB: {state / 1e9:.2f} of weights, "
        f"gradients and optimizer, {activations / 1e9:.2f} of activations\n"
        f"speed       {tokens / seconds:,.0f} tokens per second, {seconds:.3f} s a step\n"
        f"            {show_rate(rate)}, {rate / peak.rate:.0%} of the peak\n"
        f"time        {left * seconds / 60:.1f} minutes for {left:,} steps, evaluations left out"
    )


def n_trained(model: GPT | LSTM) -> int:
    """Parameters that are trained: all, or those of adapters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """What the optimizers keep: two moments of each parameter (AdamW), or one (Muon)."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return sum(tensor.nbytes for state in states for tensor in state.values())


# --- settings, schedule, optimizer, precision --------------------------------------------------


def architecture(config: Architecture | dict) -> dict:
    """The settings that make a model's shape, dropout included. A checkpoint that is older than a
    setting has its default."""
    values = config if isinstance(config, dict) else vars(config)
    return {field.name: values.get(field.name, field.default) for field in fields(Architecture)}


def check_shape(config: Settings, saved: dict, source: Path) -> None:
    """A checkpoint's shape cannot be changed; its dropout can, and its block_size be lowered."""
    for name, value in architecture(saved["architecture"]).items():
        wanted = getattr(config, name)
        resumes = source == repo_path(config.out_dir)  # then the optimizer's state has its shape
        lowered = name == "block_size" and wanted < value and not resumes
        if wanted != value and name != "dropout" and not lowered:
            raise UserError(
                f"{name}={wanted}, but the model in {show_path(source)} has {name}={value}; "
                "leave it out, or train another model from scratch"
            )


# they change no bits
FREE = ("resume", "dry_run", "out_dir", "keep_last", "best_by", "track", "prompts")


def warn_of_changes(
    saved: dict, config: Settings, data: Dataset, mix: Dataset | None, device: str, world: World
) -> None:
    """Says what differs from the run that is resumed. UserError where its data are others."""
    for before, now in ((saved["dataset"], data), (saved.get("mix"), mix)):
        if before and now and before["fingerprint"] != now.fingerprint:
            raise UserError(
                f"{show_path(now.path)} is not what this run was trained on: it was prepared "
                "anew; train again in another --out_dir="
            )
    # a setting that a run of an earlier version does not name was at its default
    before = dataclasses.asdict(Settings()) | {"processes": 1}
    before |= saved["settings"] | saved["environment"]
    now = dataclasses.asdict(config) | run_environment(config, device, world)
    changed = [
        f"{name} was {before[name]!r}, now {now[name]!r}"
        for name in now
        if name not in FREE and name in before and before[name] != now[name]
    ]
    if changed:
        print(f"note: not bit for bit the run that was stopped: {'; '.join(changed)}")


def rows_per_step(config: Settings) -> int:
    return config.batch_size * config.gradient_accumulation_steps


def mix_rows_per_step(config: Settings) -> int:
    return config.mix_batch_size * config.gradient_accumulation_steps


def learning_rate(step: int, config: Settings) -> float:
    """Linear warm-up, then linear decay to min_lr (arXiv 2502.15938: best at a fixed budget)."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    left = max(0.0, (end - step) / max(1, end - config.warmup_iters))
    return config.min_lr + left * (config.learning_rate - config.min_lr)


class AdamW(torch.optim.AdamW):
    """torch's, its methods taken out of their wrappers for torch.compile: these would import the
    compiler, which takes as long as torch itself."""

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__
    step = torch.no_grad()(torch.optim.Adam.step.__wrapped__)


def make_optimizers(
    model: GPT | LSTM, config: Settings, device: str
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, or AdamW for all; only matrices decay.

    lr_ratio of a group: its learning rate over the schedule's. An LSTM's matrices are AdamW's, and
    so are adapters: the rates and the results that are published of them are AdamW's.
    """
    ratio = 1.0
    if config.embedding_lr is not None and config.learning_rate:
        ratio = config.embedding_lr / config.learning_rate
    of_kind = {"blocks": [], "embeddings": [], "matrices": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "vectors" if parameter.dim() < 2 else name.partition(".")[0]
        kind = "matrices" if name.endswith(PARTS) else kind
        kind = "embeddings" if kind in ("wte", "wpe", "lm_head") else kind
        of_kind[kind if kind in of_kind else "matrices"].append(parameter)
    blocks = {"params": of_kind["blocks"], "lr_ratio": 1.0}
    matrices = {"params": of_kind["matrices"], "lr_ratio": 1.0}
    embeddings = {"params": of_kind["embeddings"], "lr_ratio": ratio}
    if config.embedding_decay is not None:
        embeddings["weight_decay"] = config.embedding_decay
    vectors = {"params": of_kind["vectors"], "lr_ratio": 1.0, "weight_decay": 0.0}
    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    by_adamw = [matrices, embeddings, vectors]
    adamw = AdamW(
        by_adamw if config.optimizer == "muon" else [blocks, *by_adamw],
        betas=(config.beta1, config.beta2),
        fused=not device.startswith("mps"),
        **common,
    )
    if config.optimizer == "adamw" or not blocks["params"]:
        return [adamw]
    if device.startswith("cuda") and not is_sharded(model):
        return [torch.optim.Muon([blocks], adjust_lr_fn="match_rms_adamw", **common), adamw]
    return [Muon([blocks], dtype=pick_dtype(config, device), **common), adamw]


def pick_dtype(config: Settings, device: str) -> torch.dtype:
    """bfloat16 where CUDA or the CPU has it natively; else float16 on CUDA, float32 elsewhere."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if torch.device(device).type == "cpu":
        has = torch.cpu.get_capabilities()
        native = has.get("avx512_bf16") or has.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32
    if not device.startswith("cuda"):
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def compiles(config: Settings, device: str) -> bool:
    """As asked, else on CUDA where triton is there and the GPU is not too old for it."""
    if config.compile is not None or not device.startswith("cuda"):
        return bool(config.compile)
    return bool(find_spec("triton")) and torch.cuda.get_device_capability() >= (7, 0)


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one; by default it gives large blocks back to
    the system, which then clears each page anew: an eighth of a step's time on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_MMAP_THRESHOLD, bytes: smaller blocks stay in the heap; older versions allow 32 MB, other C
    # libraries have no mallopt
    if mallopt and (mallopt(-3, 2**30) or mallopt(-3, 2**25)):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes free at the heap's end


def autocast(run: Run) -> AbstractContextManager:
    dtype = pick_dtype(run.config, run.device)
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(run.device).type, dtype)


def make_scaler(config: Settings, device: str) -> torch.amp.GradScaler:
    """Scales losses under float16, and does nothing otherwise."""
    enabled = pick_dtype(config, device) == torch.float16
    return torch.amp.GradScaler(torch.device(device).type, enabled=enabled)


def seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    """Dropout depends on (seed, step, micro-batch, process) alone, so a resumed run draws the same;
    the first process draws what a run of one process does."""
    words = [seed, step, micro, rank] if rank else [seed, step, micro]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state))


# --- terminal ----------------------------------------------------------------------------------


@contextmanager
def catch_interrupt(world: World) -> Iterator[list[int]]:
    """A list that holds something once Ctrl-C was pressed, or SIGTERM came, as from Slurm before a
    job's time is over; a second Ctrl-C stops at once."""
    caught = []

    def handler(signum: int, frame: object) -> None:
        caught.append(signum)
        if signum == signal.SIGTERM:
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if world.is_first:
            print("\nstopping after this step; Ctrl-C again stops without saving", file=sys.stderr)

    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    except RuntimeError:
        if world.size == 1 or signal.SIGTERM not in caught:
            raise
        sys.exit(128 + signal.SIGTERM)  # another process has failed, and said so
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def progress_bar(run: Run) -> tqdm:
    """Steps done and time left; where no one watches, a line each half minute."""
    return tqdm(
        total=run.config.max_iters,
        initial=run.progress.iter,
        desc=run.out_dir.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=not run.world.is_first,
    )


if __name__ == "__main__":
    command(main)
