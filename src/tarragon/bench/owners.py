"""Which attention worker holds which stream: asked of the gateway itself, by benchmarks only.

A benchmark starts its cluster with ``--middleware tarragon.bench.owners.Owners``: vLLM's own hook puts this
into the gateway, where it answers one more route. A cluster started without it has no such route.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import aiohttp

from tarragon.bench.load import ID_PREFIX

PATH: Final = "/bench/owners"
ENGINE_ARGS: Final = ("--middleware=tarragon.bench.owners.Owners",)
_INDEX: Final = re.compile(rf"cmpl-{ID_PREFIX}(\d+)-")

_Send = Callable[[dict[str, Any]], Awaitable[None]]


class Owners:
    """ASGI middleware: GET /bench/owners is a JSON object from request id to worker id ("" if it waits)."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: _Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        live = scope["app"].state.engine_client.engine_core.streams.live
        body = json.dumps({request_id: stream.owner or "" for request_id, stream in live.items()}).encode()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def held_by(url: str, worker_id: str) -> list[int]:
    """Numbers of this benchmark's requests that ``worker_id`` holds now. Raises aiohttp.ClientError."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}{PATH}") as response:
        response.raise_for_status()
        return indexes_held(await response.json(), worker_id)


def indexes_held(owners: Mapping[str, str], worker_id: str) -> list[int]:
    """Numbers of the requests whose owner is ``worker_id``; other clients' requests are left out."""
    return sorted(
        int(found.group(1))
        for request_id, owner in owners.items()
        if owner == worker_id and (found := _INDEX.match(request_id))
    )
