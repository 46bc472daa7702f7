"""What stands before every route: limits on bodies and time, security headers, and errors in OpenAI's form.

Pure ASGI, so that streamed answers pass through untouched.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

from h11 import LocalProtocolError

from serve.schemas import ApiError

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
MAX_DIGITS = 18  # of a Content-Length: Python refuses to read thousands
DRAIN_SECONDS, DRAIN_TIMES = 3.0, 4  # of a body that is refused: seconds, and times the largest one allowed


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Any, max_body_bytes: int, body_seconds: float) -> None:
        self.app, self.max_body_bytes, self.body_seconds = app, max_body_bytes, body_seconds

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def guarded_send(message: dict[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = list(message["headers"]) + [
                    (name.encode(), value.encode())
                    for name, value in SECURITY_HEADERS.items()
                    if name.encode() not in present
                ]
            # found by fuzzing: a client that breaks HTTP in the middle of its body can be sent no answer
            with contextlib.suppress(LocalProtocolError):
                await send(message)

        try:
            self._refuse_announced(scope)
            await self.app(scope, self._limited(receive), guarded_send)
        except ApiError as error:
            if started:
                raise
            await self._drain(receive)
            await _answer(error, guarded_send)

    def _refuse_announced(self, scope: dict[str, Any]) -> None:
        for name, value in scope["headers"]:
            if name != b"content-length":
                continue
            if not value.isdigit() or len(value) > MAX_DIGITS or int(value) > self.max_body_bytes:
                raise self._too_large()

    async def _drain(self, receive: Callable) -> None:
        """Read what is left of a body, within limits: a client that is still sending would not see the answer."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while size <= DRAIN_TIMES * self.max_body_bytes:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body may have at most {self.max_body_bytes / 2**20:g} MiB.", "body_too_large"
        )

    def _limited(self, receive: Callable) -> Callable:
        """`receive` that counts bytes and gives up on a body that does not arrive."""
        size, ended = 0, False
        until = asyncio.get_running_loop().time() + self.body_seconds

        async def limited() -> dict[str, Any]:
            nonlocal size, ended
            if ended:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"The body did not arrive within {self.body_seconds:g} s.", "body_timeout"
                ) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                ended = not message.get("more_body", False)
                if size > self.max_body_bytes:
                    raise self._too_large()
            return message

        return limited


async def _answer(error: ApiError, send: Callable) -> None:
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers |= {name.lower(): value for name, value in error.headers().items()}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
