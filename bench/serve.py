"""Many users at once on sample_gradio.py: how long each waits, and whether each gets its own text.

    python -m bench serve --out_dir=out-sanguo-sft --users=20 --seconds=60

The server runs in a process of its own, on one core where the system can pin it. Each user has a
question and a seed, asks it again and again, and compares the text with what sample.py's functions
made of it before. First on the endpoint, streamed, then on the page with a browser's protocol.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import unescape
from typing import Annotated

import httpx
import numpy as np
import openai
from gradio_client import Client

from configurator import ROOT, UserError, above, at_least, repo_path
from miniglm.generation import Sampling
from miniglm.text import complete, load_for_sampling, prompt_ids
from sample import read_start

WARMTH = 0.3  # the page's temperature for answers
LENGTH = 256  # tokens

Pieces = Callable[[], Iterator[str]]  # asks once: the answer so far, again and again


@dataclass
class Settings:
    out_dir: str = "out-sanguo-sft"  # of a model that answers
    users: Annotated[int, at_least(1)] = 20  # at once
    seconds: Annotated[float, above(0)] = 60.0  # of each of the two ways
    questions: str = "data/sanguo/qa.jsonl"  # {"Question": text} a line; a user takes one
    out: str = "bench-results"  # where the figures are written


def bench(config: Settings) -> dict:
    """Waiting times and faults of both ways, printed and returned."""
    records = read_start(f"FILE:{repo_path(config.questions)}", answers=True)
    checkpoint = load_for_sampling(config.out_dir, "cpu")
    if not checkpoint.answers:
        raise UserError(f"{config.out_dir} does not answer questions; pass a fine-tuned --out_dir=")
    every = max(1, len(records) // config.users)  # from all over the file
    users = [(records[n * every % len(records)]["Question"], n) for n in range(config.users)]
    texts = []
    for question, seed in users:
        sampling = Sampling(max_new_tokens=LENGTH, temperature=WARMTH, seed=seed)
        [[output]] = complete(checkpoint, [prompt_ids(checkpoint, question)], sampling)
        texts.append(output.text)
    results, model = {}, repo_path(config.out_dir).name
    print(f"{config.users} users, {config.seconds:g} s, {len(set(texts))} different texts")
    with server(config.out_dir) as address:
        for way, new_user in (("endpoint", endpoint_user), ("page", page_user)):
            asks = [new_user(address, model, *user) for user in users]
            results[way] = crowd(way, asks, texts, config.seconds)
    return results


@contextlib.contextmanager
def server(out_dir: str) -> Iterator[str]:
    """Its address, once it answers."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = [f"--out_dir={out_dir}", f"--port={port}", "--device=cpu"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sample_gradio.py"), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, [max(os.sched_getaffinity(0))])
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise UserError("the server did not start; see above")
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{address}/v1/models").raise_for_status()
                break
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


# --- users ---------------------------------------------------------------------------------------


def endpoint_user(address: str, model: str, question: str, seed: int) -> Pieces:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    body = {"model": model, "messages": [{"role": "user", "content": question}], "seed": seed}
    body |= {"temperature": WARMTH, "max_tokens": LENGTH, "stream": True}

    def ask() -> Iterator[str]:
        text = ""
        for chunk in client.chat.completions.create(**body):
            text += chunk.choices[0].delta.content or ""
            yield text

    return ask


def page_user(address: str, model: str, question: str, seed: int) -> Pieces:
    client = Client(address, verbose=False, analytics_enabled=False)
    # in the order in which the page makes its components
    values = [model, WARMTH, 1.0, LENGTH, 1.0, seed, 1, False, question]

    def ask() -> Iterator[str]:
        job = client.submit(*values, api_name="/ask")
        for log, _ in job:
            messages = log["value"] if isinstance(log, dict) else log  # an update, or a value
            yield unescape(messages[-1]["content"][0]["text"])
        job.result()  # raises what went wrong

    return ask


def crowd(way: str, asks: list[Pieces], texts: list[str], seconds: float) -> dict:
    """Waiting times and faults of users who all ask for so long at the same time. texts: what each
    should get."""
    end, waits, failed, wrong = time.monotonic() + seconds, [], [], []

    def use(ask: Pieces, text: str) -> None:
        while time.monotonic() < end:
            began, first, answer = time.monotonic(), None, ""
            try:
                for answer in ask():
                    if answer and first is None:
                        first = time.monotonic() - began
            except Exception as error:
                failed.append(error)
                continue
            whole = time.monotonic() - began
            waits.append((first or whole, whole))
            if answer != text:
                wrong.append(answer)

    with ThreadPoolExecutor(len(asks)) as pool:
        list(pool.map(use, asks, texts))
    for error in failed[:3]:
        print(f"failed: {error!r}")
    if not waits:
        raise UserError(f"{way}: no answer came")
    counts = {"answers": len(waits), "failed": len(failed), "wrong": len(wrong)}
    first, whole = np.percentile(waits, [50, 95, 100], axis=0).T.tolist()
    print(
        f"{way}: {counts}; seconds (median, 95 %, most): first character "
        f"{' '.join(f'{s:.2f}' for s in first)}, whole {' '.join(f'{s:.2f}' for s in whole)}"
    )
    return counts | {"first": first, "whole": whole}
