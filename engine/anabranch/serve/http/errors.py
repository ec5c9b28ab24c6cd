"""Errors in the form that OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}."""

import logging
import re
from collections.abc import Mapping

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from anabranch.serve.adapters.library import AdapterUnreadable
from anabranch.serve.async_engine import EngineCrashed, EngineStopped, QueueFull

logger = logging.getLogger(__name__)
RETRY_AFTER = {"Retry-After": "1"}
PLACE = re.compile(r"(?!str$)\w+")  # a field or an index; the rest says which form of a union was tried
TYPES = {
    401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error",
}  # fmt: skip


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """How every error looks."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is not a success. `param` names the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        kind = TYPES.get(self.status, "invalid_request_error")
        return orjson.dumps({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})

    def response(self) -> Response:
        return Response(self.body(), self.status, headers=self.headers, media_type="application/json")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of any error."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case QueueFull():
            return ApiError(429, str(error), code="rate_limit_exceeded", headers=RETRY_AFTER)
        case EngineStopped():
            return ApiError(503, str(error), code="server_stopping", headers=RETRY_AFTER)
        case AdapterUnreadable():
            logger.error("an adapter cannot be read", exc_info=error)
            return ApiError(500, str(error), code="adapter_unreadable")
        case EngineCrashed():
            return ApiError(500, str(error), code="engine_crashed")
    logger.error("an unexpected error", exc_info=error)
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")


def install(app: FastAPI) -> None:
    """Answer every error of the app in one form."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    known = (ApiError, RequestValidationError, HTTPException)
    for kind in (*known, QueueFull, EngineStopped, AdapterUnreadable, EngineCrashed, Exception):
        app.add_exception_handler(kind, answer)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request's fields, in words."""
    first = error.errors()[0]
    kind, where = first["type"], [str(part) for part in first["loc"][1:]]
    param = ".".join(part for part in where if PLACE.fullmatch(part)) or None
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", param=param, code="unknown_field")
    if kind == "value_error":
        message = str(first["ctx"]["error"])
        return ApiError(400, message if param is None else f"{param}: {message}", param=param)
    if param is None and kind in ("missing", "model_attributes_type"):
        return ApiError(400, "the body must be a JSON object, sent with 'Content-Type: application/json'")
    what = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{param or 'the body'}: {what}", param=param)
