"""Speed beside other projects', and what three recipes reach in the same time.

    python -m bench step           training steps beside Hugging Face's, and where their time goes
    python -m bench generate       tokens per second beside Hugging Face's and llama.cpp's
    python -m bench serve          many users at once on sample_gradio.py
    python -m bench quality        ours, MiniMind's recipe and the reference's; some three hours
    python -m bench step --help    the settings of a part

A part writes its figures to bench-results/PART.json, with its environment and settings. Figures
are ratios within one run, since machines differ and are shared: contenders take turns (A B A B
...), medians are compared, and the range is that of the ratios turn by turn. On a busy machine,
OMP_NUM_THREADS=1 and --clock=cpu leave most of the neighbours' work out.
"""

import dataclasses
import importlib

from configurator import UserError, command, configure, nearest, repo_path, show_path
from miniglm.checkpoint import check_writable
from miniglm.devices import environment
from miniglm.jsonl import write_report

PARTS = ("step", "generate", "serve", "quality")  # a module each: Settings and bench


def main(argv: list[str]) -> None:
    """Runs a part and writes its results."""
    part, *words = argv or ["--help"]
    if part in ("--help", "-h"):
        print(__doc__.strip())
        return
    if part not in PARTS:
        hint = nearest(part, PARTS) or f"; write one of {', '.join(PARTS)}"
        raise UserError(f"unknown part {part!r}{hint}")
    module = importlib.import_module(f"bench.{part}")
    config = configure(module.Settings, words)
    check_writable(repo_path(config.out), "--out=")
    record = {
        "part": part,
        "environment": environment(getattr(config, "device", "cpu")),
        "settings": dataclasses.asdict(config),
        "results": module.bench(config),
    }
    path = repo_path(config.out) / f"{part}.json"
    write_report(path, record)
    print(f"written to {show_path(path)}")


if __name__ == "__main__":
    command(main)
