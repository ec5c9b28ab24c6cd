"""Routes whose bodies are JSON, read strictly.

A body without a JSON content type is refused, as FastAPI does by itself: a browser sends such bodies for any web page
without asking, and could otherwise be used to reach a server on its own machine.
"""

from collections.abc import Callable
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute


class JsonRequest(Request):
    """A request whose JSON is strict: no NaN, no lone surrogates, no bottomless nesting."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = orjson.loads(await self.body())
        return self._json


class JsonRoute(APIRoute):
    """Hands its endpoint a JsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            response: Response = await handle(JsonRequest(request.scope, request.receive))
            return response

        return handle_json
