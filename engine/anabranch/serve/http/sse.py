"""Answers that end when their client does: server-sent events, and results that are waited for."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from anabranch.serve.http.errors import as_api_error

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
CLIENT_LEFT = 499  # nobody reads it; nginx's number in a log


class EventStream(Response):
    """Sends pieces of ready-made events as they come.

    Each piece is written before the next is asked for, and writing waits while the client does not read, so nothing
    piles up here. A client that leaves, or takes nothing for `timeout_s`, ends the stream. An error becomes the last
    event. `close` is called in any case.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], *, close: Callable[[], None], timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._close = close
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _while_connected(self._send(send), receive)
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with suppress(TimeoutError):
            try:
                async for piece in self._pieces:
                    await self._write(send, piece)
                last = DONE
            except TimeoutError:
                raise
            except Exception as error:
                last = b"data: " + as_api_error(error).body() + b"\n\n" + DONE
            await self._write(send, last, more=False)

    async def _write(self, send: Send, piece: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self._timeout_s):
            await send({"type": "http.response.body", "body": piece, "more_body": more})


async def unless_client_leaves(work: Coroutine[Any, Any, Response], request: Request) -> Response:
    """The response, or none that matters if the client closes its connection first; the work is then cancelled."""
    response = await _while_connected(work, request.receive)
    return Response(status_code=CLIENT_LEFT) if response is None else response


async def _while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """The result of the work; None, with the work cancelled, if the client leaves before."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
