"""What every HTTP request passes first: the key, the size of its body, and whether its client is still there."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triaxial.serve.errors import ApiError
from triaxial.serve.limits import Limits

BODY_LIMIT_S = 30
"""For a client to send its body."""
READ_LIMIT_S = 60
"""Beyond the time for an answer, for a client to read what it was sent."""


class Gate:
    """Refuses what must not be read, and cancels the work for a client that has gone away.

    Only paths under /v1 need the key: health and metrics say nothing of what is asked.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, api_key: str | None, draining: Callable[[], bool]) -> None:
        self._app, self._draining = app, draining
        self._max_body_bytes, self._limit_s = limits.max_body_bytes, limits.timeout_s + READ_LIMIT_S
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = await self._read(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self._run(scope, body, receive, send)

    def _check(self, scope: Scope) -> None:
        if not scope["path"].startswith("/v1"):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self._authorization is not None and not hmac.compare_digest(given, self._authorization):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if self._draining():
            raise ApiError(503, "the server is shutting down")

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away while sending it."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_LIMIT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_LIMIT_S} s") from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body_bytes} bytes")

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Answer, unless the client goes away or does not read: then everything that was begun for it is cancelled."""
        given = False

        async def receive_again() -> Message:
            nonlocal given
            if given:
                await anyio.sleep_forever()  # we ourselves wait for the client to go
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        with anyio.CancelScope(deadline=anyio.current_time() + self._limit_s) as scope_of_work:

            async def wait_for_disconnect() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                scope_of_work.cancel()

            watching = asyncio.create_task(wait_for_disconnect())
            try:
                await self._app(scope, receive_again, send)
            finally:
                watching.cancel()
