"""A closed-loop load on an OpenAI endpoint, and what its streams looked like."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Request:
    """One completion to ask for; ``prompt`` is text or token ids."""

    prompt: str | list[int]
    max_tokens: int
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stream:
    """What a reader of one stream saw. Times are seconds on the monotonic clock."""

    started_s: float
    token_times_s: list[float] = field(default_factory=list)
    text: str = ""
    chunks: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""
    usage: dict[str, Any] | None = None

    @property
    def gaps_s(self) -> list[float]:
        times = self.token_times_s
        return [b - a for a, b in itertools.pairwise(times)]


async def stream_completion(session: aiohttp.ClientSession, url: str, model: str, request: Request) -> Stream:
    """Stream one completion from ``url`` (".../v1"); errors are returned in the stream, not raised."""
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **request.params,
    }
    stream = Stream(time.monotonic())
    try:
        async with session.post(f"{url}/completions", json=body) as response:
            if response.status != 200:
                stream.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return stream
            async for line in response.content:
                _take_line(stream, line)
    except (aiohttp.ClientError, TimeoutError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    if not stream.error and stream.finish_reason is None:
        stream.error = "the stream ended without a finish reason"
    return stream


def _take_line(stream: Stream, line: bytes) -> None:
    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
        return
    event = json.loads(line[6:])
    if "error" in event:
        stream.error = str(event["error"])
        return
    stream.usage = event.get("usage") or stream.usage
    for choice in event.get("choices", ()):
        stream.token_times_s.append(time.monotonic())
        stream.text += choice["text"]
        stream.chunks.append(choice)
        stream.finish_reason = choice["finish_reason"] or stream.finish_reason


async def closed_loop(url: str, model: str, requests: list[Request], concurrency: int) -> list[Stream]:
    """Run all requests, at most ``concurrency`` at a time, in order; returns their streams in order."""
    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(request: Request) -> Stream:
            async with gate:
                return await stream_completion(session, url, model, request)

        return list(await asyncio.gather(*(one(request) for request in requests)))


def random_prompts(count: int, tokens: int, *, seed: int, vocabulary: int) -> list[list[int]]:
    """``count`` prompts of ``tokens`` random ids (the paper's Random workload, 7.1)."""
    rng = random.Random(seed)
    return [[rng.randrange(5, vocabulary) for _ in range(tokens)] for _ in range(count)]
