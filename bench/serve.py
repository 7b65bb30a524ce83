"""Many users at once on sample_gradio.py: how long each waits, and whether each gets its own text.

    python bench/serve.py --out_dir=out-sanguo-sft --users=20 --seconds=60

The server runs in a process of its own, on one core where the system can pin it. Each user has a
question and a seed, asks it again and again, and compares the text with what sample.py's functions
made of it before. First on the endpoint, streamed, then on the page as a browser asks it.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import unescape

import httpx
import numpy as np
from gradio_client.utils import apply_diff

from configurator import ROOT, UserError, command, configure, repo_path, show_path
from miniglm.generation import Sampling
from miniglm.text import complete, load_for_sampling, prompt_ids
from sample import read_start

WARMTH = 0.3  # the page's temperature for answers
LENGTH = 256  # tokens
PAGE_TEXT = re.compile(r'<span class="new">(.*?)</span>', re.DOTALL)


@dataclass
class Settings:
    out_dir: str = "out-sanguo-sft"  # of a model that answers
    users: int = 20  # at once
    seconds: float = 60.0  # of each of the two ways
    questions: str = "data/sanguo/qa.jsonl"  # {"Question": text} a line; a user takes one

    def __post_init__(self):
        if self.users < 1 or self.seconds <= 0:
            raise UserError(f"users={self.users} and seconds={self.seconds} must be above 0")


@dataclass
class Answer:
    first: float  # seconds until the first character
    whole: float  # seconds until the last
    text: str


@contextlib.contextmanager
def server(out_dir: str) -> Iterator[str]:
    """Its address, once it answers."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = [f"--out_dir={out_dir}", f"--port={port}", "--device=cpu"]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sample_gradio.py"), *words], env=threads
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


def endpoint_user(address: str, model: str, question: str, seed: int) -> Callable[[], Answer]:
    client = httpx.Client(timeout=120)
    body = {"model": model, "messages": [{"role": "user", "content": question}], "seed": seed}
    body |= {"temperature": WARMTH, "max_tokens": LENGTH, "stream": True}

    def ask() -> Answer:
        began, first, text = time.monotonic(), None, ""
        with client.stream("POST", f"{address}/v1/chat/completions", json=body) as lines:
            lines.raise_for_status()
            for line in lines.iter_lines():
                if not line.startswith("data: {"):
                    continue
                piece = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                text += piece.get("content", "")
                if text and first is None:
                    first = time.monotonic() - began
        return Answer(first or time.monotonic() - began, time.monotonic() - began, text)

    return ask


def page_user(address: str, model: str, question: str, seed: int) -> Callable[[], Answer]:
    """The page's own protocol, as a browser speaks it: a POST, and events by session."""
    client = httpx.Client(base_url=f"{address}/gradio_api", timeout=120)
    config = client.get(f"{address}/config").json()
    number = next(d["id"] for d in config["dependencies"] if d["api_name"] == "ask")
    session = f"{os.getpid()}-{seed}"
    data = [question, None, model, False, 1, WARMTH, 1.0, LENGTH, 1.0, seed]

    def ask() -> Answer:
        began, first, shown = time.monotonic(), None, []
        body = {"data": data, "fn_index": number, "session_hash": session}
        client.post("/queue/join", json=body).raise_for_status()
        with client.stream("GET", "/queue/data", params={"session_hash": session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                output = message.get("output", {})
                if "error" in output:
                    raise UserError(output["error"])
                if message.get("msg") == "process_generating":  # the first whole, then changes
                    new = output["data"]
                    shown = (
                        [apply_diff(*pair) for pair in zip(shown, new, strict=True)]
                        if shown
                        else new
                    )
                    if first is None and PAGE_TEXT.findall(shown[0])[-1:] not in ([], [""]):
                        first = time.monotonic() - began
                if message.get("msg") == "process_completed":
                    break
        whole = time.monotonic() - began
        return Answer(first or whole, whole, unescape(PAGE_TEXT.findall(shown[0])[-1]))

    return ask


def crowd(asks: list[Callable[[], Answer]], seconds: float) -> list[list[Answer | Exception]]:
    """What each user got who asked as often as the seconds allow, all at the same time."""
    got = [[] for _ in asks]
    end = time.monotonic() + seconds

    def use(ask: Callable[[], Answer], answers: list) -> None:
        while time.monotonic() < end:
            try:
                answers.append(ask())
            except Exception as error:
                answers.append(error)

    threads = [threading.Thread(target=use, args=pair) for pair in zip(asks, got, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def report(way: str, got: list[list], texts: list[str], seconds: float) -> dict:
    answers = [answer for row in got for answer in row if isinstance(answer, Answer)]
    failed = [answer for row in got for answer in row if not isinstance(answer, Answer)]
    wrong = sum(
        answer.text != text
        for row, text in zip(got, texts, strict=True)
        for answer in row
        if isinstance(answer, Answer)
    )
    for error in failed[:3]:
        print(f"failed: {error!r}")
    if not answers:
        raise UserError(f"{way}: no answer came")
    result = {"answers": len(answers), "failed": len(failed), "wrong": wrong}
    result["characters_per_second"] = sum(len(answer.text) for answer in answers) / seconds
    for name in ("first", "whole"):
        values = [getattr(answer, name) for answer in answers]
        result[name] = np.percentile(values, [50, 95, 100]).tolist()
    first, whole = (
        " ".join(f"{value:.2f}" for value in result[name]) for name in ("first", "whole")
    )
    print(
        f"{way:<9} {len(answers):5} answers  {len(failed)} failed  {wrong} wrong   "
        f"{result['characters_per_second']:.0f} characters/s   "
        f"seconds, median 95% most: first character {first}, whole {whole}"
    )
    return result


def main(argv: list[str]) -> dict:
    config = configure(Settings, argv)
    path = repo_path(config.questions)
    if not path.is_file():
        raise UserError(f"no file {show_path(path)}; pass --questions=")
    questions = [record["Question"] for record in read_start(f"FILE:{path}", answers=True)]
    checkpoint = load_for_sampling(config.out_dir, "cpu")
    if not checkpoint.answers:
        raise UserError(f"{config.out_dir} does not answer questions; pass a fine-tuned --out_dir=")
    every = max(1, len(questions) // config.users)  # from all over the file
    users = [(questions[seed * every % len(questions)], seed) for seed in range(config.users)]
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
            results[way] = report(way, crowd(asks, config.seconds), texts, config.seconds)
    return results


if __name__ == "__main__":
    command(main)
