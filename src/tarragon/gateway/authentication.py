"""Who may ask for what, once there is an API key: nobody without it, but for health checks.

vLLM guards a list of path prefixes; whatever is not on it (metrics, tokenisation, the server's version,
a route of the next release) would be open. Here it is the other way round.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Iterator
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from tarragon.gateway.admission import HEALTH_PATHS


class DenyByDefault(AuthenticationMiddleware):  # type: ignore[misc]
    """ASGI middleware: every path but HEALTH_PATHS needs one of the keys, compared in constant time.

    Requests of method OPTIONS pass: browsers send them without a key to learn what they may ask for.
    """

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            return self._pass(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in HEALTH_PATHS or self.verify_token(Headers(scope=scope)):
            return self._pass(scope, receive, send)
        return JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)

    def _pass(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        passed: Awaitable[None] = self.app(scope, receive, send)
        return passed


def deny_by_default(middleware: Iterable[Any]) -> Iterator[Any]:
    """Yield a server's middleware with vLLM's authentication, if it has one, made to guard every path."""
    for each in middleware:
        if each.cls is AuthenticationMiddleware:
            yield Middleware(DenyByDefault, *each.args, **each.kwargs)
        else:
            yield each
