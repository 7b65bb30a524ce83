"""Toy datasets, tiny runs and the scripts' real command lines, for the tests of training."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import train
from data_utils import write_pretrain, write_sft
from tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PEOPLE = ["刘备", "关羽", "张飞", "曹操", "孙权", "诸葛亮", "周瑜", "吕布"]
PLACES = ["荆州", "徐州", "洛阳", "许昌", "江东"]
DEEDS = ["到", "攻打", "离开", "守住"]
TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 4,
    "max_iters": 20,
    "warmup_iters": 4,
    "eval_interval": 10,
    "log_interval": 1,
    "device": "cpu",
}

torch.set_num_threads(1)  # where other processes run too, two threads wait for each other


def novel(seed: int, sentences: int) -> str:
    draw = random.Random(seed)
    deeds = ((draw.choice(PEOPLE), draw.choice(DEEDS), draw.choice(PLACES)) for _ in range(sentences))
    return "".join("".join(deed) + "。" for deed in deeds)


def questions(seed: int, count: int) -> list[list[dict]]:
    """Questions that are all different, with answers of 1 to 4 places."""
    draw = random.Random(seed)
    return [
        [
            {"role": "user", "content": f"{draw.choice(PEOPLE)}到{seed}{number}？"},
            {"role": "assistant", "content": "".join(draw.choices(PLACES, k=1 + number % 4)) + "。"},
        ]
        for number in range(count)
    ]


def toy_tokenizer(vocab_size: int = 320) -> Tokenizer:
    return train_tokenizer([novel(0, 400)], vocab_size)


def write_toys(folder: Path) -> None:
    """folder/text, a novel, and folder/questions, of one vocabulary."""
    texts = {"train": [novel(0, 400)], "val": [novel(1, 40)]}
    write_pretrain(folder / "text", toy_tokenizer(), texts, ["a test"])
    pairs = {"train": questions(1, 90), "val": questions(2, 12)}
    write_sft(folder / "questions", toy_tokenizer(), pairs, ["a test"], max_tokens=32)


def words(**settings: object) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def train_here(**settings: object) -> Path:
    """train.py's main in this process, on a tiny model; returns the out_dir."""
    given = {} if "resume" in settings or "init_from" in settings else TINY
    if "init_from" in settings:
        given = {name: value for name, value in TINY.items() if not name.startswith("n_")}
    train.main(words(**given | settings))
    return Path(settings["out_dir"])


def start(script: str, *argv: str, **options) -> subprocess.Popen:
    """A script of the repository in a process of its own."""
    where = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    path = where["cwd"] / script
    return subprocess.Popen([sys.executable, str(path), *argv], env=environment, **where)


def run(script: str, *argv: str, **options) -> subprocess.CompletedProcess:
    """The same until it ends; stdout and stderr as text."""
    process = start(script, *argv, **options)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, decoded(out), decoded(err))


def decoded(output: bytes | None) -> str:
    return (output or b"").decode()


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line on stderr of a run that failed as it should; progress bars aside."""
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    lines = [line for line in lines if not re.search(r"\d+%\|", line)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: "), done.stderr
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    return lines[0].removeprefix("error: ")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pointer(out_dir: Path, which: str) -> str:
    return (out_dir / which).read_text(encoding="utf-8").strip()


def checkpoint_file(out_dir: Path, name: str, which: str = "latest") -> Path:
    return out_dir / pointer(out_dir, which) / name


def weights(out_dir: Path, which: str = "latest") -> dict[str, torch.Tensor]:
    return load_file(checkpoint_file(out_dir, "model.safetensors", which))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def saved(out_dir: Path, which: str = "latest") -> dict:
    return read_json(checkpoint_file(out_dir, "run.json", which))


def log(out_dir: Path) -> list[dict]:
    lines = (out_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def course(out_dir: Path) -> list[dict]:
    """The log without what a clock measures."""
    clock = ("seconds", "tokens_per_second")
    return [{key: value for key, value in r.items() if key not in clock} for r in log(out_dir)]


def assert_same_run(one: Path, other: Path) -> None:
    """The same bits of weights and optimizer, and the same log."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        same = checkpoint_file(one, name).read_bytes() == checkpoint_file(other, name).read_bytes()
        assert same, f"{name} differs"
    assert course(one) == course(other)
    assert pointer(one, "best") == pointer(other, "best")
    drop = {"seconds"}
    progress = [saved(out)["progress"] for out in (one, other)]
    assert progress[0].keys() == progress[1].keys()
    assert all(progress[0][key] == progress[1][key] for key in progress[0].keys() - drop)
