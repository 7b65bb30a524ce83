"""The endpoint under the real openai client, and who is let in."""

import base64
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from configurator import UserError
from miniglm.generation import Sampling
from miniglm.serve.api import Body
from miniglm.serve.gate import LARGEST_BODY
from sample_gradio import Settings
from tests.helpers import dialogue
from tests.runs import error_line
from tests.served import expected, serving, wait_until

QUESTION = "谁弄权？"
TOOLS = [{"type": "function"}]


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
    options = {"temperature": 0.9, "top_p": 0.8, "frequency_penalty": 0.5, "presence_penalty": -1}
    sampling = Sampling(max_new_tokens=40, seed=seed, **options)
    alone = expected(out_dirs[model], dialogue(QUESTION), sampling)
    options |= {"max_tokens": 40, "seed": seed, "model": model}
    plain = ask(client, **options)
    assert plain.choices[0].message.content == alone
    assert plain.usage.completion_tokens == 40
    assert plain.usage.total_tokens == 40 + plain.usage.prompt_tokens
    text, finish, chunks = streamed(client, **options, stream_options={"include_usage": True})
    assert (text, finish) == (alone, "length")
    assert len(chunks) > 20
    assert chunks[-1].usage == plain.usage


def test_texts_are_the_same_among_other_requests(client, out_dirs):
    def ask_twice(seed: int) -> tuple[str, str]:
        options = {"max_tokens": 30, "temperature": 1, "seed": seed}
        return ask(client, **options).choices[0].message.content, streamed(client, **options)[0]

    samplings = [Sampling(30, temperature=1, seed=seed) for seed in range(10)]
    alone = [expected(out_dirs["answers"], dialogue(QUESTION), each) for each in samplings]
    with ThreadPoolExecutor(10) as users:
        assert list(users.map(ask_twice, range(10))) == [(text, text) for text in alone]
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


def test_calls_of_tools_and_their_results_are_given_to_the_model(client, out_dirs):
    [asked], result = dialogue("几时"), {"role": "tool", "content": "三"}
    function = {"name": "时", "arguments": {}}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    given = [asked, called, result]
    sent = {"id": "1", "type": "function", "function": function | {"arguments": "{}"}}
    sent = {"role": "assistant", "tool_calls": [sent]}
    messages = [asked, sent, result | {"tool_call_id": "1"}]
    answer = ask(client, messages, max_tokens=20).choices[0].message.content
    assert answer == expected(out_dirs["answers"], given, Sampling(20))
    assert answer != expected(out_dirs["answers"], [asked], Sampling(20))


def test_tools_are_given_to_a_model_whose_format_has_them():
    body = Body(model="m", messages=dialogue("几时"), tools=TOOLS)
    assert body.turns(True) == [dialogue("几时")[0] | {"tools": TOOLS}]
    assert body.turns(False) == dialogue("几时")
    body = Body(model="m", messages=dialogue("几时"), tools=TOOLS, tool_choice="none")
    assert body.turns(True) == dialogue("几时")


def test_an_assistants_turn_may_be_empty(client, out_dirs):
    alone = expected(out_dirs["answers"], dialogue("问？", "", "谁？"), Sampling(20))
    for empty in ({"content": None}, {"content": None, "tool_calls": []}, {"content": []}, {}):
        messages = dialogue("问？", "", "谁？")
        messages[1] = {"role": "assistant"} | empty
        assert ask(client, messages, max_tokens=20).choices[0].message.content == alone


def test_what_asks_for_nothing_changes_nothing(client):
    plain = ask(client, max_tokens=9).choices[0].message.content
    names = "n stop seed stream stream_options temperature top_p tools logit_bias top_logprobs"
    nothing = [dict.fromkeys(names.split()) | {"max_completion_tokens": None}]
    nothing += [{"stop": ""}, {"stop": [""]}, {"logit_bias": {}}, {"modalities": ["text"]}]
    nothing += [{"parallel_tool_calls": True, "reasoning_effort": "low", "verbosity": "low"}]
    nothing += [{"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "auto"}, {"top_k": -1}]
    for options in nothing:
        answer = ask(client, extra_body={"max_tokens": 9} | options)
        assert answer.choices[0].message.content == plain


def test_a_seed_of_null_or_minus_one_is_left_to_chance(client):
    bodies = [{"temperature": 2, "seed": seed} for seed in (None, None, -1, -1)]
    answers = [ask(client, max_tokens=30, extra_body=body).choices[0].message for body in bodies]
    assert len({answer.content for answer in answers}) == 4


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["answers", "novel"]
    assert client.models.retrieve("novel").id == "novel"


TEXT, IMAGE = {"type": "text", "text": "问"}, {"type": "image_url", "image_url": {"url": "data:,"}}
LONG = {"role": "system", "content": " " * 100_000}
REFUSED = {
    "temperature=-1 must be 0": {"temperature": -1},
    "max_tokens: Input should be greater than or equal to 1": {"max_tokens": 0},
    "frequency_penalty=3 must be -2 to 2": {"frequency_penalty": 3},
    "modalities is not supported; leave it out": {"modalities": ["text", "audio"]},
    "response_format is not supported": {"response_format": {"type": "json_object"}},
    "top_p: Input should be a valid number": {"extra_body": {"top_p": "high"}},
    "seed: Input should be a valid integer": {"extra_body": {"seed": 1.5}},
    "n: Input should be less than or equal to 5": {"n": 6},
    "logprobs is not supported": {"logprobs": True},
    "tool_choice is not supported": {"tools": TOOLS, "tool_choice": "required"},
    "messages.0.role: Input should be 'system'": {"text": [{"role": "function", "content": "x"}]},
    "must follow the assistant's tool_calls": {"text": [{"role": "tool", "content": "x"}]},
    "a call has no name of a function": {"text": [{"role": "assistant", "tool_calls": [{}]}]},
    "1.type: Input should be 'text'": {"text": [{"role": "user", "content": [TEXT, IMAGE]}]},
    "user must have content": {"text": [{"role": "user", "content": None}]},
    "no tool_calls": {"text": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
    "the system's message has 100,": {"text": [LONG, *dialogue("问？")]},
    "the last message must be the user's": {"text": dialogue("问？", "答。")},
    "100,000 characters": {"text": "问" * 100_000},
    "messages: List should have at least 1 item": {"text": []},
}


def test_what_cannot_be_done_is_refused(client):
    for says, options in REFUSED.items():
        with pytest.raises(openai.BadRequestError, match=says):
            ask(client, **options)


def test_a_model_that_is_not_here_is_404(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'; there is answers, novel"):
        ask(client, model="gpt")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


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


def test_the_gate_refuses(served):
    refused = [
        ("/v1/chat/completions", {"origin": "http://evil.example"}),  # another site
        ("/gradio_api/queue/join", {"origin": "null"}),  # a sandbox
        ("/", {"host": "evil.example:7860"}),  # a name rebound to this machine
        ("/v1/models", {"host": "["}),
        ("/v1/models", {"origin": "http://["}),
        ("/gradio_api/upload", {}),
    ]
    for path, headers in refused:
        assert httpx.post(served[0] + path, headers=headers, content=b"{}").status_code == 403
    content = b"x" * (2 * LARGEST_BODY)
    assert httpx.post(f"{served[0]}/v1/chat/completions", content=content).status_code == 413


def test_a_proxy_may_rename_the_host(out_dirs):
    headers = {"host": "inner:7860", "origin": "https://proxy.example"}
    with serving([out_dirs["answers"]], open=True) as (address, _):
        for site, status in {"same-origin": 200, "same-site": 403, "cross-site": 403}.items():
            asked = headers | {"sec-fetch-site": site}
            assert httpx.get(f"{address}/v1/models", headers=asked).status_code == status


def test_a_body_of_unknown_length_is_limited_too(served):
    def chunks():
        for _ in range(40):
            yield b"x" * (LARGEST_BODY // 20)

    with pytest.raises(httpx.HTTPError):
        httpx.post(f"{served[0]}/v1/chat/completions", content=chunks()).raise_for_status()
    assert httpx.get(f"{served[0]}/v1/models").status_code == 200


def test_no_file_is_served(served, out_dirs):
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/../"):
        for path in ("/etc/passwd", out_dirs["answers"] / "run.json", "out/../README.md"):
            assert httpx.get(f"{served[0]}{route}{path}").status_code in (403, 404)


def test_a_public_address_wants_auth():
    with pytest.raises(UserError, match=r"host=0\.0\.0\.0 lets others in; pass --auth="):
        Settings(host="0.0.0.0")
    with pytest.raises(UserError, match="must be user:password"):
        Settings(auth="secret")
    Settings(host="0.0.0.0", auth="user:password")
    Settings(host="0.0.0.0", open=True)


def test_a_port_in_use_is_one_line(served, run_ready):
    port = served[0].rpartition(":")[2]
    error = error_line(run_ready("sample_gradio.py", f"--port={port}", "--out_dir=out-none"))
    assert error.startswith("cannot listen: Address already in use")
    assert port in error


MESSAGES = b'"model": "answers", "messages": [{"role": "user", "content": "x"}]'
HUGE = b"1" + b"0" * 400
ODD_OPTIONS = (b'"n": 1e400', b'"max_tokens": 0', b'"temperature": ' + HUGE, b'"\\ud800": 3')
ODD_OPTIONS += (b'"stop": ["x"' + b', "x"' * 16 + b"]",)
ODD_BODIES = [b"{", b"[" * 100_000, b"{" + MESSAGES.replace(b"x", b"\\ud800") + b"}"]
ODD_BODIES += [b"{" + MESSAGES + b", " + option + b"}" for option in ODD_OPTIONS]


def test_an_odd_body_is_refused_and_nothing_runs(served):
    address, servers = served
    for body in ODD_BODIES:
        answer = httpx.post(f"{address}/v1/chat/completions", content=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]
        assert not servers["answers"].jobs


def test_a_length_beyond_the_servers_is_cut_to_it_and_the_header_says_so(out_dirs):
    with serving([out_dirs["answers"]], max_new_tokens=9) as (address, _):
        asked = [{}, {"max_tokens": 4096}, {"max_completion_tokens": -1, "stream": True}]
        for options, length in zip([*asked, {"max_tokens": 4}], "9994", strict=True):
            body = {"model": "answers", "messages": dialogue(QUESTION)} | options
            answer = httpx.post(f"{address}/v1/chat/completions/", json=body)
            assert answer.headers["x-max-tokens"] == length
            assert '"length"' in answer.text  # its finish_reason


def test_an_address_that_is_not_here_says_which_are(served):
    for address in ("POST /completions", "GET /chat/completions", "PUT /models"):
        method, path = address.split()
        answer = httpx.request(method, f"{served[0]}/v1{path}")
        assert answer.status_code == 404
        assert "there is only POST /v1/chat/completions" in answer.json()["error"]["message"]
    assert httpx.get(f"{served[0]}/v1/models/").json()["data"]
    assert httpx.head(f"{served[0]}/v1/models").status_code == 200
