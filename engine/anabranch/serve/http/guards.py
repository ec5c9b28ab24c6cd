"""What a request must pass before the app sees it: the key, a free place, the size of its body, the time it takes.

Plain ASGI, so that nothing stands between the app and its streams. `/health` needs no key, so that load balancers may
ask, nor does the page at `/`, which holds nothing; all else does, `/metrics` too (Prometheus can send a bearer token).
"""

import asyncio
import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anabranch.serve.http.errors import RETRY_AFTER, ApiError
from anabranch.serve.http.settings import ServerSettings
from anabranch.serve.traffic import Traffic

OPEN_PATHS = ("/", "/health")
DISCARD_BYTES = 32 << 20  # of a body that is too large: a client reads no answer while it is still sending
DISCARD_S = 5.0


class Guards:
    """Wraps an app."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, traffic: Traffic) -> None:
        self.app = app
        self.settings = settings
        self.traffic = traffic
        self.open = 0  # requests with a body
        self.key_digest = None if settings.api_key is None else _digest(settings.api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_key(scope["path"], headers)
            if scope["method"] != "POST":
                await self.app(scope, receive, send)
                return
            self._check_place()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self.open += 1
        try:
            await self._read_and_call(headers, scope, receive, send)
        finally:
            self.open -= 1

    def _check_place(self) -> None:
        if self.open >= self.settings.max_concurrency:
            self.traffic.rejected += 1
            raise ApiError(
                429, f"the server is full: {self.open} requests are open; try again later",
                code="rate_limit_exceeded", headers=RETRY_AFTER,
            )  # fmt: skip

    def _check_key(self, path: str, headers: Headers) -> None:
        if self.key_digest is None or path in OPEN_PATHS:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = _digest(token.strip().encode("latin-1"))
        if not (hmac.compare_digest(given, self.key_digest) and scheme.lower() == "bearer"):
            raise ApiError(
                401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _read_and_call(self, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._read(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        given = False

        async def receive_body() -> Message:
            nonlocal given
            if given:
                return await receive()  # comes when the client leaves
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_body, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        limit = self.settings.max_body_bytes
        length = headers.get("content-length", "0")
        too_large = int(length) > limit if length.isdecimal() else False
        parts, size = [], 0
        try:
            while not too_large:
                async with asyncio.timeout(self.settings.client_timeout_s):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    break
                size += len(message["body"])
                parts.append(message["body"])
                too_large = size > limit
                if not message["more_body"]:
                    break
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", headers={"Connection": "close"}) from None
        if too_large:
            await _discard(receive)
            raise ApiError(
                413, f"the body has more than {limit} bytes", code="body_too_large", headers={"Connection": "close"}
            )
        return b"".join(parts)


async def _discard(receive: Receive) -> None:
    """Read the rest of a body, within reason, and forget it."""
    size = 0
    try:
        async with asyncio.timeout(DISCARD_S):
            while size < DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body"):
                    return
    except TimeoutError:
        return


def _digest(text: bytes) -> bytes:
    """Of a fixed length, so that comparing takes the same time for every guess."""
    return hashlib.sha256(text).digest()
