"""An endpoint in OpenAI's form beside the page: /v1/models and /v1/chat/completions.

    client = openai.OpenAI(base_url="http://127.0.0.1:7860/v1", api_key="none")
    client.chat.completions.create(model="out-sanguo-sft", messages=[...], seed=1337)

The same seed gives the same text as sample.py. A fine-tuned model gets the conversation and the
tools, and a call that it makes is text of its answer; a pretrained one continues the last message.
Options that would change an answer and are not supported are refused, not ignored. A length above
the server's is cut to it; the header x-max-tokens of each answer says which length it had.
"""

import itertools
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import fields
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import AliasChoices, BaseModel, Field, TypeAdapter, ValidationError

from configurator import UserError
from miniglm import generation
from miniglm.prep.forms import BadRecord, awaits_result, tool_calls
from miniglm.serve.gate import refuse
from miniglm.serve.server import Busy, Server, Stream

MOST_SAMPLES = 5  # of one question
# options that change no answer; max_tokens does not beside max_completion_tokens
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
HARMLESS |= {"prompt_cache_retention", "parallel_tool_calls", "reasoning_effort", "verbosity"}
HARMLESS |= {"prediction", "max_tokens"}
LENGTHS = ("max_completion_tokens", "max_tokens", "max_new_tokens")  # names, the first one wins
LENGTH = Field(generation.Sampling.max_new_tokens, ge=1, validation_alias=AliasChoices(*LENGTHS))
# values that ask for nothing
OFF = (None, False, 0, [], {}, "auto", "none", ["text"], {"type": "text"})
OBJECT = TypeAdapter(dict)
SAMPLING = TypeAdapter(generation.Sampling)
SAMPLING_NAMES = {field.name for field in fields(generation.Sampling)}


class Part(BaseModel):
    text: str
    type: Literal["text"] = "text"


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None  # an assistant's turn may be empty
    tool_calls: list | None = None

    def plain(self) -> dict:
        """As the tokenizer renders it."""
        if self.role != "assistant" and (self.tool_calls or self.content is None):
            raise UserError(f"a message of the {self.role} must have content, and no tool_calls")
        parts = [Part(text=self.content)] if isinstance(self.content, str) else self.content or []
        role = "system" if self.role == "developer" else self.role
        calls = {"tool_calls": tool_calls(self.tool_calls)} if self.tool_calls else {}
        return {"role": role, "content": "".join(part.text for part in parts)} | calls


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Body(BaseModel, extra="allow"):
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[dict] = []
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 1
    stop: str | Annotated[list[str], Field(max_length=16)] = []
    max_new_tokens: int = LENGTH
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def turns(self, takes_tools: bool) -> list[dict]:
        """The messages as the tokenizer renders them, with the tools on the first if the model has
        learnt what they are: a small one has no room for them, and may always call none."""
        turns = [message.plain() for message in self.messages]
        for before, turn in itertools.pairwise([{"role": "system"}, *turns]):
            if turn["role"] == "tool" and not awaits_result(before):
                raise UserError("a tool's message must follow the assistant's tool_calls")
        if takes_tools and self.tools and self.model_extra.get("tool_choice") != "none":
            turns[0]["tools"] = self.tools
        return turns

    def sampling(self, most_tokens: int) -> generation.Sampling:
        for name, value in self.model_extra.items():
            if name not in SAMPLING_NAMES | HARMLESS and value not in OFF:
                raise UserError(f"{name} is not supported; leave it out")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        options = dict(self) | {"max_new_tokens": min(self.max_new_tokens, most_tokens)}
        return SAMPLING.validate_python(options | {"stop": [text for text in stop if text]})


def without_nulls(body: dict) -> dict:
    """A request without what clients write for a default: null, a top_k of 0 or -1, or a length of
    -1. A seed of null or -1 is left to chance."""
    if body.get("seed", 0) in (None, -1):
        body["seed"] = secrets.randbits(63)
    if body.get("top_k") in (0, -1):
        del body["top_k"]
    body |= {name: 10**9 for name in LENGTHS if body.get(name) == -1}
    return {name: value for name, value in body.items() if value is not None}


class NotFound(UserError):
    """No model of that name."""


STATUSES = {NotFound: 404, Busy: 429, UserError: 400, ValidationError: 400, BadRecord: 400}
CODES = {404: "model_not_found", 429: "rate_limit_exceeded"}


def make_router(servers: dict[str, Server]) -> APIRouter:
    router = APIRouter()

    @router.api_route("/v1/models", methods=["GET", "HEAD"])
    @router.get("/v1/models/")
    async def models() -> dict:
        return {"object": "list", "data": [describe(server) for server in servers.values()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        try:
            return JSONResponse(describe(find(servers, name.rstrip("/"))))
        except NotFound as error:
            return error_response(error)

    @router.post("/v1/chat/completions/")
    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        stream = Stream()
        try:
            body = OBJECT.validate_json(await request.body())
            body = Body.model_validate(without_nulls(body))
            server = find(servers, body.model)
            prompt = server.prompt(body.turns(server.checkpoint.tokenizer.chat is not None))
            sampling = body.sampling(server.max_new_tokens)
            for sample in range(body.n):
                server.submit(stream, generation.Request(prompt, sampling, 0, sample))
            answer = Answer(server.name, len(prompt), stream)
            headers = {"x-max-tokens": str(sampling.max_new_tokens)}
            if body.stream:
                events = answer.events(body.stream_options.include_usage)
                return StreamingResponse(events, 200, headers, "text/event-stream")
            return await answer.whole(request, headers)
        except Exception as error:
            stream.stop()
            return error_response(error)

    return router


def describe(server: Server) -> dict:
    created = int(server.checkpoint.path.stat().st_mtime)
    return {"id": server.name, "object": "model", "created": created, "owned_by": "miniglm"}


def find(servers: dict[str, Server], name: str) -> Server:
    if name not in servers:
        raise NotFound(f"no model {name!r}; there is {', '.join(servers)}")
    return servers[name]


class Answer:
    """The answer to one request: what comes on its stream, in OpenAI's objects."""

    def __init__(self, model: str, prompt_tokens: int, stream: Stream):
        self.model, self.prompt_tokens, self.stream = model, prompt_tokens, stream
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def envelope(self, kind: str, choices: list[dict]) -> dict:
        shared = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return shared | {"choices": choices}

    def usage(self) -> dict:
        new = sum(len(job.request.ids) for job in self.stream.jobs)
        tokens = {"prompt_tokens": self.prompt_tokens, "completion_tokens": new}
        return {"usage": tokens | {"total_tokens": self.prompt_tokens + new}}

    async def whole(self, request: Request, headers: dict) -> Response:
        """All samples once they have ended; given up if the client goes away meanwhile."""
        texts, finish = ["" for _ in self.stream.jobs], ["" for _ in self.stream.jobs]
        with self.stream as stream:
            async for piece in stream:
                texts[piece.number] += piece.text
                finish[piece.number] = piece.finish
                if await request.is_disconnected():
                    return Response(status_code=499)
        choices = []
        for number, text in enumerate(texts):
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append(choice(number, finish[number], message=message))
        content = self.envelope("chat.completion", choices) | self.usage()
        return JSONResponse(content, headers=headers)

    async def events(self, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events. A client that goes away closes this generator."""

        def chunk(*choices: dict) -> dict:
            return self.envelope("chat.completion.chunk", list(choices))

        with self.stream as stream:
            for job in stream.jobs:
                delta = {"role": "assistant", "content": ""}
                yield event(chunk(choice(job.number, delta=delta)))
            try:
                async for piece in stream:
                    if piece.text:
                        yield event(chunk(choice(piece.number, delta={"content": piece.text})))
                    if piece.finish:
                        yield event(chunk(choice(piece.number, piece.finish, delta={})))
            except Exception as error:
                yield event(json.loads(error_response(error).body))
            if with_usage:
                yield event(chunk() | self.usage())
            yield "data: [DONE]\n\n"


def choice(number: int, finish: str | None = None, **content: dict) -> dict:
    return {"index": number, "logprobs": None, "finish_reason": finish} | content


def event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_response(error: Exception) -> JSONResponse:
    """An error's status is 500 unless the client can mend it."""
    statuses = (status for kind, status in STATUSES.items() if isinstance(error, kind))
    status, message = next(statuses, 500), str(error)
    if isinstance(error, ValidationError):
        last = error.errors()[-1]  # of a text or a list the list's, which says more
        message = ": ".join([".".join(map(str, last["loc"])) or "the request", last["msg"]])
    return refuse(status, message, CODES.get(status))
