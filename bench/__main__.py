"""Speed beside other projects', and what three recipes reach in the same time.

    python -m bench step           training steps beside Hugging Face's, and where their time goes
    python -m bench generate       tokens per second beside Hugging Face's and llama.cpp's
    python -m bench data           a large text prepared, beside other ways to do it
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
from types import SimpleNamespace

from bench.timing import write_json
from configurator import command, configure, repo_path, run_part, show_path
from miniglm.devices import environment

PARTS = ("step", "generate", "data", "serve", "quality")  # a module each: Settings and bench


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__.strip())
        return
    usage = f"one of {', '.join(PARTS)}"
    run_part(SimpleNamespace(names=argv), dict.fromkeys(PARTS, measure_part), usage)


def measure_part(words: SimpleNamespace, argv: list[str]) -> None:
    """Runs a part and writes its results."""
    part = words.names[0]
    module = importlib.import_module(f"bench.{part}")
    config = configure(module.Settings, argv)
    record = {
        "part": part,
        "environment": environment(getattr(config, "device", "cpu")),
        "settings": dataclasses.asdict(config),
        "results": module.bench(config),
    }
    path = repo_path(config.out) / f"{part}.json"
    write_json(path, record)
    print(f"written to {show_path(path)}")


if __name__ == "__main__":
    command(main)
