"""The open load against a small server of its own: arrivals, token times, errors, replays."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from tarragon.bench import load as asking
from tarragon.bench import poisson, timeline
from tarragon.bench.load import LoadError
from tarragon.bench.poisson import PoissonLoad
from tarragon.bench.timeline import Trace
from tarragon.bench.workloads import Workload

WORKLOAD = Workload(seed=1, vocabulary=1_000, output_tokens=6)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def tokens_of(body: dict[str, Any]) -> list[int]:
    """What the fake model answers: a function of the prompt."""
    return [sum(body["prompt"]) + i for i in range(body["max_tokens"])]


def answering(pause_s: float = 0.0, break_at: Callable[[], int | None] = lambda: None) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        tokens = tokens_of(body)
        for position, token in enumerate(tokens):
            if position == break_at():
                assert request.transport is not None
                request.transport.abort()
                return response
            last = position == len(tokens) - 1
            choice = {
                "text": f"{token} ",
                "token_ids": [token],
                "finish_reason": "length" if last else None,
            }
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            await asyncio.sleep(pause_s)
        await response.write(b"data: [DONE]\n\n")
        return response

    return answer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - conditions of all kinds
            await asyncio.sleep(0.001)


def test_a_request_is_the_same_whenever_it_is_asked_for() -> None:
    assert WORKLOAD.body(3) == WORKLOAD.body(3)
    assert WORKLOAD.body(3)["prompt"] != WORKLOAD.body(4)["prompt"]
    assert len(WORKLOAD.body(3)["prompt"]) == 10
    assert WORKLOAD.body(4)["temperature"] == 0
    assert WORKLOAD.body(3)["seed"] == 3


def test_every_token_of_every_stream_is_timed() -> None:
    async def run() -> tuple[PoissonLoad, float]:
        async with serving(answering(pause_s=0.02)) as url:
            load = PoissonLoad(WORKLOAD, url, "m", rate_per_s=50.0)
            began_s = time.monotonic()
            running = asyncio.create_task(load.run())
            await asyncio.sleep(0.5)
            await until(lambda: len(load.traces) >= 10)
            load.stop()
            arriving_s = time.monotonic() - began_s
            async with asyncio.timeout(10):
                await running
            return load, arriving_s

    load, arriving_s = asyncio.run(run())
    rng = random.Random("arrivals/1/0")
    planned_s = itertools.accumulate(rng.expovariate(50.0) for _ in itertools.count())
    planned = sum(1 for _ in itertools.takewhile(lambda due_s: due_s <= arriving_s, planned_s))
    assert 10 <= len(load.traces) <= planned  # 25 are expected in half a second
    assert timeline.failed(load.traces, WORKLOAD.output_tokens) == {}
    for trace in load.traces:
        assert trace.tokens == tokens_of(WORKLOAD.body(trace.index))
        assert all(gap_s > 0 for gap_s in trace.gaps_s)
        assert trace.due_s <= trace.times_s[0] <= (trace.ended_s or 0.0)
    # Of the median only: where the reader is paused, some streams' first tokens are read late.
    assert statistics.median(trace.times_s[-1] - trace.times_s[0] for trace in load.traces) >= 0.09


def test_arrivals_are_those_of_a_poisson_process() -> None:
    async def run() -> list[float]:
        async with serving(answering()) as url:
            load = PoissonLoad(WORKLOAD, url, "m", rate_per_s=100.0)
            running = asyncio.create_task(load.run())
            await asyncio.sleep(0.4)
            load.stop()
            await running
            return [trace.due_s for trace in load.traces]

    due_s = asyncio.run(run())
    rng = random.Random("arrivals/1/0")
    planned = [rng.expovariate(100.0) for _ in due_s]
    assert [b - a for a, b in itertools.pairwise(due_s)] == pytest.approx(planned[1:], abs=1e-6)


def test_a_lost_stream_stays_lost_without_replay() -> None:
    async def run() -> list[str]:
        async with serving(answering(break_at=lambda: 3)) as url:
            found = await asking.closed_loop(WORKLOAD, url, "m", range(3), 2)
            return [trace.error for trace in found]

    assert all(asyncio.run(run()))


def test_a_replay_waits_for_the_server_and_goes_on_where_it_was_read() -> None:
    broken = True

    async def run() -> list[Trace]:
        nonlocal broken
        handler = answering(pause_s=0.01, break_at=lambda: 3 if broken else None)
        async with serving(handler) as url:
            load = PoissonLoad(WORKLOAD, url, "m", rate_per_s=40.0, replay=True)
            # The server "goes down" for all who are at their fourth token.
            running = asyncio.create_task(load.run())

            def before_it() -> list[Trace]:
                return [trace for trace in load.traces if 0 < len(trace.tokens) < 3 and not trace.error]

            await until(lambda: bool(before_it()))
            load.down()
            replayed = before_it()
            await until(lambda: all(trace.attempts > 1 for trace in replayed))
            await asyncio.sleep(0.1)
            broken = False
            load.up(url)
            load.stop()
            async with asyncio.timeout(10):
                await running
            return replayed

    for trace in asyncio.run(run()):
        assert trace.tokens == tokens_of(WORKLOAD.body(trace.index))
        assert max(gap.length_s for gap in timeline.gaps([trace], 0.0)) > 0.05
        assert trace.text == "".join(f"{token} " for token in trace.tokens)


def test_a_load_that_piles_up_ends_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poisson, "REQUESTS_LIVE_MAX", 3)

    async def run() -> None:
        async with serving(answering(pause_s=5.0)) as url:
            async with asyncio.timeout(10):
                await PoissonLoad(WORKLOAD, url, "m", rate_per_s=200.0).run()

    with pytest.raises(LoadError, match="3 requests are in flight"):
        asyncio.run(run())


def test_an_error_in_the_stream_is_an_error_of_the_request() -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, text="no expert")

    async def run() -> float:
        async with serving(refuse) as url:
            return await asking.capacity_tokens_per_s(WORKLOAD, url, "m", range(2), 2)

    with pytest.raises(LoadError, match="HTTP 503: no expert"):
        asyncio.run(run())
