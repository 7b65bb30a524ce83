"""What a person with a GPU runs to know that all is well: minutes, and a table to put in an issue.

    python -m tests.gpu                # --device=cuda:1 takes the second GPU
    python -m tests.gpu --device=cpu   # a rehearsal with tiny models, less than a minute

The data are made up, so nothing is downloaded. A row is a run of train.py, or a check of its own.
Its verdict is `ok`, or `-` and why this machine cannot have it, or what is wrong: then the exit
code is 1. A GPU rounds differently from run to run and when code is compiled, so losses only have
to be close.
"""

import contextlib
import io
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters

import evaluations
import sample
import train
from configurator import UserError, command, configure, printable
from miniglm import compiling, devices
from miniglm.checkpoint import load_checkpoint
from miniglm.generation import Batch, Request, Sampling
from miniglm.text import load_for_sampling, prompt_ids
from tests import runs

LARGE = {"n_layer": 6, "n_head": 8, "n_embd": 512, "block_size": 256, "batch_size": 64}
LARGE |= {"max_iters": 60, "warmup_iters": 10, "eval_interval": 30, "log_interval": 5}
CLOSE = 0.05  # nats between losses that rounding may explain
COLUMNS = ["loss", "tokens/s", "MFU", "peak GB", "graphs", "breaks", "verdict"]

TEXT = "text, float32"
RUNS = {  # settings of train.py; init_from is a row above, and like one that has the same loss
    TEXT: {"dataset": "text", "dtype": "float32"},
    "text, bfloat16": {"dataset": "text", "dtype": "bfloat16", "like": TEXT},
    "text, float16": {"dataset": "text", "dtype": "float16", "like": TEXT},
    "text, cuda:1": {"dataset": "text", "dtype": "float32", "device": "cuda:1", "like": TEXT},
    "text, AdamW": {"dataset": "text", "optimizer": "adamw"},
    "questions": {"dataset": "questions", "init_from": TEXT},
    "pairs": {"dataset": "pairs", "init_from": "questions"},
    "pairs, LoRA": {"dataset": "pairs", "init_from": "questions", "lora_rank": 4},
    "marks, LoRA": {"dataset": "marks", "init_from": "questions", "lora_rank": 4},
    "rewards, LoRA": {"dataset": "questions", "init_from": "questions", "lora_rank": 4}
    | {"reward": "chrf", "max_iters": 10, "eval_interval": 5},
    "two processes": {"dataset": "text", "dtype": "float32", "like": TEXT},
    "two processes, sharded": {"dataset": "text", "dtype": "float32", "shard": True, "like": TEXT},
}
for eager in (TEXT, "text, bfloat16", "text, float16", "questions", "pairs, LoRA"):
    RUNS[f"{eager}, compiled"] = RUNS[eager] | {"compile": True, "like": eager}


@dataclass
class Settings:
    device: str = "cuda"  # or cuda:1, mps; cpu is a rehearsal


class Check:
    """The rows so far, each {column: cell}; their data and out_dirs lie in folder."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device, self.rows = folder, device, {}
        self.size = (runs.TINY if device == "cpu" else LARGE) | {"n_kv_head": 1, "device": device}
        self.size |= {"lr_decay_iters": self.size["max_iters"], "dtype": "auto", "compile": False}
        self.size |= {"prompts": None}
        runs.write_toys(folder, 1 if device == "cpu" else 50)

    def row(self, name: str) -> dict:
        """Makes a row; an error becomes its verdict."""
        cells = self.rows[name] = {"verdict": "ok"}
        try:
            self.fill(name, cells)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            cells["verdict"] = printable(f"{type(error).__name__}: {first}").replace("|", "/")
        return cells

    def fill(self, name: str, cells: dict) -> None:
        torch._dynamo.reset()
        counters.clear()
        if self.device.startswith("cuda"):
            torch.cuda.set_device(torch.device(self.device).index or 0)
            torch.cuda.reset_peak_memory_stats()
        failures, output = [], io.StringIO()
        compiling.say_failure = failures.append
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            CHECKS.get(name, Check.train)(self, name, cells)
        assert not failures, f"compiling failed: {failures[0]}"
        graphs, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
        if graphs or "compiled" in name:
            cells |= {"graphs": str(graphs), "breaks": str(sum(breaks.values()))}
            assert not breaks, f"a graph breaks: {next(iter(breaks))}"
            # a GPU may have code of its own for the first sizes
            assert 0 < graphs <= 10, f"{graphs} graphs are not a few"

    def train(self, name: str, cells: dict, **more: object) -> None:
        """A run of train.py: its last loss and speed."""
        settings = self.size | RUNS[name] | {"out_dir": name} | more
        like = settings.pop("like", None)
        for key in settings.keys() & {"dataset", "init_from", "out_dir"}:
            settings[key] = self.folder / settings[key]
        if "two processes" in name:
            kind = self.device.partition(":")[0]
            settings |= {"device": kind, "compile": kind == "cuda"}
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            where = {"TMPDIR": str(self.folder)}  # torchrun leaves a folder there
            done = runs.run(*torchrun, "train.py", *runs.words(**settings), environment=where)
            assert not done.returncode, done.stderr.rpartition("error: ")[2]
        else:
            train.main(runs.words(**settings))
            if peak := torch.cuda.max_memory_allocated():
                cells["peak GB"] = f"{peak / 1e9:.2f}"
        last = runs.log(settings["out_dir"])[-1]
        cells |= {"tokens/s": f"{last['tokens_per_second']:,}", "MFU": f"{last['mfu']:.1%}"}
        self.note_loss(cells, last["val_loss"], like)

    def note_loss(self, cells: dict, loss: float, like: str | None) -> None:
        cells["loss"] = f"{loss:.4f}"
        if like:
            other = self.rows[like].get("loss", "nan")
            assert abs(loss - float(other)) <= CLOSE, f"the loss of {like} is {other}"


# --- rows that are not a run -------------------------------------------------------------------


def whole_model(check: Check, name: str, cells: dict) -> None:
    """A whole model is one graph of any number of tokens, which is then a symbol."""
    model = load_checkpoint(check.folder / TEXT, "best", check.device).model
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for length in (5, 9):
        idx = torch.arange(2 * length, device=check.device).view(2, length)
        assert (compiled(idx) - model(idx)).abs().max() < 1e-3, f"{length} tokens differ"


def stopped_and_resumed(check: Check, name: str, cells: dict) -> None:
    """A run that is stopped at half and resumed ends as one that is not."""
    check.train(TEXT, cells, out_dir=name, max_iters=check.size["max_iters"] // 2)
    check.train(TEXT, cells, out_dir=name, resume=True, like=TEXT)


def host_syncs(check: Check, name: str, cells: dict) -> None:
    """No step waits for the GPU, in any kind of training; only the scaler of float16 has to."""
    auto = devices.pick_dtype("auto", check.device)
    dtype = "float32" if auto == torch.float16 else "auto"
    step = train.train_step

    def step_without_syncs(*args: object) -> tuple:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with patch.object(train, "train_step", step_without_syncs):
        for run in (TEXT, "questions", "pairs", "pairs, LoRA"):
            check.train(run, {}, out_dir=f"{name}, {run}", dtype=dtype, max_iters=6)


def generation(check: Check, name: str, cells: dict) -> None:
    """A batch, on CUDA by a compiled step, gives each prompt the ids that it gets alone."""
    loaded = load_for_sampling(str(check.folder / "questions"), check.device)
    prompts = [prompt_ids(loaded, question["content"]) for question, _ in runs.questions(5, 50)]
    batched, alone = ([Request(p, Sampling(20, temperature=0.0)) for p in prompts] for _ in "12")
    for requests, size, eager in ((batched, 16, 0), (alone, 1, None)):
        batch = Batch(loaded.model, loaded.tokenizer.stop_ids, size, eager)
        batch.waiting.extend(requests)
        while batch:
            batch.step()
    same = sum(a.ids == b.ids for a, b in zip(batched, alone, strict=True))
    assert same >= 49, f"{same} of 50 answers are the same"  # of two ids as likely either is right


def evaluation(check: Check, name: str, cells: dict) -> None:
    """sample.py answers; evaluations.py finds the loss that training found."""
    model = {"out_dir": check.folder / "questions", "device": check.device}
    sample.main(runs.words(**model, start="刘备到1？"))
    evaluations.main(runs.words(**model))
    report = runs.read_json(model["out_dir"] / "evaluation.json")
    check.note_loss(cells, math.log(report["perplexity"]), "questions")


FUNCTIONS = (whole_model, stopped_and_resumed, host_syncs, generation, evaluation)
CHECKS = {function.__name__.replace("_", " "): function for function in FUNCTIONS}


def lack(name: str, device: str) -> str | None:
    """Why this machine cannot have a row, if so."""
    on_cuda = device.startswith("cuda")
    emulates = on_cuda and devices.pick_dtype("auto", device) != torch.bfloat16
    alone = (not on_cuda or torch.cuda.device_count() < 2) and "it takes two GPUs"
    reasons = {"compiled": compiling.what_lacks(device), "cuda:1": alone, "sharded": alone}
    reasons["two processes"] = device != "cpu" and alone
    reasons["bfloat16"] = emulates and "this GPU only emulates it"
    reasons["host syncs"] = not on_cuda and "CUDA counts them"
    return next((why for part, why in reasons.items() if part in name and why), None)


# --- what is printed ---------------------------------------------------------------------------


def print_line(name: str, cells: dict) -> None:
    shown = [f"{cells.get(column, '-'):8}" for column in COLUMNS]
    print(f"| {name:25} | {' | '.join(shown)} |", flush=True)


def main(argv: list[str]) -> None:
    device = devices.pick_device(configure(Settings, argv).device)
    if device == "cpu":
        torch.set_num_threads(1)
        compiling.backend = "eager"  # traces, and needs no compiler
    print(device, devices.environment(device), *devices.ask_driver("driver_version,compute_cap"))
    print(f"Python {platform.python_version()}, {platform.platform()}\n")
    print_line("what", dict(zip(COLUMNS, COLUMNS, strict=True)))
    print_line("-" * 25, dict.fromkeys(COLUMNS, "-" * 8))
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        check = Check(Path(folder), device)
        for name in [*RUNS, *CHECKS]:
            why = lack(name, device)
            print_line(name, {"verdict": f"- ({why})"} if why else check.row(name))
    bad = [name for name, cells in check.rows.items() if cells["verdict"] != "ok"]
    if bad:
        raise UserError(f"{len(bad)} of {len(check.rows)} rows are not ok: {'; '.join(bad)}")


if __name__ == "__main__":
    command(main)
