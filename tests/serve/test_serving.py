"""Many requests on one model: each gets its own text, and only its own errors."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from configurator import ROOT
from miniglm import compiling, decoding
from miniglm.generation import Request, Sampling
from miniglm.serve.server import Piece, Server, Stream
from miniglm.text import load_for_sampling, prompt_ids
from tests.helpers import dialogue, logits
from tests.runs import free_port
from tests.served import BLOCK, expected, wait_until


def new_server(out_dir, **limits) -> Server:
    return Server(out_dir.name, load_for_sampling(out_dir, "cpu"), **limits)


def request(server, text, sample_index=0, alternatives=None, **sampling) -> Request:
    prompt = server.prompt(dialogue(text))
    return Request(prompt, Sampling(**sampling), 0, sample_index, alternatives)


def test_pieces_of_two_servers_come_mixed_in_one_stream(out_dirs):
    servers = [new_server(path) for path in out_dirs.values()]
    given = {"max_new_tokens": 30, "temperature": 0.5}

    async def both() -> list[tuple[int, str]]:
        with Stream() as stream:
            for server in servers:
                server.submit(stream, request(server, "董卓", **given))
            return [(piece.number, piece.text) async for piece in stream]

    pieces = asyncio.run(both())
    for number, path in enumerate(out_dirs.values()):
        text = "".join(text for of, text in pieces if of == number)
        assert text == expected(path, dialogue("董卓"), Sampling(**given))
    numbers = [number for number, _ in pieces]
    assert numbers != sorted(numbers)


def test_a_model_that_continues_reads_the_end_of_a_long_text(out_dirs):
    long = dialogue("曹操" * 50_000)
    prompt = new_server(out_dirs["novel"]).prompt(long)
    assert prompt == prompt_ids(load_for_sampling(out_dirs["novel"], "cpu"), "曹操" * 200)
    assert len(prompt) == BLOCK


def test_probabilities_are_those_of_the_model(out_dirs):
    server = new_server(out_dirs["novel"])
    prompt = server.prompt(dialogue("却说曹操"))

    async def tokens():
        with Stream() as stream:
            server.submit(stream, Request(prompt, Sampling(9, temperature=2), alternatives=3))
            return [token async for piece in stream for token in piece.tokens]

    checkpoint = load_for_sampling(out_dirs["novel"], "cpu")
    ids = list(prompt)
    for token in asyncio.run(tokens()):
        probs = torch.softmax(logits(checkpoint.model, torch.tensor([ids]))[0, -1], dim=-1)
        assert token.prob == pytest.approx(float(probs[token.id]), rel=1e-3)
        assert [id for id, _ in token.alternatives] == probs.topk(3).indices.tolist()
        ids.append(token.id)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no memory left\nat all")])
def test_an_error_of_any_form_leaves_the_worker_alive(out_dirs, capfd, error):
    server = new_server(out_dirs["answers"])

    def fail() -> list:
        server.batch = server._new_batch()  # only once
        raise error

    async def fail_then_ask():
        server.batch.step = fail
        with Stream() as stream:
            server.submit(stream, request(server, "谁弄权"))
            with pytest.raises(RuntimeError, match=r"failed: (MemoryError|no memory left)$"):
                await anext(aiter(stream))
        with Stream() as stream:
            server.submit(stream, request(server, "谁弄权", max_new_tokens=8))
            return "".join([piece.text async for piece in stream])

    alone = expected(out_dirs["answers"], dialogue("谁弄权"), Sampling(max_new_tokens=8))
    assert asyncio.run(fail_then_ask()) == alone
    assert type(error).__name__ in capfd.readouterr().err


def test_one_user_stops_a_long_text_and_the_other_goes_on(out_dirs):
    server = new_server(out_dirs["novel"], max_new_tokens=10**6)

    async def stop_midway() -> tuple[list[Piece], str]:
        with Stream() as stopped, Stream() as stays:
            server.submit(stopped, request(server, "却说", max_new_tokens=10**6))
            server.submit(stays, request(server, "却说", 1, max_new_tokens=300))
            pieces = []
            async for piece in stopped:
                pieces.append(piece)
                if len(pieces) > 120:  # the cache has grown since
                    stopped.stop()
            return pieces, "".join([piece.text async for piece in stays])

    pieces, stays = asyncio.run(stop_midway())
    assert pieces[-1].finish == "cancelled"
    kept = "".join(piece.text for piece in pieces)
    whole = expected(out_dirs["novel"], dialogue("却说"), Sampling(max_new_tokens=2000))
    assert whole.startswith(kept.removesuffix("\ufffd"))  # it may end within a character
    assert stays == expected(out_dirs["novel"], dialogue("却说"), Sampling(300), 1)


def test_a_server_changes_over_to_compiled_code_within_an_answer(out_dirs, monkeypatch):
    ready = threading.Event()

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        assert ready.wait(20)  # as slow as real compiling
        return graph

    monkeypatch.setattr(decoding, "may_compile", lambda device: True)
    monkeypatch.setattr(compiling, "backend", backend)
    torch.compiler.reset()
    server = new_server(out_dirs["novel"])
    decode = server.batch.decode
    switches = sys.getswitchinterval()
    server.speed_up()
    assert sys.getswitchinterval() < 1e-4  # or answers wait for the compiler at each operation
    sys.setswitchinterval(switches)

    async def read() -> str:
        with Stream() as stream:
            server.submit(stream, request(server, "却说", max_new_tokens=400, temperature=0.5))
            text = ""
            async for piece in stream:
                text += piece.text
                if len(text) > 20 and not ready.is_set():  # answers come without it
                    assert decode.run_one_row is None
                    ready.set()
            return text

    text = asyncio.run(read())
    wait_until(lambda: decode.run_one_row)
    assert text == asyncio.run(read())
    assert text == expected(out_dirs["novel"], dialogue("却说"), Sampling(400, temperature=0.5))
    server._fail(RuntimeError("no memory left"))
    assert server.batch.decode is decode  # still compiled


@pytest.mark.skipif(os.name != "posix", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_ends_a_server_that_compiles_at_once(out_dirs):
    words = ["sample_gradio.py", f"--out_dir={out_dirs['novel']}", f"--port={free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen([sys.executable, *words, "--device=cpu"], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline().startswith("page")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == "interrupted\n"
