"""Who may ask the gateway for what: nobody without a key, once there is one, but for health checks.

vLLM guards a list of path prefixes; whatever is not on it (metrics, tokenisation, the server's version,
a route of the next release) would be open. Here it is the other way round. As long as there is no key, the
gateway listens on loopback only, and no foreign web page may ask through its visitor's browser.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from tarragon.gateway.admission import HEALTH_PATHS
from tarragon.gateway.refusal import App, Receive, Refusal, Scope, Send, answer
from tarragon.security.keys import Keys
from tarragon.security.origin import host_name, is_local_origin, is_loopback

EVERY_ORIGIN: Final = "*"


class Authentication:
    """ASGI middleware: every path but HEALTH_PATHS needs one of the keys as a bearer token (else 401).

    Requests of method OPTIONS pass: browsers send them without a key to learn what they may ask for.
    """

    def __init__(self, app: App, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = Keys(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("method") == "OPTIONS":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in HEALTH_PATHS or self._keys.admit(Headers(scope=scope).get("Authorization", "")):
            await self._app(scope, receive, send)
        else:
            await deny(scope, send, Refusal(HTTPStatus.UNAUTHORIZED, "an API key is needed: Bearer KEY"))


class NoForeignPages:
    """ASGI middleware for a gateway without keys: a web page from elsewhere gets 403.

    The Host header has to name this machine (a rebound DNS name does not), and so has the Origin of a page,
    unless ``allowed_origins`` names it.
    """

    def __init__(self, app: App, allowed_origins: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed_origins) - {EVERY_ORIGIN}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("Origin")
        why = ""
        if not is_loopback(host_name(headers)):
            why = "the Host header must name this machine, such as localhost, unless there is an API key"
        elif origin is not None and not (is_local_origin(origin) or origin in self._allowed):
            why = "a page from elsewhere needs an API key, or --allowed-origins to name it"
        if why:
            await deny(scope, send, Refusal(HTTPStatus.FORBIDDEN, why))
        else:
            await self._app(scope, receive, send)


async def deny(scope: Scope, send: Send, refusal: Refusal) -> None:
    """Answer a request with ``refusal``; a websocket is closed before it is open."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": ""})
    else:
        await answer(send, refusal)


def guarded(middleware: Iterable[Any], keys: Sequence[str], allowed_origins: Sequence[str]) -> Iterator[Any]:
    """Yield a server's middleware, outermost first, with ours in the place of vLLM's authentication.

    It comes right behind CORS, so that a browser may read why a page was refused.
    """
    kept = [each for each in middleware if each.cls is not AuthenticationMiddleware]
    outer = [each for each in kept if each.cls is CORSMiddleware]
    yield from outer
    if keys:
        yield Middleware(Authentication, keys=keys)
    else:
        yield Middleware(NoForeignPages, allowed_origins=allowed_origins)
    yield from (each for each in kept if each not in outer)
