"""An endpoint in OpenAI's form beside the page: /v1/models and /v1/chat/completions.

    client = openai.OpenAI(base_url="http://127.0.0.1:7860/v1", api_key="none")
    client.chat.completions.create(model="out-sanguo-sft", messages=[...], seed=1337)

Same seed, same text as sample.py. A fine-tuned model gets the conversation; a pretrained one
continues the last message. What it cannot do it refuses, rather than leave it out in silence.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from configurator import UserError
from miniglm.generation import Sampling
from miniglm.serve.server import Busy, Server, Stream

MOST_SAMPLES = 5  # of one question
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# settings of Sampling by the names that clients give them
SAMPLING = {
    "max_tokens": ("max_new_tokens", int),
    "max_completion_tokens": ("max_new_tokens", int),
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "no_repeat_ngram": ("no_repeat_ngram", int),
    "seed": ("seed", int),
}
READ = {"model", "messages", "stream", "stream_options", "n", "stop", *SAMPLING}
# what changes no answer
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


class Refused(Exception):
    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def make_router(servers: dict[str, Server]) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [describe(server) for server in servers.values()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        try:
            return JSONResponse(describe(find(servers, name)))
        except Refused as refused:
            return error_response(refused)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        stream = Stream()
        try:
            body = read_body(await request.body())
            server = find(servers, body.get("model"))
            answer = Answer(server.name, body)
            answer.prompt_tokens = submit(server, stream, body)
        except Exception as error:
            stream.stop()
            return error_response(error)
        if body.get("stream"):
            lines = answer.lines(stream)
            return StreamingResponse(lines, media_type="text/event-stream")
        return await whole(request, stream, answer)

    return router


def describe(server: Server) -> dict:
    created = int(server.checkpoint.path.stat().st_mtime)
    return {"id": server.name, "object": "model", "created": created, "owned_by": "miniglm"}


def find(servers: dict[str, Server], name: object) -> Server:
    if not isinstance(name, str) or name not in servers:
        known = ", ".join(servers)
        message = f"the model {name!r} is not here; there is {known}"
        raise Refused(404, message, "model", "model_not_found")
    return servers[name]


def read_body(content: bytes) -> dict:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the request is not a JSON object")
    for name, value in body.items():
        if name not in READ | HARMLESS and value not in (None, False, 0, [], {}, "auto", "none"):
            if name == "response_format" and value == {"type": "text"}:
                continue
            raise Refused(400, f"{name} is not supported", name, "unsupported_parameter")
    return body


def submit(server: Server, stream: Stream, body: dict) -> int:
    """Sends the body's n requests on their way; returns the tokens of the prompt."""
    n = number(body, "n", int)
    n = 1 if n is None else n
    if not 1 <= n <= MOST_SAMPLES:
        raise Refused(400, f"n={n} must be 1 to {MOST_SAMPLES}", "n")
    prompt = server.prompt(read_messages(body.get("messages")))
    for sample in range(n):
        server.submit(stream, prompt, read_sampling(body, server.max_new_tokens), sample)
    return len(prompt)


def read_messages(messages: object) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list with a message", "messages")
    read = []
    for place, message in enumerate(messages):
        param = f"messages[{place}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(400, f"{param} has no role of {', '.join(ROLES)}", param)
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if not isinstance(content, str):
            raise Refused(400, f"{param} has no text as its content", param)
        read.append({"role": ROLES[message["role"]], "content": content})
    if read[-1]["role"] != "user":
        raise Refused(400, "the last message must be the user's", "messages")
    return read


def read_sampling(body: dict, most: int) -> Sampling:
    given = {"max_new_tokens": min(Sampling.max_new_tokens, most)}
    for name, (setting, kind) in SAMPLING.items():
        value = number(body, name, kind)
        if value is not None:
            given[setting] = value
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise Refused(400, "stop must be a text or a list of texts", "stop")
    return Sampling(**given, stop=stop)


def number(body: dict, name: str, kind: type) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    wanted = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
            raise ValueError
    except (ValueError, OverflowError):
        raise Refused(400, f"{name}={repr(value)[:24]} must be {wanted}", name) from None
    return kind(value)


async def whole(request: Request, stream: Stream, answer: "Answer") -> Response:
    """All samples once they are there; given up where the client goes away meanwhile."""
    with stream:
        texts = ["" for _ in stream.jobs]
        finish = ["" for _ in stream.jobs]
        try:
            async for piece in stream:
                texts[piece.number] += piece.text
                finish[piece.number] = piece.finish
                if await request.is_disconnected():
                    return Response(status_code=499)
        except Exception as error:
            return error_response(error)
    choices = [
        {
            "index": place,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": finish[place],
        }
        for place, text in enumerate(texts)
    ]
    return JSONResponse(answer.envelope("", choices) | {"usage": answer.usage(stream)})


class Answer:
    """What all objects of one answer share."""

    def __init__(self, model: str, body: dict):
        self.model, self.prompt_tokens = model, 0
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise Refused(400, "stream_options must be an object", "stream_options")
        self.with_usage = bool(options.get("include_usage"))
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def envelope(self, kind: str, choices: list[dict]) -> dict:
        name = f"chat.completion{kind}"
        shared = {"id": self.id, "object": name, "created": self.created, "model": self.model}
        return shared | {"choices": choices}

    def usage(self, stream: Stream) -> dict:
        new = sum(len(job.request.ids) for job in stream.jobs)
        total = self.prompt_tokens + new
        tokens = {"prompt_tokens": self.prompt_tokens, "completion_tokens": new}
        return tokens | {"total_tokens": total}

    async def lines(self, stream: Stream) -> AsyncIterator[str]:
        """The answer as server-sent events. A client that goes away closes this generator."""

        def chunk(number: int, delta: dict, finish: str | None = None) -> str:
            choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish}
            return event(self.envelope(".chunk", [choice]))

        with stream:
            for job in stream.jobs:
                yield chunk(job.number, {"role": "assistant", "content": ""})
            try:
                async for piece in stream:
                    if piece.text:
                        yield chunk(piece.number, {"content": piece.text})
                    if piece.finish:
                        yield chunk(piece.number, {}, piece.finish)
            except Exception as error:
                yield event(json.loads(error_response(error).body))
            if self.with_usage:
                yield event(self.envelope(".chunk", []) | {"usage": self.usage(stream)})
            yield "data: [DONE]\n\n"


def event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_response(error: Exception) -> JSONResponse:
    """OpenAI's form of an error: 400 for what the client can mend, 429 for Busy, else 500."""
    status, param, code = 500, None, None
    if isinstance(error, Refused):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, Busy):
        status, code = 429, "rate_limit_exceeded"
    elif isinstance(error, UserError):
        status = 400
    kind = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
    # half of a surrogate pair, which JSON may hold, cannot be sent back
    message, param = (
        text and text.encode(errors="replace").decode() for text in (str(error), param)
    )
    content = {"message": message, "type": kind, "param": param, "code": code}
    headers = {"retry-after": "1"} if status == 429 else None
    return JSONResponse({"error": content}, status, headers)
