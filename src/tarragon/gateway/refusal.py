"""An answer of the gateway's own, instead of vLLM's: why a request goes no further."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, Final

import msgspec

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_AFTER_S: Final = 1


class Refusal(Exception):
    """An answer instead of the one asked for."""

    def __init__(self, status: HTTPStatus, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.parameter = parameter


async def answer(send: Send, refusal: Refusal) -> None:
    """Send an error in the form of OpenAI's API."""
    error = {
        "message": str(refusal),
        "type": refusal.status.phrase,
        "param": refusal.parameter,
        "code": refusal.status.value,
    }
    headers = [(b"content-type", b"application/json")]
    if refusal.status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    if refusal.status is HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b'Bearer realm="tarragon"'))
    await send({"type": "http.response.start", "status": refusal.status.value, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode({"error": error})})
