"""uvicorn around the app, and a SIGTERM that lets running requests end."""

import asyncio
import gc
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from anabranch.serve.async_engine import AsyncEngine, EngineStopped
from anabranch.serve.http.app import make_app
from anabranch.serve.http.listen import url
from anabranch.serve.http.settings import ServerSettings
from anabranch.serve.llm import LLM

GRACE_S = 5.0  # for clients to take the error that ends their stream, after the drain's end
INTERRUPTED = 130  # 128 + SIGINT
BACKLOG = 2048


def serve(llm: LLM, settings: ServerSettings, listener: socket.socket) -> int:
    """Answer requests until SIGTERM (returns 0) or Ctrl-C (130)."""
    gc.freeze()  # model, tokenizer and libraries stay: no collection, with its pause, has to look at them
    engine = AsyncEngine(llm.engine, max_queue=settings.max_queue)
    config = uvicorn.Config(
        make_app(llm, engine, settings), lifespan="on", log_level="warning", access_log=False, backlog=BACKLOG,
        server_header=False, timeout_graceful_shutdown=int(settings.drain_timeout_s + GRACE_S),
    )  # fmt: skip
    server = Server(
        config, engine, settings.drain_timeout_s, f"anabranch: {settings.model_names[0]} at {url(listener)}"
    )
    try:
        server.run(sockets=[listener])
    finally:
        engine.halt()  # nobody else does after a second Ctrl-C
        gc.unfreeze()
    return INTERRUPTED if server.interrupted else 0


class Server(uvicorn.Server):
    """Says when it is ready. A first signal drains, and Ctrl-C again ends at once."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, drain_timeout_s: float, greeting: str) -> None:
        super().__init__(config)
        self.interrupted = False
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        print(self._greeting, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline = asyncio.get_running_loop().call_later(
            self._drain_timeout_s, self._engine.end, EngineStopped("the server is shutting down")
        )
        await super().shutdown(sockets=sockets)
        deadline.cancel()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's own raises the signal again in the end, which would turn a clean exit into a killed process."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = number == signal.SIGINT
        self.force_exit = self.should_exit and self.interrupted
        self.should_exit = True
