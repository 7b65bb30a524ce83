"""What a run's log and checkpoints take of its time.

    python -m bench save

train.py's own steps, lines of the log and checkpoints take turns, at the intervals of the
demonstration, config/pretrain_sanguo.py. A checkpoint waits until its files are on the disk.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import train as training
from bench.profile import numbers, whole_run
from bench.timing import Seconds, measure
from configurator import configure
from miniglm.checkpoint import append_log
from miniglm.devices import Peak
from model import GPT, ModelConfig

DEMONSTRATION = "config/pretrain_sanguo.py"


def bench_save(config) -> dict:
    """The shares of time, printed and returned."""
    own = configure(training.Settings, [DEMONSTRATION])
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    sizes = {"batch_size": config.batch_size, "block_size": config.block_size}
    training.keep_freed_memory()
    with numbers() as data, TemporaryDirectory() as folder:
        model = GPT(ModelConfig(**shape, n_vocab=max(config.vocab_size, data.tokenizer.n_vocab)))
        settings = training.Settings(out_dir=folder, device=config.device, **sizes)
        run = whole_run(model.to(config.device).train(), data, settings)
        seconds = measure(calls(run, own.log_interval), config.rounds, config.clock, config.device)
        files = Path(folder).glob("step-*/*")
        n_bytes = sum(file.stat().st_size for file in files)
    steps = own.eval_interval / own.log_interval  # as many as are measured, between two checkpoints
    results = {
        "log": share(seconds, "log", own.log_interval, 1),
        "save": share(seconds, "save", own.eval_interval, steps) | {"bytes": n_bytes},
    }
    step = median(seconds["steps"]) / own.log_interval
    print(
        f"save: {config.n_layer} layers x {config.n_embd}, {config.batch_size} x "
        f"{config.block_size} tokens, {step:.3f} s a step, {config.rounds} turns each"
    )
    for name, what in (("log", "a line of the log"), ("save", f"a save of {n_bytes / 1e6:.0f} MB")):
        row = results[name]
        print(
            f"  {what} each {row['interval']} steps: {row['share']:.3%} of the time "
            f"({row['min']:.3%} to {row['max']:.3%}), {1000 * row['seconds']:.1f} ms"
        )
    return results | {"step": step, "seconds": seconds}


def calls(run: training.Run, log_interval: int) -> dict[str, Callable[[], None]]:
    """What takes turns: some steps, a line of the log about them, a checkpoint."""
    batches, losses, norms = training.step_batches(run), [], []
    peak, progress = Peak(1e12, "any"), run.progress
    last = training.mark(progress)

    def steps() -> None:
        losses.clear()
        norms.clear()
        for _ in range(log_interval):
            micro, counts, tokens = next(batches)
            step_losses, grad_norm = training.train_step(run, micro, counts)
            losses.append(step_losses)
            norms.append(grad_norm)
            progress.iter += 1
            progress.rows += training.rows_per_step(run.config)
            progress.tokens += tokens

    def log() -> None:
        means = training.mean_losses(run, losses)
        training.check_steps(run, losses, norms, means)
        speed = training.speed_since(last, run, peak)
        record = training.log_record(run, time.perf_counter(), means, norms[-1], speed)
        append_log(run.out_dir, record)

    return {"steps": steps, "log": log, "save": lambda: training.save(run, is_best=True)}


def share(seconds: Seconds, name: str, interval: int, times: float) -> dict[str, float]:
    """What `name` takes of the time where it comes after `times` of the measured steps: the
    median's share, and the range turn by turn."""
    turns = [
        s / (s + times * steps) for s, steps in zip(seconds[name], seconds["steps"], strict=True)
    ]
    middle = median(seconds[name])
    whole = middle + times * median(seconds["steps"])
    return {
        "interval": interval,
        "seconds": middle,
        "share": middle / whole,
        "min": min(turns),
        "max": max(turns),
    }
