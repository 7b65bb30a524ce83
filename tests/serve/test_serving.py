"""Many requests on one model: each gets its own text, and only its own errors."""

import asyncio

import pytest
import torch

from configurator import UserError
from miniglm.generation import Sampling
from miniglm.serve.server import Busy, Server, Stream
from miniglm.text import load_for_sampling
from tests.helpers import dialogue
from tests.served import expected, wait_until, write_models

QUESTIONS = ["汉朝自谁起义", "谁弄权？", "帝御何殿", "殿角如何？", "谁谋诛宦官"]


@pytest.fixture(scope="module")
def out_dirs(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def new_server(out_dir, **limits) -> Server:
    return Server(out_dir.name, load_for_sampling(out_dir, "cpu"), **limits)


async def read(server, text, **sampling) -> str:
    with Stream() as stream:
        server.submit(stream, server.prompt(dialogue(text)), Sampling(**sampling))
        return "".join([piece.text async for piece in stream])


def test_each_of_many_requests_gets_the_text_it_would_get_alone(out_dirs):
    server = new_server(out_dirs["answers"], batch_size=3)
    settings = [
        {"seed": seed, "temperature": 0.9, "max_new_tokens": 20 + seed} for seed in range(10)
    ]
    asked = [(QUESTIONS[seed % 5], given) for seed, given in enumerate(settings)]

    async def all_at_once():
        return await asyncio.gather(*(read(server, text, **given) for text, given in asked))

    alone = [expected(out_dirs["answers"], dialogue(t), Sampling(**given)) for t, given in asked]
    assert asyncio.run(all_at_once()) == alone
    assert len(set(alone)) == 10
    assert not server.jobs


def test_pieces_of_two_servers_come_mixed_in_one_stream(out_dirs):
    servers = [new_server(path) for path in out_dirs.values()]
    given = {"max_new_tokens": 30, "temperature": 0.5}

    async def both():
        texts, order = ["", ""], []
        with Stream() as stream:
            for server in servers:
                server.submit(stream, server.prompt(dialogue("董卓")), Sampling(**given))
            async for piece in stream:
                texts[piece.number] += piece.text
                order.append(piece.number)
        return texts, order

    texts, order = asyncio.run(both())
    alone = [expected(path, dialogue("董卓"), Sampling(**given)) for path in out_dirs.values()]
    assert texts == alone
    assert order != sorted(order)


def test_what_waits_is_limited_and_what_is_too_much_is_refused(out_dirs):
    server = new_server(out_dirs["answers"], batch_size=1, max_waiting=1, max_new_tokens=5000)
    prompt = server.prompt(dialogue("谁弄权"))

    async def ask_too_much():
        with Stream() as stream:
            for _ in range(2):
                server.submit(stream, prompt, Sampling(max_new_tokens=5000))
            with pytest.raises(Busy, match="2 requests run or wait for answers"):
                server.submit(stream, prompt, Sampling())
            with pytest.raises(UserError, match="more than this server's limit of 5000"):
                server.submit(stream, prompt, Sampling(max_new_tokens=5001))
        wait_until(lambda: not server.jobs)  # leaving the stream gave both up
        return await read(server, "谁弄权", max_new_tokens=8)

    alone = expected(out_dirs["answers"], dialogue("谁弄权"), Sampling(max_new_tokens=8))
    assert asyncio.run(ask_too_much()) == alone
    with pytest.raises(UserError, match="100,000 characters; this model reads 96 tokens"):
        server.prompt(dialogue("问" * 100_000))
    long = dialogue("曹操" * 50_000)
    assert len(new_server(out_dirs["novel"]).prompt(long)) == 96  # only its end is read


def test_a_stopped_request_keeps_what_came(out_dirs):
    server = new_server(out_dirs["novel"], max_new_tokens=10**6)

    async def stop_midway():
        text, finish = "", None
        with Stream() as stream:
            server.submit(stream, server.prompt(dialogue("却说")), Sampling(max_new_tokens=10**6))
            async for piece in stream:
                text += piece.text
                finish = piece.finish
                if len(text) > 20:
                    stream.stop()
        return text, finish

    text, finish = asyncio.run(stop_midway())
    assert finish == "cancelled"
    whole = expected(out_dirs["novel"], dialogue("却说"), Sampling(max_new_tokens=2000))
    assert whole.startswith(text.removesuffix("\ufffd"))  # it may end within a character


def test_stop_texts_end_an_answer(out_dirs):
    server = new_server(out_dirs["novel"])
    whole = expected(out_dirs["novel"], dialogue("却说"), Sampling(max_new_tokens=60))
    stop = whole[20:22]
    short = asyncio.run(read(server, "却说", max_new_tokens=60, stop=[stop]))
    assert short == whole[: whole.index(stop)]


def test_probabilities_are_those_of_the_model(out_dirs):
    server = new_server(out_dirs["novel"])
    prompt = server.prompt(dialogue("却说曹操"))

    async def tokens():
        with Stream() as stream:
            server.submit(stream, prompt, Sampling(max_new_tokens=9, temperature=2), 0, 3)
            return [token async for piece in stream for token in piece.tokens]

    checkpoint = load_for_sampling(out_dirs["novel"], "cpu")
    ids = list(prompt)
    for token in asyncio.run(tokens()):
        with torch.inference_mode():
            hidden = checkpoint.model(torch.tensor([ids]))
            probs = torch.softmax(checkpoint.model.head(hidden[0, -1]), dim=-1)
        assert token.prob == pytest.approx(float(probs[token.id]), rel=1e-3)
        assert [id for id, _ in token.alternatives] == probs.topk(3).indices.tolist()
        ids.append(token.id)


def test_a_failing_model_fails_its_requests_and_the_next_ones_are_answered(out_dirs, capfd):
    server = new_server(out_dirs["answers"])

    async def fail_then_ask():
        with Stream() as stream:
            server.submit(stream, [10**6], Sampling())  # no such id
            with pytest.raises(RuntimeError, match="the model failed"):
                await anext(stream)
        return await read(server, "谁弄权", max_new_tokens=8)

    alone = expected(out_dirs["answers"], dialogue("谁弄权"), Sampling(max_new_tokens=8))
    assert asyncio.run(fail_then_ask()) == alone
    assert "IndexError" in capfd.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no memory left\nat all")])
def test_an_error_of_any_form_leaves_the_worker_alive(out_dirs, capfd, error):
    server = new_server(out_dirs["answers"])

    def fail() -> list:
        server.batch = server._new_batch()  # only once
        raise error

    async def fail_then_ask():
        server.batch.step = fail
        with Stream() as stream:
            server.submit(stream, server.prompt(dialogue("谁弄权")), Sampling())
            with pytest.raises(RuntimeError, match=r"failed: (MemoryError|no memory left)$"):
                await anext(stream)
        return await read(server, "谁弄权", max_new_tokens=8)

    alone = expected(out_dirs["answers"], dialogue("谁弄权"), Sampling(max_new_tokens=8))
    assert asyncio.run(fail_then_ask()) == alone
    assert type(error).__name__ in capfd.readouterr().err


def test_one_user_stops_a_long_text_and_the_other_goes_on(out_dirs):
    server = new_server(out_dirs["novel"], max_new_tokens=10**6)

    async def stop_one() -> str:
        with Stream() as stopped, Stream() as stays:
            prompt = server.prompt(dialogue("却说"))
            server.submit(stopped, prompt, Sampling(max_new_tokens=10**6))
            server.submit(stays, prompt, Sampling(max_new_tokens=300), 1)
            count = 0
            async for piece in stopped:
                count += len(piece.tokens)
                if count > 120:  # the cache has grown since
                    stopped.stop()
            return "".join([piece.text async for piece in stays])

    wanted = expected(out_dirs["novel"], dialogue("却说"), Sampling(max_new_tokens=300), 1)
    assert asyncio.run(stop_one()) == wanted
