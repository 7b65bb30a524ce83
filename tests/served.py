"""Tiny models behind the real page and endpoint, in a thread of the tests' own process."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import sample_gradio
from miniglm.generation import Sampling
from miniglm.text import (
    chat_prompt,
    complete,
    complete_question,
    load_for_sampling,
    prompt_ids,
)
from miniglm.tokenizer import Tokenizer
from model import GPT
from tests.helpers import save_run, tiny_model, tiny_tokenizer
from tests.runs import edit_run, free_port, pointer
from tests.servers import serve

BLOCK = 256  # tokens


@torch.no_grad()
def endless_model(seed: int, tokenizer: Tokenizer) -> GPT:
    """A model that never ends by itself, and says whole characters only: its last norm's first
    channel is always 1, and the other ids' heads count that against them."""
    ids = range(tokenizer.n_vocab)
    others = [id for id in ids if not re.fullmatch("[\u3000-\uff5e]+", tokenizer.decode([id]))]
    options = {"norm": "layernorm", "bias": True, "tie_weights": False, "block_size": BLOCK}
    model = tiny_model(seed, n_vocab=tokenizer.n_vocab, **options)
    model.norm.weight[0], model.norm.bias[0] = 0, 1
    model.lm_head.weight[others, 0] = -1000
    return model


def write_models(folder: Path) -> dict[str, Path]:
    """folder/answers, which answers questions that end in ？, and folder/novel, which continues."""
    tokenizer, out_dirs = tiny_tokenizer(), {}
    for seed, (name, kind) in enumerate({"answers": "sft", "novel": "pretrain"}.items()):
        model = endless_model(seed, tokenizer)
        out_dirs[name] = save_run(folder / name, model, tokenizer, folder / "data", kind)
        about = {"kind": kind, "name": "data", "question_end": "？" if kind == "sft" else ""}
        edit_run(out_dirs[name] / pointer(out_dirs[name], "best"), dataset=about)
    return out_dirs


@contextlib.contextmanager
def serving(out_dirs: list[Path], **settings: object) -> Iterator[tuple[str, dict]]:
    """The address, and the servers by name."""
    names = [str(path) for path in out_dirs]
    config = sample_gradio.Settings(
        out_dir=names, port=free_port(), device="cpu", **{"max_new_tokens": 20000} | settings
    )
    servers = sample_gradio.load_servers(config)
    with serve(sample_gradio.make_app(servers, config), config.port) as address:
        yield address, servers


def wait_until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def expected(out_dir: Path, messages: list[dict], sampling: Sampling, number: int = 0) -> str:
    """What sample.py's own functions make of messages, alone: the sample of that number."""
    checkpoint = load_for_sampling(out_dir, "cpu")
    *before, last = messages
    if checkpoint.answers:
        if last["role"] == "user":
            last = last | {"content": complete_question(checkpoint, last["content"])}
        prompt = chat_prompt(checkpoint, [*before, last])
    else:
        prompt = prompt_ids(checkpoint, last["content"])
    [outputs] = complete(checkpoint, [prompt], sampling, number + 1)
    return outputs[number].text
