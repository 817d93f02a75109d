"""Requests of every kind as streams: what a reader gets, chunk by chunk, and a fault in the middle of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

REQUEST_TIMEOUT_S = 240.0

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SEEDED = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}


@dataclass
class Reading:
    """One answer as its reader saw it."""

    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    finish: dict[int, Any] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    error: str = ""

    def take(self, event: dict[str, Any]) -> int:
        """Add one response or chunk of one; returns how many tokens it brought."""
        if "error" in event:
            self.error = json.dumps(event["error"])
            return 0
        new = 0
        for choice in event["choices"]:
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + (choice["text"] or "")
            tokens = choice.get("token_ids") or []
            self.tokens.setdefault(index, []).extend(tokens)
            new += len(tokens)
            if choice.get("logprobs"):
                found = choice["logprobs"]
                self.logprobs.setdefault(index, []).extend(
                    zip(
                        found["tokens"], found["token_logprobs"], map(str, found["top_logprobs"]), strict=True
                    )
                )
            if choice.get("finish_reason"):
                self.finish[index] = (choice["finish_reason"], choice.get("stop_reason"))
        if event.get("usage"):
            self.usage = {k: v for k, v in event["usage"].items() if isinstance(v, int)}
        return new


def kinds(text: str, prefix: list[int], tokens: int = 48) -> dict[str, dict[str, Any]]:
    """A body of /v1/completions for every kind of request whose stream must not change.

    Args:
        text: a prompt.
        prefix: token ids of a long prompt that several requests share.
        tokens: length of each answer.
    """
    base = {"prompt": text, "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True}
    return {
        "greedy": base | {"temperature": 0},
        "seeded": base | SEEDED | {"seed": 11},
        "penalties": base
        | SEEDED
        | {"seed": 12, "presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.15},
        "three": base | SEEDED | {"seed": 13, "n": 3},
        "three, shared prefix": base | SEEDED | {"seed": 14, "n": 3, "prompt": prefix},
        "prefix again": base | {"temperature": 0, "prompt": prefix},
        "schema": base | SEEDED | {"seed": 15, "ignore_eos": False, "structured_outputs": {"json": SCHEMA}},
        "regex": base
        | SEEDED
        | {"seed": 16, "ignore_eos": False, "structured_outputs": {"regex": r"([a-z]{3,8} ){12}[0-9]{4}"}},
        "logprobs": base | SEEDED | {"seed": 17, "logprobs": 3},
        "whole": base | SEEDED | {"seed": 18, "stream": False, "logprobs": 1},
    }


async def _read(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], on_token: Callable[[int], None]
) -> Reading:
    reading, stream = Reading(), body.get("stream", True)
    body = body | {"stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if not stream or response.status != 200:
            reading.take(await response.json())
            return reading
        count = 0
        async for line in response.content:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                count += reading.take(json.loads(line[6:]))
                on_token(count)
    return reading


def read_all(
    url: str,
    model: str,
    bodies: list[dict[str, Any]],
    on_token: Callable[[int, int], None] = lambda _stream, _count: None,
) -> list[Reading]:
    """Send all bodies at once; ``on_token(stream, tokens so far)`` is called with every chunk that comes."""

    async def everything() -> list[Reading]:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=len(bodies))
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            return list(
                await asyncio.gather(
                    *(
                        _read(session, url, {"model": model, **body}, lambda n, i=i: on_token(i, n))  # type: ignore[misc]
                        for i, body in enumerate(bodies)
                    )
                )
            )

    return asyncio.run(everything())


def streamed_tokens(bodies: Iterable[dict[str, Any]], readings: list[Reading]) -> int:
    """How many tokens ``on_token`` hears of: an answer that comes whole is not among its streams."""
    return sum(
        len(tokens)
        for body, reading in zip(bodies, readings, strict=True)
        for tokens in reading.tokens.values()
        if body.get("stream", True)
    )


def with_stops(bodies: dict[str, dict[str, Any]], readings: list[Reading]) -> dict[str, dict[str, Any]]:
    """Requests that stop at a string which straddles two tokens late in the answer they gave without it."""
    stopping = {}
    for name in ("greedy", "seeded"):
        text = readings[list(bodies).index(name)].texts[0]
        assert len(text) > 60, f"too short for a stop string: {text!r}"
        stopping[f"stop string, {name}"] = bodies[name] | {"stop": [text[-30:-18]]}
    return stopping
