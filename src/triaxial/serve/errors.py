"""Errors as OpenAI's clients read them: a status and a body that says what to do."""

from __future__ import annotations

import json

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
_RETRY_AFTER_S = 1
"""What a client is told to wait when the queue is full or no replica is up."""


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field at fault, `code` is for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> str:
        """The body as JSON. ASCII, because a client's own text, quoted here, may be no valid Unicode."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})

    def response(self) -> Response:
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, "application/json")


async def answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_error(_: Request, error: Exception) -> Response:
    """The framework's own: no such path, or not that method."""
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def answer_invalid(_: Request, error: Exception) -> Response:
    """A body that is no JSON or does not fit the schema; the first fault is enough to be clear."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None).response()


async def answer_bug(_: Request, error: Exception) -> Response:
    return bug(error).response()


def bug(error: Exception) -> ApiError:
    """For an exception that nobody expected: its text may hold what is not the client's."""
    return ApiError(500, f"internal error: {type(error).__name__}")
