"""The loader on a corpus far larger than this machine's disk: memory, speed, resuming, shuffling.

    python -m bench loader                       10^11 tokens
    python -m bench loader --tokens=1000000000

It is the real loader on a real dataset, whose shards are sparse files: they have their full size
and take no space. So all is measured but the disk's own time to read what is not in memory; how
many places and bytes a step reads is printed.
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.data import VOCABULARY, proportional_share
from configurator import ROOT, UserError
from data_utils import Dataset
from miniglm.prep.writer import shard_names, shard_sizes
from miniglm.tokenizer import load_tokenizer

ROWS, BLOCK_SIZE = 512, 1024  # of a step: half a million tokens
STEPS = 200  # that are timed
SAMPLE = 2**20  # rows whose order is looked at
BINS = 1000  # of equal size, over which they should lie evenly


def bench_loader(config) -> dict:
    """The figures of a loader on config.tokens tokens, printed and returned."""
    folder = ROOT / "bench-data" / "sparse"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_sparse(folder, config.tokens)
        return measure_loader(folder, config)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_sparse(folder: Path, tokens: int) -> None:
    """A dataset of as many tokens, all of them 0, whose files are holes."""
    if tokens < 2 * BLOCK_SIZE * BINS:
        raise UserError(f"tokens={tokens} must be {2 * BLOCK_SIZE * BINS} or more")
    tokenizer = load_tokenizer(VOCABULARY)
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer.json")
    splits = {}
    for split, total in (("train", tokens), ("val", 2 * BLOCK_SIZE)):
        shards = shard_sizes(total)
        for name, length in zip(shard_names(split, shards), shards, strict=True):
            with (folder / name).open("wb") as file:
                try:
                    file.truncate(2 * length)
                except OSError as error:
                    raise UserError(f"no sparse files in {folder.name}: {error}") from None
        splits[split] = {"tokens": total, "shards": shards, "fingerprint": f"{split} {total}"}
    meta = {"kind": "pretrain", "dtype": "uint16", "splits": splits}
    meta["tokenizer_sha256"] = tokenizer.sha256
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def measure_loader(folder: Path, config) -> dict:
    before = proportional_share(os.getpid())
    opening, data = timed(lambda: Dataset(str(folder)))
    opened = proportional_share(os.getpid()) - before
    n = data.n_rows("train", BLOCK_SIZE)

    def step(start: int) -> np.ndarray:
        rows = data.step_rows(config.seed, start, ROWS, BLOCK_SIZE)
        data.batch(rows, BLOCK_SIZE)
        return rows

    first, _ = timed(lambda: step(0))
    seconds = [timed(functools.partial(step, number * ROWS))[0] for number in range(1, STEPS)]
    resumed, _ = timed(lambda: step(n // 2 + 12_345))
    grown = proportional_share(os.getpid()) - before
    results = {
        "tokens": config.tokens,
        "files": len(list(folder.glob("train*.bin"))),
        "rows_of_an_epoch": n,
        "opening_seconds": opening,
        "opening_memory": opened,
        "memory": grown,
        "first_step_seconds": first,
        "step_seconds": float(np.median(seconds)),
        "resumed_step_seconds": resumed,
        "tokens_per_second": ROWS * BLOCK_SIZE / float(np.median(seconds)),
    } | order_of(data, config.seed, n)
    print_loader(results)
    return results


def timed(call: Callable) -> tuple[float, object]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def order_of(data: Dataset, seed: int, n: int) -> dict[str, float]:
    """How evenly and independently the first rows of an epoch lie in the corpus."""
    count = min(SAMPLE, n)
    places = data.step_rows(seed, 0, count, BLOCK_SIZE) / len(data.tokens["train"])  # in [0, 1)
    counts = np.histogram(places, BINS, (0, 1))[0]
    expected = count / BINS
    return {
        "rows_looked_at": count,
        "different_rows": len(np.unique(places)),
        "chi_square_per_degree": float(((counts - expected) ** 2 / expected).sum() / (BINS - 1)),
        "correlation_of_neighbours": float(np.corrcoef(places[:-1], places[1:])[0, 1]),
        "mean_distance_of_neighbours": float(np.abs(np.diff(places)).mean()),
    }


def print_loader(results: dict) -> None:
    """What was measured, beside what an ideal shuffle has."""
    r, step_bytes = results, 2 * ROWS * (BLOCK_SIZE + 1)
    stored = 8 * r["rows_of_an_epoch"]
    lines = [
        f"{r['tokens']:.3g} tokens in {r['files']} files, {r['rows_of_an_epoch']:,} rows an epoch",
        f"opened in {r['opening_seconds'] * 1e3:.0f} ms and {r['opening_memory'] / 1e6:.1f} MB",
        f"after {STEPS} steps {r['memory'] / 1e6:.1f} MB, pages of the files included; a stored "
        f"permutation alone would take {stored / 1e6:,.0f} MB",
        f"a step of {ROWS} rows of {BLOCK_SIZE}: {r['step_seconds'] * 1e3:.1f} ms, "
        f"{r['tokens_per_second'] / 1e6:.1f} million tokens per second on one core; from a disk, "
        f"{ROWS} places and {step_bytes / 1e6:.1f} MB",
        f"first step {r['first_step_seconds'] * 1e3:.1f} ms; resumed in the middle of the epoch "
        f"{r['resumed_step_seconds'] * 1e3:.1f} ms",
        f"of {r['rows_looked_at']:,} rows {r['different_rows']:,} are different",
        f"chi square over {BINS} parts of the corpus, per degree of freedom: "
        f"{r['chi_square_per_degree']:.3f} (a fair draw has 1 +- {(2 / (BINS - 1)) ** 0.5:.3f})",
        f"correlation of neighbours {r['correlation_of_neighbours']:+.4f} (0 +- "
        f"{r['rows_looked_at'] ** -0.5:.4f}), mean distance "
        f"{r['mean_distance_of_neighbours']:.4f} of the corpus (1/3)",
    ]
    print("loader:", *lines, sep="\n  ")
