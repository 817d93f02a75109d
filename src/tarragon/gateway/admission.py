"""What a request must pass before vLLM's server sees it: readiness, size, and parameters that mean something.

vLLM ignores parameters that it does not know, so that a misspelt one changes nothing and nobody is told. Here
they are a 400. While the cluster starts, requests get a 503 at once; when it has lost all attention workers,
they wait for one, a bounded number of them for a bounded time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any, Final, Protocol, get_args

from pydantic import AliasChoices, BaseModel

from tarragon.gateway.limits import Limits, check_request
from tarragon.gateway.refusal import App, Receive, Refusal, Scope, Send, answer

HEALTH_PATHS: Final = frozenset({"/health", "/ping"})
WITHOUT_WORKER: Final = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})
"""Routes that the gateway answers by itself."""


class Workers(Protocol):
    """What admission needs to know about attention workers."""

    available: asyncio.Event
    was_available: bool


class Admission:
    """ASGI middleware around vLLM's server; inside its authentication, so that strangers learn nothing."""

    def __init__(
        self,
        app: App,
        *,
        workers: Workers,
        parameters: Mapping[str, frozenset[str]],
        body_bytes_max: int,
        body_timeout_s: float,
        limits: Limits,
        waiting_max: int,
        wait_s: float,
    ) -> None:
        """``parameters`` has the known names for each POST route with a JSON body (see known_parameters).

        ``waiting_max`` requests may wait ``wait_s`` for a worker.
        """
        self._app = app
        self._workers = workers
        self._parameters = parameters
        self._body_bytes_max = body_bytes_max
        self._body_timeout_s = body_timeout_s
        self._limits = limits
        self._waiting_max = waiting_max
        self._wait_s = wait_s
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            if path in HEALTH_PATHS:
                self._check_started()
            elif scope["method"] == "POST":
                receive = await self._admit(path, scope, receive)
        except Refusal as refusal:
            await answer(send, refusal)
            return
        await self._app(scope, receive, send)

    async def _admit(self, path: str, scope: Scope, receive: Receive) -> Receive:
        """Return a ``receive`` that replays the body, or raise Refusal."""
        try:
            async with asyncio.timeout(self._body_timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError as error:
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive in time") from error
        known = self._parameters.get(path)
        if known is not None:
            check_request(body, known, self._limits)
            if path not in WITHOUT_WORKER:
                await self._wait_for_worker()
        return replay(body, receive)

    def _check_started(self) -> None:
        if not self._workers.was_available:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "still starting: no attention worker is ready yet")

    async def _wait_for_worker(self) -> None:
        self._check_started()
        if self._workers.available.is_set():
            return
        if self._waiting >= self._waiting_max:
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "no attention worker is available, and too many requests wait for one",
            )
        self._waiting += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await self._workers.available.wait()
        except TimeoutError as error:
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"no attention worker became available within {self._wait_s:g} s",
            ) from error
        finally:
            self._waiting -= 1

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Return the whole body; raise Refusal as soon as it is known to be too long."""
        too_long = Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is longer than {self._body_bytes_max} bytes"
        )
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._body_bytes_max:
                raise too_long
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(HTTPStatus.BAD_REQUEST, "the client hung up")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._body_bytes_max:
                raise too_long
            if not message.get("more_body"):
                return b"".join(chunks)


def known_parameters(routes: Iterable[Any]) -> dict[str, frozenset[str]]:
    """Return, for each POST route whose body is a pydantic model or several, the names it understands."""
    found = {}
    for route in routes:
        field = getattr(route, "body_field", None)
        if field is not None and "POST" in (route.methods or ()):
            names = model_names(field.field_info.annotation)
            if names:
                found[route.path] = frozenset(names)
    return found


def model_names(annotation: Any) -> set[str]:
    """Return all field names and aliases of the pydantic models in a type (a model, or a union of them)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        names = set(annotation.model_fields)
        for field in annotation.model_fields.values():
            for alias in (field.alias, field.validation_alias):
                choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
                names.update(choice for choice in choices if isinstance(choice, str))
        return names
    return {name for part in get_args(annotation) for name in model_names(part)}


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` first and then what comes, such as the client's leaving."""
    given = False

    async def receive_again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
