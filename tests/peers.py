"""The novel for MiniMind's and nanochat's own trainings, and their checkpoints' bits per byte.

    python -m tests.peers text                                     # in MiniGLM's environment

    python -m tests.peers cut --peer=minimind --repo=../minimind --length=256
    python -m tests.peers score --peer=minimind --repo=../minimind --length=256 --checkpoint=FILE

    python -m tests.peers cut --peer=nanochat --repo=../nanochat                 # for tok_train
    python -m tests.peers cut --peer=nanochat --repo=../nanochat --length=512    # for base_train
    python -m tests.peers score --peer=nanochat --repo=../nanochat --checkpoint=d4

`cut` and `score` take the other project's environment; docs/report.md has what lies between them.
The score is that of the validation chapters, on a CPU, by the project's own model and tokenizer.
Both trainings drop what is longer than a row, so `cut` writes pieces that fill one exactly.
"""

import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from configurator import UserError, at_least, command, configure, repo_path, show_path, user_path

SCRIPTS = {"minimind": "trainer/train_pretrain.py", "nanochat": "scripts/base_train.py"}
BATCH_SIZE = 8  # windows that are scored together
IGNORE = -1  # a target that does not count


@dataclass
class Settings:
    names: list[str] = field(default_factory=list)  # text, cut or score
    peer: Literal["minimind", "nanochat"] = "minimind"
    repo: str = ""  # its clone
    to: str = "../peers"  # folder of the chapters and of MiniMind's rows
    length: Annotated[int | None, at_least(16)] = None  # its max_seq_len; None: whole chapters
    checkpoint: str = ""  # MiniMind's file, or nanochat's tag

    def __post_init__(self):
        if len(self.names) != 1 or self.names[0] not in STEPS:
            raise UserError(f"names={','.join(self.names)} must be one of {', '.join(STEPS)}")


# --- text and rows ------------------------------------------------------------------------------


def text(config: Settings) -> None:
    """Chapters of data/sanguo as train.jsonl and val.jsonl."""
    import numpy as np

    from data_utils import Dataset

    data = Dataset("sanguo")
    for split in data.splits:
        ends = np.flatnonzero(data.tokens[split] == data.tokenizer.end_of_text) + 1
        parts = np.split(data.tokens[split], ends)[:-1]
        write(config, split, [data.tokenizer.decode(part.tolist()) for part in parts])


def write(config: Settings, name: str, rows: list[str]) -> None:
    path = repo_path(config.to) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{show_path(path)}: {len(rows)} rows")


def read(config: Settings, split: str) -> list[str]:
    path = repo_path(config.to) / f"{split}.jsonl"
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def cut(config: Settings) -> None:
    """rows.jsonl for MiniMind; for nanochat parquet files, of which it validates on the last."""
    if config.peer == "minimind":
        return write(config, "rows", rows_of(config, "train", config.length - 2))
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(os.environ["NANOCHAT_BASE_DIR"]) / "base_data_climbmix"
    folder.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(("train", "val")):
        rows = read(config, split)
        if config.length:
            rows = rows_of(config, split, config.length)
            random.Random(0).shuffle(rows)  # its loader does not
        table = pa.table({"text": rows})
        pq.write_table(table, folder / f"shard_{number:05d}.parquet", row_group_size=128)
        print(f"{split}: {len(rows)} rows")


def rows_of(config: Settings, split: str, size: int) -> list[str]:
    encode, decode, _ = open_tokenizer(config)
    return [row for chapter in read(config, split) for row in pieces(chapter, encode, decode, size)]


def pieces(chapter: str, encode: Callable, decode: Callable, size: int) -> Iterator[str]:
    """The chapter in pieces of exactly `size` tokens, cut between characters. Where no cut gives so
    many, a piece begins some characters earlier or later; the last begins as early as it must."""
    start = 0
    while start < len(chapter):
        for here in (*range(start, max(start - 20, -1), -1), *range(start + 1, start + 20)):
            ids = encode(chapter[here : here + 3 * size])
            end = here + len(decode(ids[:size]))
            if len(ids) < size:
                yield last_piece(chapter, encode, decode, size)
                return
            if len(encode(chapter[here:end])) == size:
                yield chapter[here:end]
                break
        else:
            raise UserError(f"no piece of {size} tokens near character {start}")
        start = end


def last_piece(chapter: str, encode: Callable, decode: Callable, size: int) -> str:
    for end in range(len(chapter), len(chapter) - 50, -1):
        start = end - len(decode(encode(chapter[max(0, end - 3 * size) : end])[-size:]))
        for here in (start, start + 1, start - 1):
            if len(encode(chapter[here:end])) == size:
                return chapter[here:end]
    raise UserError(f"no last piece of {size} tokens; lower --length=")


# --- the other projects -------------------------------------------------------------------------


def open_tokenizer(config: Settings) -> tuple[Callable, Callable, int]:
    """Functions from text to ids, without special ones, and back; the id before a text."""
    if config.peer == "minimind":
        from transformers import AutoTokenizer

        own = AutoTokenizer.from_pretrained(user_path(config.repo) / "model")
        return partial(own.encode, add_special_tokens=False), own.decode, own.bos_token_id
    from nanochat.tokenizer import get_tokenizer

    own = get_tokenizer()
    return own.encode, own.decode, own.get_bos_token_id()


def open_model(config: Settings) -> tuple[Callable, int]:
    """A function from idx (B, T) to logits (B, T, V), and the longest T of its training."""
    import torch

    if config.peer == "nanochat":
        from nanochat.checkpoint_manager import load_model

        model, _, meta = load_model("base", torch.device("cpu"), "eval", config.checkpoint)
        return model, meta["max_seq_len"]
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    state = torch.load(user_path(config.checkpoint), map_location="cpu")
    n_layer = len({key.split(".")[2] for key in state if key.startswith("model.layers.")})
    n_embd = state["model.embed_tokens.weight"].shape[1]
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=n_embd, num_hidden_layers=n_layer))
    model.eval().load_state_dict(state)
    # training's last input always has eos as its target
    return lambda idx: model(idx).logits, config.length - 2


# --- bits per byte ------------------------------------------------------------------------------


def score(config: Settings) -> None:
    """Bits per byte of the validation chapters; windows of like length are scored together."""
    import torch
    import torch.nn.functional as F
    from torch.nn.utils.rnn import pad_sequence

    encode, decode, bos = open_tokenizer(config)
    logits_of, length = open_model(config)
    chapters = read(config, "val")
    encoded = [encode(chapter) for chapter in chapters]
    assert [decode(ids) for ids in encoded] == chapters
    rows = [row for ids in encoded for row in windows(ids, bos, length)]
    rows.sort(key=lambda row: len(row[0]))
    nats, n_bytes = 0.0, sum(len(chapter.encode()) for chapter in chapters)
    for first in range(0, len(rows), BATCH_SIZE):
        idx, targets = zip(*rows[first : first + BATCH_SIZE], strict=True)
        idx = pad_sequence(list(map(torch.tensor, idx)), True, bos)
        targets = pad_sequence(list(map(torch.tensor, targets)), True, IGNORE).flatten()
        with torch.no_grad():
            logits = logits_of(idx).flatten(0, 1)
        nats += F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum").item()
    print(f"{len(rows)} windows, {n_bytes} bytes, {nats:.1f} nats")
    print(f"bits per byte {nats / math.log(2) / n_bytes:.4f}")


def windows(ids: list[int], bos: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs of at most `length` tokens with their targets. bos begins each; from the second on the
    last token of the one before follows, so that, as in MiniGLM, each target but a chapter's first
    has a token of text before it. Each token is a target once."""
    yield [bos, *ids[: length - 1]], ids[:length]
    for at in range(length, len(ids), length - 1):
        part = ids[at - 1 : at + length - 1]
        yield [bos, *part[:-1]], [IGNORE, *part[1:]]


STEPS = {"text": text, "cut": cut, "score": score}


def main(argv: list[str]) -> None:
    config = configure(Settings, argv)
    if config.names != ["text"]:
        if not (user_path(config.repo) / SCRIPTS[config.peer]).is_file():
            raise UserError(f"--repo={config.repo} is no clone of {config.peer}")
        if config.peer == "minimind" and not config.length:
            raise UserError("--length= is missing, the max_seq_len of train_pretrain.py")
        if config.peer == "minimind" and config.names == ["score"] and not config.checkpoint:
            raise UserError("--checkpoint= is missing, the file that train_pretrain.py saved")
        if config.peer == "nanochat" and "NANOCHAT_BASE_DIR" not in os.environ:
            raise UserError("NANOCHAT_BASE_DIR is not set, where nanochat reads and writes")
        sys.path.insert(0, str(user_path(config.repo)))
    try:
        STEPS[config.names[0]](config)
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; each step has its environment, see docs/report.md") from None


if __name__ == "__main__":
    command(main)
