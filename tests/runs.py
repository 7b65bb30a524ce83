"""Toy datasets, tiny runs and real command lines, for the tests of training."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import train
from data_utils import Dataset
from miniglm.prep.writer import Mark, Pair, write_pretrain, write_sft, write_splits
from miniglm.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["*.py", "config/**/*.py", "data/**/*.py", "bench/*.py"]
SOURCES += [f"miniglm/**/*.{suffix}" for suffix in ("py", "css", "html", "md", "toml")]
PEOPLE = ["刘备", "关羽", "张飞", "曹操", "孙权", "诸葛亮", "周瑜", "吕布"]
PLACES = ["荆州", "徐州", "洛阳", "许昌", "江东"]
DEEDS = ["到", "攻打", "离开", "守住"]
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4}
TINY |= {"max_iters": 20, "warmup_iters": 4, "eval_interval": 10, "log_interval": 1}
TINY |= {"device": "cpu", "dtype": "float32"}
TINY |= {"prompts": []}  # samples take most of an evaluation
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def dialogue(*texts: str) -> list[dict]:
    """Turns that alternate between user and assistant."""
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def novel(seed: int, sentences: int) -> str:
    draw = random.Random(seed)
    return "".join(
        f"{draw.choice(PEOPLE)}{draw.choice(DEEDS)}{draw.choice(PLACES)}。"
        for _ in range(sentences)
    )


def questions(seed: int, count: int) -> list[list[dict]]:
    """Questions that are all different, with answers of 1 to 4 places."""
    draw, conversations = random.Random(seed), []
    for number in range(count):
        question = f"{draw.choice(PEOPLE)}到{seed}{number}？"
        answer = "".join(draw.choices(PLACES, k=1 + number % 4)) + "。"
        conversations.append(dialogue(question, answer))
    return conversations


def preferences(seed: int, count: int) -> list[Pair]:
    """Questions whose chosen answers are places, and the rejected ones people."""
    draw = random.Random(seed)
    return [
        ([question], answer["content"], "".join(draw.choices(PEOPLE, k=1 + number % 3)) + "。")
        for number, (question, answer) in enumerate(questions(seed, count))
    ]


def marks(seed: int, count: int) -> list[Mark]:
    """The good answers of preferences, and the bad ones of every third."""
    pairs = preferences(seed, count)
    good = [(prompt, chosen, None) for prompt, chosen, _ in pairs]
    return good + [(prompt, None, rejected) for prompt, _, rejected in pairs[::3]]


def toy_tokenizer(vocab_size: int = 320) -> Tokenizer:
    return train_tokenizer([novel(0, 400)], vocab_size)


def write_toys(folder: Path, scale: int = 1) -> None:
    """folder/text, a novel, folder/questions, pairs and marks, of one vocabulary; scale: how many
    times as much of each as the tests want."""
    texts = {"train": [novel(0, 400 * scale)], "val": [novel(1, 40 * scale)]}
    write_pretrain(folder / "text", toy_tokenizer(), texts, ["a test"])
    pairs = {"train": questions(1, 90 * scale), "val": questions(2, 12 * scale)}
    write_sft(folder / "questions", toy_tokenizer(), pairs, ["a test"], max_tokens=32)
    pairs = {"train": preferences(3, 60 * scale), "val": preferences(4, 14 * scale)}
    write_splits("dpo", folder / "pairs", toy_tokenizer(), pairs, ["a test"], max_tokens=32)
    marked = {"train": marks(3, 60 * scale), "val": marks(4, 9 * scale)}
    write_splits("kto", folder / "marks", toy_tokenizer(), marked, ["a test"], max_tokens=32)


def words(**settings: object) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def train_here(**settings: object) -> Path:
    """train.py's main in this process, on a tiny model; returns the out_dir."""
    given = {} if settings.get("resume") else TINY
    train.main(words(**given | settings))
    return Path(settings["out_dir"])


def start(script: str, *argv: str, environment: dict | None = None, **options) -> subprocess.Popen:
    """A script of the repository in a process of its own."""
    environment = os.environ | ENVIRONMENT | (environment or {})
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    path = ["-m", script[:-3].replace("/", ".")] if script.startswith("miniglm") else [script]
    return subprocess.Popen([sys.executable, *path, *argv], env=environment, **options)


def run(script: str, *argv: str, **options) -> subprocess.CompletedProcess:
    """The same until it ends; stdout and stderr as text."""
    return finish(start(script, *argv, encoding="utf-8", **options))


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# An interpreter that has imported torch, and forks for each line of stdin: [cwd, stdout, stderr,
# environment, script, *argv]. The child ends as any script does: Python prints its exception and
# sets the exit code.
READY = """
import gc, json, os, runpy, sys
import numpy, safetensors.torch, tiktoken, tokenizers, torch, torch._dynamo, tqdm
gc.freeze()  # spares each child a collection of all imports at its end
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
cwd, out, err, given, *sys.argv = json.loads(line)
os.environ.clear()
os.environ.update(given)
for number, path in enumerate([os.devnull, out, err]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
os.chdir(cwd)
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextlib.contextmanager
def ready_python(folder: Path) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """A `run` for many command lines: each is a process of its own that does not import torch
    again, which takes seconds. It is `run` itself if processes cannot fork."""
    if not hasattr(os, "fork"):
        yield run
        return
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ready = subprocess.Popen([sys.executable, "-c", READY], env=os.environ | ENVIRONMENT, **pipes)
    outputs = folder / "stdout", folder / "stderr"

    def run_ready(
        script: str, *argv: str, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess:
        environment = os.environ | ENVIRONMENT | environment
        words = [cwd, *outputs, environment, cwd / script, *argv]
        ready.stdin.write(json.dumps(words, default=str) + "\n")
        ready.stdin.flush()
        code = int(ready.stdout.readline())
        out, err = (path.read_text(encoding="utf-8") for path in outputs)
        return subprocess.CompletedProcess(argv, code, out, err)

    with ready:
        yield run_ready


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for(happens: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not happens():
        assert process.poll() is None, "the process ended first"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_for_lines(out_dir: Path, count: int, process: subprocess.Popen) -> None:
    """Until its log has so many."""
    file = out_dir / "log.jsonl"
    wait_for(lambda: file.is_file() and file.read_bytes().count(b"\n") >= count, process)


def assert_imports_without(module: str, *packages: str) -> None:
    """As where they are not installed."""
    code = f"import sys; sys.modules |= dict.fromkeys({packages}); import {module}"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line on stderr of a run that failed as it should, without progress bars."""
    lines = without_bars(done.stderr)
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: "), done.stderr
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    return lines[0].removeprefix("error: ")


def without_bars(stderr: str) -> list[str]:
    """The lines that are not a progress bar."""
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    return [line for line in lines if not re.search(r"\d+%\|", line)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pointer(out_dir: Path, which: str) -> str:
    return (out_dir / which).read_text(encoding="utf-8").strip()


def checkpoint_file(out_dir: Path, name: str, which: str = "latest") -> Path:
    return out_dir / pointer(out_dir, which) / name


def weights(out_dir: Path, which: str = "latest") -> dict[str, torch.Tensor]:
    """The weights of a checkpoint; of an adapter its A and B."""
    adapter = checkpoint_file(out_dir, "adapter.safetensors", which)
    return load_file(adapter if adapter.is_file() else adapter.with_name("model.safetensors"))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(file: Path, **values: object) -> None:
    """Replaces parts of an object in a file."""
    file.write_text(json.dumps(read_json(file) | values), encoding="utf-8")


def edit_run(checkpoint: Path, **values: object) -> None:
    edit_json(checkpoint / "run.json", **values)


def flip_bit(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def plant_nan(out_dir: Path, data: Dataset) -> int:
    """Makes the embedding of the rarest trained id NaN, and so the loss of its rows; the id."""
    ids, counts = np.unique(data.tokens["train"], return_counts=True)
    rarest = int(ids[counts.argmin()])
    file = checkpoint_file(out_dir, "model.safetensors", "best")
    planted = load_file(file)
    planted["wte.weight"][rarest] = math.nan
    save_file(planted, file)
    edit_run(file.parent, sha256={})
    return rarest


def ids_of_row(data: Dataset, row: int) -> list[int]:
    """The model's input of a training row, taken from the file itself."""
    tokens = data.tokens["train"].tolist()
    if data.kind == "pretrain":
        return (2 * tokens)[row : row + TINY["block_size"]]
    return tokens[data.bounds["train"][row] : int(data.bounds["train"][row + 1]) - 1]


def saved(out_dir: Path, which: str = "latest") -> dict:
    return read_json(checkpoint_file(out_dir, "run.json", which))


def log(out_dir: Path) -> list[dict]:
    lines = (out_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def course(out_dir: Path) -> list[dict]:
    """The log without measured times."""
    clock = ("seconds", "tokens_per_second", "tflops", "mfu")
    return [{key: value for key, value in r.items() if key not in clock} for r in log(out_dir)]


def assert_same_run(out_dir: Path, other: Path) -> None:
    """The same bits of weights and optimizer, and the same log."""
    is_adapter = checkpoint_file(out_dir, "adapter.safetensors").is_file()
    for stem in ("adapter" if is_adapter else "model", "optimizer"):
        name = f"{stem}.safetensors"
        ours, theirs = (checkpoint_file(out, name).read_bytes() for out in (out_dir, other))
        same = ours == theirs  # without a diff of all bytes
        assert same, f"{name} differs"
    assert course(out_dir) == course(other)
    assert pointer(out_dir, "best") == pointer(other, "best")
    progress = [saved(out)["progress"] | {"seconds": None} for out in (out_dir, other)]
    assert progress[0] == progress[1]


def assert_resumes_exactly(folder: Path, **settings: object) -> tuple[Path, Path]:
    """A run resumed twice ends in the bits of one that is never stopped; returns both."""
    settings |= {"lr_decay_iters": 6, "eval_interval": 2}
    whole = train_here(out_dir=folder / "whole", max_iters=6, **settings)
    parts = train_here(out_dir=folder / "parts", max_iters=2, **settings)
    for max_iters in (4, 6):
        train_here(out_dir=parts, resume=True, max_iters=max_iters)
    assert_same_run(whole, parts)
    return whole, parts


def assert_accumulation_is_exact(folder: Path, names: Iterable[str], **settings: object) -> None:
    """Four micro-batches of 2 rows give the weights of a batch of 8, and these names in the log."""
    import pytest  # here, since the check of a GPU needs no more than the product does

    settings |= {"max_iters": 3, "learning_rate": 1e-4, "warmup_iters": 0}
    once = train_here(out_dir=folder / "once", batch_size=8, **settings)
    parts = {"batch_size": 2, "gradient_accumulation_steps": 4}
    four = train_here(out_dir=folder / "four", **parts, **settings)
    for name, weight in weights(once).items():
        assert (weight - weights(four)[name]).abs().max() < 1e-6
    for a, b in zip(log(once), log(four), strict=True):
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-4)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A disk of 2 MB mounted on folder, and leave(n), which fills it up to n bytes. Skips the test
    if no disk can be mounted."""
    import pytest

    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")

    def leave(room: int) -> None:
        filler = folder / "filler"
        filler.unlink(missing_ok=True)
        filler.write_bytes(bytes(shutil.disk_usage(folder).free - room))

    try:
        yield folder, leave
    finally:
        # lazily: a loaded checkpoint may still be mapped into memory
        subprocess.run(["umount", "-l", str(folder)], check=True)
