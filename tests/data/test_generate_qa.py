"""generate_qa.py with the real openai client, against a small server that answers as models do,
well and badly, and against the project's own endpoint."""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from configurator import UserError
from data import generate_qa
from data.generate_qa import cut, is_grounded, parse_pairs
from miniglm import jsonl
from miniglm.prep.readers import Tally, find_sources, records
from tests.helpers import TEXT
from tests.servers import serve

LINES = TEXT.splitlines()


def pair(question: str, answer: str, evidence: str | None = None) -> str:
    record = {"Question": question, "Answer": answer}
    record |= {} if evidence is None else {"Evidence": evidence}
    return json.dumps(record, ensure_ascii=False)


GOOD = {
    0: pair("天下大势如何？", "分久必合，合久必分。", "分久必合，合久必分"),
    1: pair("汉朝自谁起义？", "自高祖斩白蛇而起义。", "汉朝自高祖斩白蛇而起义"),
    2: pair("是谁和谁一起谋诛宦官曹节等人？", "大将军窦武、太傅陈蕃。", "窦武、陈蕃谋诛之"),
    3: pair("帝御何殿？", "帝御温德殿。", "帝御温德殿"),
    4: pair("大青蛇蟠于何处？", "蟠于椅上。", "蟠于椅上"),
}
BAD = [{"Question": "甲？"}, {"Question": "甲？", "Answer": 3}, {"Question": " ", "Answer": "乙"}]


@contextlib.contextmanager
def endpoint(answer: Callable[[int, str, int], str | int]) -> Iterator[tuple[str, list[dict]]]:
    """A server of /v1/chat/completions, and the requests it got. answer: (number of the passage's
    line in TEXT, prompt, how often it was asked) -> the text of an answer, or an HTTP status."""
    requests, app = [], FastAPI()

    @app.post("/v1/chat/completions")
    def complete(body: dict, request: Request) -> JSONResponse:
        prompt = body["messages"][-1]["content"]
        line = next((n for n, text in enumerate(LINES) if text[:9] in prompt), -1)
        requests.append(body | {"line": line, "key": request.headers["Authorization"]})
        text = answer(line, prompt, sum(request["line"] == line for request in requests))
        if isinstance(text, int):
            error = {"error": {"message": f"no luck, {text}"}}
            return JSONResponse(error, text, {"Retry-After": "0.01"})
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        return JSONResponse(whole | {"choices": [choice]})

    with serve(app) as address:
        yield f"{address}/v1", requests


@pytest.fixture
def novel(tmp_path, monkeypatch):
    """A source whose passages of 60 characters are its lines, in a folder of its own."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def generate(url: str, *words: str) -> None:
    out = Path.cwd() / "qa.jsonl"
    generate_qa.main([f"--base_url={url}", "--model=m", "--passage=60", f"--out={out}", *words])


def test_good_pairs_are_kept_with_their_passage_and_model(novel, capsys):
    with endpoint(lambda line, *_: GOOD[line]) as (url, requests):
        generate(url, "--input=novel.txt", "--temperature=0.5", "--max_tokens=99")
    found = {line["Question"]: line for line in jsonl.recover(novel / "qa.jsonl")}
    assert len(found) == len(requests) == 5
    for number, text in GOOD.items():
        made = {"Passage": LINES[number], "Source": str(novel / "novel.txt"), "Model": "m"}
        assert found[json.loads(text)["Question"]] == json.loads(text) | made
    assert {(r["model"], r["temperature"], r["max_tokens"], r["key"]) for r in requests} == {
        ("m", 0.5, 99, "Bearer secret")
    }
    assert "5 kept; " in capsys.readouterr().out
    [source] = find_sources([str(novel / "qa.jsonl")])  # as the prepare scripts read it
    questions = [turns[0]["content"] for turns in records(source, Tally())]
    assert sorted(questions) == sorted(found)


def test_what_is_wrong_is_left_out_and_counted(novel, capsys):
    answers = GOOD | {
        1: f"好的：\n```json\n[{GOOD[1]},\n{GOOD[1]}]\n```",  # fenced, and the same twice
        2: GOOD[2] + "\n" + GOOD[2].replace("人？", "人呢？") + '\n{"Question": "谁弄权',
        3: pair("帝御何殿？", "帝御未央宫，在长安。", "帝御温德殿"),  # another answer
        4: pair("大青蛇蟠于何处？", "蟠于椅上。", "蛇蟠于龙床之上"),  # no such evidence
    }
    with endpoint(lambda line, *_: answers[line]) as (url, _):
        generate(url, "--input=novel.txt", "--parallel=1")
    kept = [line["Question"] for line in jsonl.recover(novel / "qa.jsonl")]
    assert kept == [json.loads(GOOD[n])["Question"] for n in (0, 1, 2)]
    out = capsys.readouterr().out
    counts = out.splitlines()[-1].split("; ")[0].split(", ")
    wanted = ["3 kept", "1 duplicate", "1 near duplicate", "1 malformed", "2 not grounded"]
    assert sorted(counts) == sorted(wanted)
    calls = jsonl.recover(novel / "qa.jsonl.calls")
    assert sum(call.get("not grounded", 0) for call in calls) == 2
    assert len(calls) == 5


def test_refused_and_failing_calls_are_tried_again(novel):
    failures = {1: 429, 2: 500, 3: 503}
    with endpoint(lambda line, _, times: failures.get(times, GOOD[line])) as (url, requests):
        generate(url, "--input=novel.txt")
    assert len(jsonl.recover(novel / "qa.jsonl")) == 5
    assert len(requests) == 20


def test_a_call_that_never_succeeds_is_left_for_the_next_run(novel, capsys):
    with endpoint(lambda line, *_: 500 if line == 2 else GOOD[line]) as (url, _):
        generate(url, "--input=novel.txt", "--retries=1", "--parallel=1")
    out = capsys.readouterr().out
    assert "failed: Error code: 500" in out
    assert "4 kept, 1 failed calls; " in out
    before = (novel / "qa.jsonl").read_bytes()
    with endpoint(lambda line, *_: GOOD[line]) as (url, requests):
        generate(url, "--input=novel.txt", "--parallel=1")
        assert [request["line"] for request in requests] == [2]
        generate(url, "--input=novel.txt")
        assert len(requests) == 1
    content = (novel / "qa.jsonl").read_bytes()
    assert content.startswith(before)
    assert len(content.splitlines()) == 5
    assert "4 of 5 calls were answered before" in capsys.readouterr().out


def test_calls_come_in_parallel(novel):
    together = threading.Barrier(5, timeout=20)

    def answer(line: int, *_) -> str:
        together.wait()  # broken, and an error, unless all five are there at once
        return GOOD[line]

    with endpoint(answer) as (url, _):
        generate(url, "--input=novel.txt", "--parallel=5")
    assert len(jsonl.recover(novel / "qa.jsonl")) == 5


def test_examples_alone_are_a_prompt_whose_questions_are_not_repeated(novel):
    known = [json.loads(GOOD[n]) for n in range(3)]
    jsonl.write(novel / "known.jsonl", known)
    texts = iter([GOOD[0], pair("吴国的都城在哪里？", "在建业。"), GOOD[3], "没有"])
    with endpoint(lambda *_: next(texts)) as (url, requests):
        generate(url, "--examples=known.jsonl", "--calls=4", "--parallel=1", "--n_examples=2")
    prompts = [request["messages"][-1]["content"] for request in requests]
    assert len({*prompts}) > 1  # other examples with each
    for prompt in prompts:
        assert sum(line["Question"] in prompt for line in known) == 2
        assert "Evidence" not in prompt and "原文：" not in prompt
    assert jsonl.recover(novel / "qa.jsonl") == [
        {"Question": "吴国的都城在哪里？", "Answer": "在建业。", "Model": "m"},
        {"Question": "帝御何殿？", "Answer": "帝御温德殿。", "Model": "m"},
    ]


def test_a_dry_run_prints_the_prompts_and_calls_nothing(novel, capsys):
    generate_qa.main(["--input=novel.txt", "--passage=60", "--dry_run"])
    out = capsys.readouterr().out
    assert all(f"原文：\n{line}\n" in out for line in LINES)
    assert out.splitlines()[-1].startswith("--- 5 calls, ")
    assert [path.name for path in novel.iterdir()] == ["novel.txt"]
    shown = []  # fewer calls are among those of more
    for calls in (2, 4):
        generate_qa.main(["--input=novel.txt", "--passage=60", "--dry_run", f"--calls={calls}"])
        out = capsys.readouterr().out
        shown.append({line for line in LINES if line in out})
    assert [*map(len, shown)] == [2, 4] and shown[0] < shown[1]


def test_a_request_that_is_refused_for_good_stops_all(novel):
    refused = pytest.raises(UserError, match=r"Error code: 401.* no luck, 401")
    with endpoint(lambda *_: 401) as (url, requests), refused:
        generate(url, "--input=novel.txt", "--parallel=1")
    assert len(requests) == 1
    busy = pytest.raises(UserError, match="Error code: 500")
    with endpoint(lambda *_: 500) as (url, _), busy:
        generate(url, "--input=novel.txt", "--retries=0", "--calls=2")
    assert not (novel / "qa.jsonl").exists()


def test_an_endpoint_that_is_not_there_is_one_line(novel):
    with endpoint(lambda *_: 500) as (url, _):
        pass  # its port is free again
    message = rf"{url}.*: Connection error\. \(APIConnectionError\)"
    with pytest.raises(UserError, match=message):
        generate(url, "--input=novel.txt", "--retries=0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to go by; pass --input= with the source, or --examples="),
        (["--examples=novel.txt"], "without --input= it needs --calls="),
        (["--input=novel.txt"], "no model named; pass --model="),
        (["--input=novel.txt", "--model=m"], "no key; set OPENAI_API_KEY"),
    ],
)
def test_bad_settings_are_one_line(novel, monkeypatch, words, message):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match=message):
        generate_qa.main(words)
    monkeypatch.setitem(sys.modules, "openai", None)  # what import finds of a missing one
    with pytest.raises(UserError, match="the openai package is missing; run python -m pip install"):
        generate_qa.main(["--input=novel.txt", "--model=m"])


# --- the parts -----------------------------------------------------------------------------------


def test_pairs_are_found_in_whatever_a_model_says():
    for text in ("", "我不会。", *(json.dumps(bad) for bad in BAD)):
        assert parse_pairs(text) == ([], 1)
    first, second = json.loads(GOOD[0]), json.loads(GOOD[1])
    assert parse_pairs(f'{{"pairs": [{GOOD[0]}, {GOOD[1]}]}}') == ([first, second], 0)
    assert parse_pairs(GOOD[0] + GOOD[1][:-5]) == ([first], 1)


@pytest.mark.parametrize(
    ("answer", "evidence", "grounded"),
    [
        ("皇帝那天在温德殿。", "帝御 温德殿。", True),  # in other words; blanks aside
        ("帝御温德殿。", "帝御未央宫", False),
        *(("帝御温德殿。", odd, False) for odd in (None, ["帝御温德殿"], 3, "帝御温德殿\ud800")),
        ("公元169年，帝御温德殿。", "帝御温德殿", False),  # a number that the passage lacks
        ("唐太宗当时住在长安城里。", "帝御温德殿", False),
    ],
)
def test_an_answer_must_stand_in_the_passage(answer, evidence, grounded):
    pair = {"Question": "帝御何殿？", "Answer": answer, "Evidence": evidence}
    assert is_grounded(pair, LINES[3]) == grounded


@pytest.mark.parametrize("size", [7, 40, 60, 100, 1000])
def test_passages_are_whole_lines_or_sentences_and_lose_nothing(size):
    pieces = cut(TEXT, size)
    assert max(map(len, pieces)) <= size
    assert "".join("".join(pieces).split()) == "".join(TEXT.split())
    if size >= 40:
        assert all(piece[-1] in "。，" for piece in pieces)
