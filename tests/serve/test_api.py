"""The endpoint under the real openai client, and who is let in."""

import base64
import threading

import httpx
import openai
import pytest

from configurator import UserError
from miniglm.generation import Sampling
from miniglm.serve.gate import LARGEST_BODY
from sample_gradio import Settings, main
from tests.helpers import dialogue
from tests.runs import error_line, run
from tests.served import expected, free_port, serving, wait_until, write_models

QUESTION = "谁弄权？"


@pytest.fixture(scope="module")
def out_dirs(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def served(out_dirs):
    with serving([*out_dirs.values()], batch_size=4, max_waiting=8) as (address, servers):
        yield address, servers


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, text=QUESTION, model="answers", **options):
    messages = text if isinstance(text, list) else dialogue(text)
    return client.chat.completions.create(model=model, messages=messages, **options)


def streamed(client, *args, **options) -> tuple[str, str, list]:
    """Text and finish_reason of the first choice, and all chunks."""
    chunks = list(ask(client, *args, stream=True, **options))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, choices[-1].finish_reason, chunks


@pytest.mark.parametrize("model", ["answers", "novel"])
@pytest.mark.parametrize("seed", [1337, 7])
def test_plain_and_streamed_texts_are_those_of_sample_py(client, out_dirs, model, seed):
    sampling = Sampling(max_new_tokens=40, temperature=0.9, top_p=0.8, seed=seed)
    alone = expected(out_dirs[model], dialogue(QUESTION), sampling)
    options = {"max_tokens": 40, "temperature": 0.9, "top_p": 0.8, "seed": seed, "model": model}
    plain = ask(client, **options)
    assert plain.choices[0].message.content == alone
    assert plain.choices[0].finish_reason == "length"
    assert plain.usage.completion_tokens == 40
    assert plain.usage.total_tokens == 40 + plain.usage.prompt_tokens
    text, finish, chunks = streamed(client, **options, stream_options={"include_usage": True})
    assert (text, finish) == (alone, "length")
    assert len(chunks) > 20
    assert chunks[-1].usage == plain.usage


def test_the_command_line_gives_the_same_text(client, out_dirs):
    words = ["--max_new_tokens=24", f"--start={QUESTION}", f"--out_dir={out_dirs['answers']}"]
    printed = run("sample.py", *words, "--device=cpu").stdout
    assert ask(client, max_completion_tokens=24).choices[0].message.content + "\n" == printed


def test_texts_are_the_same_among_other_requests(client, out_dirs):
    seeds = range(10)
    alone = [
        expected(out_dirs["answers"], dialogue(QUESTION), Sampling(30, temperature=1, seed=seed))
        for seed in seeds
    ]
    got = {}

    def ask_one(seed):
        options = {"max_tokens": 30, "temperature": 1, "seed": seed}
        got[seed] = (ask(client, **options).choices[0].message.content, streamed(client, **options))

    threads = [threading.Thread(target=ask_one, args=[seed]) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[seed][0] for seed in seeds] == alone
    assert [got[seed][1][0] for seed in seeds] == alone
    assert len(set(alone)) == 10


def test_several_samples_and_stop_texts(client, out_dirs):
    sampling = Sampling(max_new_tokens=30, temperature=1)
    alone = [expected(out_dirs["novel"], dialogue("却说"), sampling, n) for n in range(3)]
    answer = ask(client, "却说", "novel", n=3, temperature=1, max_tokens=30)
    assert [choice.message.content for choice in answer.choices] == alone
    stop = alone[0][8:10]
    answer = ask(client, "却说", "novel", temperature=1, max_tokens=30, stop=stop)
    assert answer.choices[0].message.content == alone[0][: alone[0].index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_conversation_is_given_whole(client, out_dirs):
    messages = dialogue("谁弄权？", "曹节。", "帝御何殿？")
    answer = ask(client, messages, max_tokens=20).choices[0].message.content
    assert answer == expected(out_dirs["answers"], messages, Sampling(max_new_tokens=20))
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    alone = expected(out_dirs["answers"], dialogue(QUESTION), Sampling(max_new_tokens=20))
    assert ask(client, parts, max_tokens=20).choices[0].message.content == alone


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["answers", "novel"]
    assert client.models.retrieve("novel").id == "novel"


@pytest.mark.parametrize(
    ("options", "says"),
    {
        "temperature": ({"temperature": -1}, "temperature=-1.0 must be 0"),
        "tokens": ({"max_tokens": 30000}, "more than this server's limit of 20000"),
        "type": ({"extra_body": {"top_p": "high"}}, "top_p='high' must be a number"),
        "fraction": ({"extra_body": {"seed": 1.5}}, "seed=1.5 must be a whole number"),
        "samples": ({"n": 6}, "n=6 must be 1 to 5"),
        "tools": ({"logprobs": True}, "logprobs is not supported"),
        "role": ({"text": [{"role": "tool", "content": "x"}]}, "has no role of system"),
        "content": ({"text": [{"role": "user", "content": [{"type": "image"}]}]}, "has no text"),
        "order": ({"text": dialogue("问？", "答。")}, "the last message must be the user's"),
        "long": ({"text": "问" * 100_000}, "100,000 characters"),
        "none": ({"text": []}, "messages must be a list"),
    }.values(),
)
def test_what_cannot_be_done_is_refused(client, options, says):
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, **options)


def test_errors_have_their_status(client, served):
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' is not here"):
        ask(client, model="gpt")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert httpx.post(f"{served[0]}/v1/chat/completions", content=b"{").status_code == 400


def test_too_many_requests_are_told_to_come_again(client, served):
    server = served[1]["novel"]
    long = [ask(client, "却说", "novel", stream=True, max_tokens=20000) for _ in range(12)]
    with pytest.raises(openai.RateLimitError, match="12 requests run or wait for novel"):
        ask(client, "却说", "novel")
    for answer in long:
        answer.close()
    wait_until(lambda: not server.jobs)  # clients that go away are not answered further
    assert ask(client, "却说", "novel", max_tokens=5).choices[0].finish_reason == "length"


def test_a_plain_request_that_is_given_up_is_not_answered_further(served):
    body = {"model": "novel", "messages": dialogue("却说"), "max_tokens": 20000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served[0]}/v1/chat/completions", json=body, timeout=0.3)
    wait_until(lambda: not served[1]["novel"].jobs)


# --- who is let in -----------------------------------------------------------------------------


def test_auth_is_asked_of_the_page_and_the_endpoint(out_dirs):
    with serving([out_dirs["answers"]], auth="刘备:pass:word") as (address, _):
        for path in ("/", "/v1/models", "/config", "/gradio_api/info"):
            refused = httpx.get(address + path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic")
        word = base64.b64encode("刘备:pass:word".encode()).decode()
        assert httpx.get(address, headers={"authorization": f"Basic {word}"}).status_code == 200
        for wrong in ("Basic x", "Basic " + word[:-4], "Bearer 刘备:pass", "Digest 刘备:pass:word"):
            headers = {"authorization": wrong.encode()}
            assert httpx.get(address, headers=headers).status_code == 401
    with serving([out_dirs["answers"]], auth="user:word") as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="user:word", max_retries=0)
        assert ask(client, max_tokens=3).choices[0].message.content
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="user:other", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            ask(client)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    {
        "other site": ("POST", "/v1/chat/completions", {"origin": "http://evil.example"}, 403),
        "sandbox": ("POST", "/gradio_api/queue/join", {"origin": "null"}, 403),
        "rebound name": ("GET", "/", {"host": "evil.example:7860"}, 403),
        "upload": ("POST", "/gradio_api/upload", {}, 403),
        "large": ("POST", "/v1/chat/completions", {"content-length": str(2 * LARGEST_BODY)}, 413),
    }.values(),
)
def test_the_gate_refuses(served, method, path, headers, status):
    content = b"{}" if "content-length" not in headers else b"x" * (2 * LARGEST_BODY)
    answer = httpx.request(method, served[0] + path, headers=headers, content=content)
    assert answer.status_code == status


def test_a_body_of_unknown_length_is_limited_too(served):
    def chunks():
        for _ in range(40):
            yield b"x" * (LARGEST_BODY // 20)

    with pytest.raises(httpx.HTTPError):
        answer = httpx.post(f"{served[0]}/v1/chat/completions", content=chunks())
        assert answer.status_code != 200
        answer.raise_for_status()
    assert httpx.get(f"{served[0]}/v1/models").status_code == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "run.json", "marks.jsonl", "out/../README.md"])
def test_no_file_is_served(served, out_dirs, path):
    for name in (path, out_dirs["answers"] / path):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/../"):
            assert httpx.get(f"{served[0]}{route}{name}").status_code in (403, 404)


def test_a_public_address_wants_auth():
    with pytest.raises(UserError, match=r"host=0\.0\.0\.0 lets others in; pass --auth="):
        Settings(host="0.0.0.0")
    with pytest.raises(UserError, match="must be user:password"):
        Settings(auth="secret")
    Settings(host="0.0.0.0", auth="user:password")
    Settings(host="0.0.0.0", open=True)


def test_a_port_in_use_is_one_line(served):
    port = served[0].rpartition(":")[2]
    done = run("sample_gradio.py", f"--port={port}", "--out_dir=out-none")
    assert error_line(done) == f"port={port} on host=127.0.0.1 is in use; pass --port="


def test_a_missing_model_is_said(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        main([f"--port={free_port()}", f"--out_dir={tmp_path}/no"])


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"model": "answers", "messages": [{"role": ["user"], "content": "x"}]}',
        *(
            b'{"model": "answers", "messages": [{"role": "user", "content": "x"}], ' + more + b"}"
            for more in (
                b'"stream_options": "x"',
                b'"stream_options": [1]',
                b'"n": 1e400',
                b'"max_tokens": 1e400',
                b'"temperature": 1' + b"0" * 400,
                b'"top_p": 1e-50',
                b'"temperature": 1e-50',
                b'"repetition_penalty": 1e-300',
                b'"\\ud800": 3',
            )
        ),
        b'{"model": "answers", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_an_odd_body_is_refused_and_nothing_runs(served, body):
    address, servers = served
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
    assert not servers["answers"].jobs


@pytest.mark.parametrize("name", ["Host", "Origin"])
def test_an_address_that_is_none_is_refused(served, name):
    value = "[" if name == "Host" else "http://["
    assert httpx.get(f"{served[0]}/v1/models", headers={name: value}).status_code == 403


def test_more_than_may_wait_get_429(served, client):
    servers = served[1]
    ends = [threading.Event() for _ in range(12)]  # 4 run and 8 wait

    def hold(end: threading.Event) -> None:
        with ask(client, stream=True, max_tokens=20000) as chunks:
            for _ in chunks:
                if end.is_set():
                    return

    threads = [threading.Thread(target=hold, args=[end]) for end in ends]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(servers["answers"].jobs) == 12)
    with pytest.raises(openai.RateLimitError, match="try again soon"):
        ask(client, max_tokens=5)
    for end in ends:
        end.set()
    for job in [*servers["answers"].jobs.values()]:  # those that wait for their first piece
        servers["answers"].cancel(job)
    for thread in threads:
        thread.join()
    wait_until(lambda: not servers["answers"].jobs)


def test_a_client_that_names_no_length_gets_the_servers(out_dirs):
    with serving([out_dirs["answers"]], max_new_tokens=9) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        assert ask(client).usage.completion_tokens == 9
        client.close()
