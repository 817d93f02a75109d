"""Requests whose answers are compared bit for bit, and how to send them."""

from __future__ import annotations

import asyncio
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tarragon.models.demo import ensure_demo_model
from tarragon.testing.checkpoints import make_checkpoint

REQUEST_TIMEOUT_S = 300.0
SMALL_LAYERS = 4
"""Layers of the demo model that quick tests use."""
VOCABULARY = 49_152


@dataclass(frozen=True)
class Answer:
    """Everything that must be equal: tokens, log-probs with their alternatives, finish reason, usage."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    alternatives: str
    finish_reason: str
    usage: str


def mixed_requests(
    count: int,
    *,
    seed: int,
    vocabulary: int,
    long_tokens: int,
    output_tokens: int = 64,
) -> list[dict[str, Any]]:
    """``count`` bodies of /v1/completions: lengths from 1 to ``long_tokens``, greedy and sampled in turn."""
    rng = random.Random(seed)
    bodies = []
    for index in range(count):
        length = long_tokens if index % 16 == 7 else rng.choice((1, 3, 9, 17, 40, 90, 150))
        body: dict[str, Any] = {
            "prompt": [rng.randrange(5, vocabulary) for _ in range(length)],
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "logprobs": 2,
            "return_token_ids": True,
        }
        if index % 2:
            body |= {"temperature": 0.8, "top_p": 0.95, "seed": index}
            if index % 4 == 3:
                body |= {"top_k": 40, "presence_penalty": 0.4, "repetition_penalty": 1.1}
        else:
            body["temperature"] = 0
        bodies.append(body)
    return bodies


async def _post(session: aiohttp.ClientSession, url: str, model: str, body: dict[str, Any]) -> Answer:
    async with session.post(f"{url}/v1/completions", json={"model": model, **body}) as response:
        result = await response.json()
        assert response.status == 200, result
    choice = result["choices"][0]
    logprobs = choice["logprobs"]
    return Answer(
        tuple(choice["token_ids"]),
        tuple(logprobs["token_logprobs"]),
        repr(logprobs["top_logprobs"]),
        choice["finish_reason"],
        repr(sorted((k, v) for k, v in result["usage"].items() if isinstance(v, int))),
    )


def ask(url: str, model: str, bodies: list[dict[str, Any]], *, concurrency: int) -> list[Answer]:
    """Send all bodies, at most ``concurrency`` at a time; answers in order."""

    async def all_of_them() -> list[Answer]:
        gate = asyncio.Semaphore(concurrency)
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=concurrency)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

            async def one(body: dict[str, Any]) -> Answer:
                async with gate:
                    return await _post(session, url, model, body)

            return list(await asyncio.gather(*(one(body) for body in bodies)))

    return asyncio.run(all_of_them())


def random_checkpoint(kind: str, folder: Path, *, layers: int = 2, dtype: str = "bfloat16") -> Path:
    """Random weights of architecture ``kind``, with the demo model's tokenizer and vocabulary."""
    tokenizer = ensure_demo_model(layers=SMALL_LAYERS)
    make_checkpoint(kind, folder, layers=layers, vocab=VOCABULARY, dtype=dtype)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


def differing(a: list[Answer], b: list[Answer]) -> list[int]:
    """Indexes of answers that are not identical."""
    return [index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
