"""Who may come in, and with how much: an ASGI layer before both the page and the endpoint.

It asks for --auth if one is set (HTTP Basic, or `Authorization: Bearer user:password`), and
refuses requests from other sites' pages, bodies above a size, and uploads.
"""

import asyncio
import base64
import contextlib
import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

LARGEST_BODY = 2**20  # bytes: a question, and what surrounds it
HEADERS = {
    401: {"www-authenticate": 'Basic realm="MiniGLM", charset="UTF-8"'},
    429: {"retry-after": "1"},
}
KINDS = {429: "rate_limit_error", 500: "server_error"}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Gate:
    """auth: "user:password" or None; hosts: the names under which it answers, None for any."""

    def __init__(self, app: Callable, auth: str | None, hosts: set[str] | None):
        self.app, self.auth, self.hosts = app, auth, hosts

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "http":
            if refusal := self.refusal(scope["path"], Headers(scope=scope)):
                return await refusal(scope, receive, send)
            receive = limited(receive)
        with contextlib.suppress(asyncio.CancelledError):  # the server ends while a page listens
            await self.app(scope, receive, send)

    def refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        """The response to a request that may not pass."""
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name, page = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
        except ValueError:
            return refuse(403, "the Host or the Origin is not an address")
        if self.hosts is not None and name not in self.hosts:
            return refuse(403, f"this server does not answer for {host}")
        # a proxy may rename the host; that a page is its own site's the browser itself says
        if origin and page != host and headers.get("sec-fetch-site") != "same-origin":
            return refuse(403, f"pages of {origin} may not use this server")
        if self.auth is not None and not self.knows(headers.get("authorization", "")):
            return refuse(401, "user and password are needed")
        if "upload" in path.split("/"):
            return refuse(403, "nothing can be uploaded here")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            return refuse(413, f"the request is longer than {LARGEST_BODY:,} bytes")
        return None

    def knows(self, authorization: str) -> bool:
        kind, _, word = authorization.partition(" ")
        auth = self.auth.encode()
        wanted = {"basic": base64.b64encode(auth), "bearer": auth}.get(kind.lower())
        given = word.strip().encode("latin-1")
        return wanted is not None and hmac.compare_digest(given, wanted)


def limited(receive: Callable[[], Awaitable[dict]]) -> Callable[[], Awaitable[dict]]:
    """receive, which ends the connection if a body without a length grows too long."""
    size = 0

    async def receive_some() -> dict:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        return message if size <= LARGEST_BODY else {"type": "http.disconnect"}

    return receive_some


def refuse(status: int, reason: str, code: str | None = None) -> JSONResponse:
    """OpenAI's form of an error."""
    kind = KINDS.get(status, "invalid_request_error")
    error = {"message": reason, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, HEADERS.get(status))
