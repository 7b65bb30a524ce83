"""What is checked before a run takes its first step, top to bottom. Bounds of single settings are
declared beside the settings; here is what hangs on several of them, on files and on processes.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from configurator import UserError, nearest, repo_path, show_path
from data_utils import Dataset, Mixture
from miniglm.checkpoint import has_checkpoint, read_run
from miniglm.devices import environment, pick_dtype
from miniglm.distributed import World
from miniglm.interop.foreign import find_foreign
from miniglm.stages import objective_of
from model import Architecture

# settings that change no bits
FREE = ("resume", "dry_run", "out_dir", "keep_last", "best_by", "track", "prompts")
# what a run that is resumed needs of its run.json, and one that begins with it of the first
RESUMED = ("architecture", "settings", "dataset", "environment", "scaler", "progress")
# settings that a run keeps from its first step on
KEPT = ("optimizer", "lora_rank", "lora_alpha", "lora_targets", "reward")


@dataclass(frozen=True)
class Start:
    """What a run goes on from: its own latest checkpoint, another model, or nothing."""

    path: Path | None = None  # an out_dir, or another project's model
    resumes: bool = False
    run: dict = dataclasses.field(default_factory=dict)  # run.json

    def settings(self) -> dict:
        """The settings that hold unless the command line says otherwise."""
        return self.run["settings"] if self.resumes else architecture(self.run["architecture"])


def find_start(config, argv: list[str]) -> Start:
    """Where settings say that a run begins. Raises UserError if there is no model, if out_dir would
    be written over, or if argv names nothing to train where there is nothing to resume."""
    out_dir = repo_path(config.out_dir)
    if has_checkpoint(out_dir):
        if config.resume:
            return Start(out_dir, True, read_run(out_dir, "latest", RESUMED, type(config)))
        if not config.dry_run:
            raise UserError(
                f"{show_path(out_dir)} already holds a run; pass --resume to go on with it, "
                "or another --out_dir="
            )
    elif config.resume:
        nothing = f"no checkpoint in {show_path(out_dir)} to go on from"
        if not any(re.match("[^-]|-+(dataset|init_from)=", word) for word in argv):
            near = nearest(out_dir.name, (p.parent.name for p in out_dir.parent.glob("*/latest")))
            begin = "; pass the --out_dir= of a run, or begin one with a config file or --dataset="
            raise UserError(nothing + (near or begin))
        print(f"{nothing}: training begins anew")
    if config.init_from == "scratch":
        return Start()
    source = repo_path(config.init_from)
    if not (has_checkpoint(source) or find_foreign(source)):
        raise UserError(
            f"no checkpoint in {show_path(source)}; train it first, or pass --init_from="
        )
    return Start(source, False, read_run(source, "best", RESUMED[:1]))


def count_steps(config, asked, argv: list[str], data: Dataset | Mixture, start: Start) -> int:
    """max_iters, from epochs if these were asked for. asked: the settings without those that a
    checkpoint brings. A flag wins over a config file; raises UserError if two of a kind differ."""
    flags = {*re.findall(r"(?:^|\n)-+(max_iters|epochs)=(?!None)", "\n".join(argv))}
    if asked.epochs is None or flags == {"max_iters"}:
        return config.max_iters or 2000
    epoch = data.epoch(config.block_size)
    done = start.run["progress"] if start.resumes else {"rows": 0, "iter": 0}
    rows = asked.epochs * epoch - done["rows"]
    steps = done["iter"] + math.ceil(rows / config.rows_per_step - 1e-9)
    if asked.max_iters not in (None, steps) and flags != {"epochs"}:
        raise UserError(
            f"epochs={asked.epochs:g} of {epoch:,.0f} rows are {steps} steps of "
            f"{config.rows_per_step}, but max_iters={asked.max_iters}; pass one of them"
        )
    return steps


def check(config, start: Start, data: Dataset | Mixture, device: str, world: World) -> None:
    """Raises UserError if the run cannot be what its settings say."""
    # the shape stays, but for dropout and a lower block_size; a run also keeps its optimizer's kind
    fixed = architecture(start.run["architecture"]) if start.run else {}
    fixed.pop("dropout", None)
    settings = start.run["settings"] if start.resumes else {}
    fixed |= {name: settings[name] for name in KEPT if name in settings}
    for name, before in fixed.items():
        now = getattr(config, name)
        lowered = name == "block_size" and now < before and not start.resumes
        if now != before and not lowered:
            raise UserError(
                f"{name}={now}, but the model in {show_path(start.path)} has {name}={before}; "
                "leave it out, or train another model in another --out_dir="
            )

    for split in data.splits:
        data.check(config.block_size, split)
    check_validation(config, data)
    if config.max_iters <= config.warmup_iters:
        print(f"note: {config.max_iters} steps only warm up (warmup_iters={config.warmup_iters})")
    if start.resumes and start.run["dataset"].get("fingerprint") != data.fingerprint:
        raise UserError(
            f"dataset={config.dataset} is not what this run was trained on: that was "
            f"dataset={settings['dataset']} as prepared then; train again in another --out_dir="
        )
    objective = objective_of(config, data)
    if config.init_from == "scratch" and (config.lora_rank or objective.needs_a_model):
        name = next(n for n in ("lora_rank", "reward", "dataset") if getattr(config, n))
        given = f"{name}={getattr(config, name)}"
        raise UserError(f"{given} changes a trained model; pass its out_dir as --init_from=")
    if config.dropout and objective.needs_a_model and "lm_head" in (config.lora_targets or []):
        raise UserError(f"{data.name} needs dropout=0 if lora_targets has lm_head; pass it")
    if config.shard and objective.needs_newest_weights:
        raise UserError("shard=True does not go with marks or rewards; leave it out")

    rows = config.rows_per_step
    if rows < world.size:
        raise UserError(
            f"batch_size={config.batch_size} x gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} are the rows of a step, too few for "
            f"{world.size} processes; raise --batch_size="
        )
    if config.shard and world.size > 1:
        if config.dry_run:
            raise UserError("dry_run=True does not know shard=True; leave one of them out")
        if pick_dtype(config.dtype, device) == torch.float16:
            raise UserError("shard=True does not go with float16; pass --dtype=bfloat16 or float32")
        if rows % world.size:
            raise UserError(
                f"with shard=True {world.size} processes take equally many rows, but batch_size x "
                f"gradient_accumulation_steps is {rows}; change --batch_size="
            )


def check_validation(config, data: Dataset | Mixture) -> None:
    """Says if there is none. Raises UserError if a setting needs it."""
    if "val" in data.splits:
        return
    none = f"{show_path(data.path)} has no validation split"
    if config.patience is not None:
        raise UserError(f"patience={config.patience} counts evaluations, but {none}; leave it out")
    print(f"note: {none}: no evaluation, and sampling takes the last checkpoint")


def note_changes(run: dict, config, device: str, world: World) -> None:
    """Prints a note if a resumed run will not end in the bits of one without a stop."""
    before = run["settings"] | run["environment"]
    now = dataclasses.asdict(config) | run_environment(config, device, world)
    changed = [
        f"{name} was {value!r}, now {now.get(name, 'no setting')!r}"
        for name, value in before.items()
        if name not in FREE and now.get(name) != value
    ]
    if changed:
        print(f"note: not bit for bit the run that was stopped: {'; '.join(changed)}")


def check_same_steps(config, data: Dataset | Mixture, step: int, device: str, world: World) -> None:
    """Raises UserError if the processes would not take the same steps: machines may see other
    files."""
    settings = {name: value for name, value in vars(config).items() if name != "out_dir"}
    facts = {"settings": settings, "dataset": data.fingerprint, "step": step}
    world.check_same(facts | {"precision": pick_dtype(config.dtype, device)})


def run_environment(config, device: str, world: World) -> dict:
    """What bitwise reproducibility depends on, besides settings and data."""
    precision = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    return environment(device) | {"precision": precision, "processes": world.size}


def architecture(values: dict) -> dict:
    """The settings among values that make a model's shape, dropout included."""
    return {f.name: values.get(f.name, f.default) for f in fields(Architecture)}
