"""Who may come in, and with how much: an ASGI layer before the page and the endpoint alike.

It asks for --auth where there is one (HTTP Basic, or `Authorization: Bearer user:password`), and
refuses what another site's page sends, bodies above a size, and uploads.
"""

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

LARGEST_BODY = 2**20  # bytes: a question, and what surrounds it
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Gate:
    """auth: "user:password" or None; hosts: the names under which it answers, None for any."""

    def __init__(self, app: Callable, auth: str | None, hosts: set[str] | None):
        self.app, self.auth, self.hosts = app, auth, hosts

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        refusal = self.refusal(scope["path"], headers)
        if refusal:
            return await refuse(send, *refusal)
        with contextlib.suppress(asyncio.CancelledError):  # the server ends while a page listens
            await self.app(scope, limited(receive), send)

    def refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason, or None where the request may pass."""
        host = headers.get("host", "")
        origin = headers.get("origin")
        try:
            name, page = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
        except ValueError:
            return 403, "the Host or the Origin is no address"
        if self.hosts is not None and name not in self.hosts:
            return 403, f"this server does not answer for {host}"
        if origin and page != host:
            return 403, f"pages of {origin} may not use this server"
        if self.auth is not None and not self.knows(headers.get("authorization", "")):
            return 401, "user and password are needed"
        if "upload" in path.split("/"):
            return 403, "nothing can be uploaded here"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            return 413, f"the request is longer than {LARGEST_BODY:,} bytes"
        return None

    def knows(self, authorization: str) -> bool:
        kind, _, word = authorization.partition(" ")
        given = word.strip().encode("latin-1")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True)
            except binascii.Error:
                return False
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(given, self.auth.encode())


def limited(receive: Callable[[], Awaitable[dict]]) -> Callable[[], Awaitable[dict]]:
    """receive, which ends the connection where a body without a length grows too long."""
    size = 0

    async def receive_some() -> dict:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        return message if size <= LARGEST_BODY else {"type": "http.disconnect"}

    return receive_some


async def refuse(send: Callable, status: int, reason: str) -> None:
    headers = [(b"content-type", b"application/json; charset=utf-8")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="MiniGLM", charset="UTF-8"'))
    error = {"message": reason, "type": "invalid_request_error", "param": None, "code": None}
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
