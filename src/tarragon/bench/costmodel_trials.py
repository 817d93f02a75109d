"""What `tarragon bench costmodel` measures on a cluster: the constants of 2.2.2, and the stalls of kills."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import statistics
import time
from pathlib import Path
from typing import Any, Final

import aiohttp

from tarragon.bench import startup
from tarragon.bench.faults import Victim, choose_victim, inject, recovered
from tarragon.bench.load import LoadError, fail_on_error, read_stream, session
from tarragon.bench.owners import held_by
from tarragon.bench.restore import _difference, _restored
from tarragon.bench.timeline import Trace, gaps
from tarragon.bench.workloads import Workload, random_workload
from tarragon.cluster import Cluster
from tarragon.costmodel import Profile
from tarragon.models.shape import read_model

WARM_TOKENS: Final = 32
PREFILLS: Final = 3
AFTER_TOKENS: Final = 32
"""Read after the failure, so that the stream is seen to go on."""
RECOVERY_TIMEOUT_S: Final = 180.0
RESEND_S: Final = 0.05
"""A client whose stream was broken off sends its request again after this."""
REPORTED_S: Final = 2.5
"""Workers report their counters every second."""
_POLL_S: Final = 0.001


class Streams:
    """One stream at a time on one cluster; no two ask for the same, so that no cache helps."""

    def __init__(self, cluster: Cluster, model: Path, prompt_tokens: int, seed: int) -> None:
        self.cluster, self.name = cluster, model.name
        self.layers = read_model(model).layers
        workload = random_workload(model, seed=seed, greedy=True)
        self._workload: Workload = dataclasses.replace(workload, prompt_tokens=prompt_tokens)
        self._next = 0

    def body(self, output_tokens: int) -> tuple[int, dict[str, Any]]:
        """The number and the body of the next request."""
        self._next += 1
        return self._next, self._workload.body(self._next) | {"max_tokens": output_tokens}

    async def read(self, output_tokens: int) -> Trace:
        index, body = self.body(output_tokens)
        trace = Trace(index, time.monotonic())
        async with session() as client:
            await read_stream(client, self.cluster.url, self.name, body, trace)
        fail_on_error([trace])
        return trace


def profile(streams: Streams, starts: int) -> tuple[dict[str, Profile], dict[str, list[float]]]:
    """The constants by role: t_pre and t_dec of a stream alone, T_w of a worker that nobody uses.

    T_w is the median of ``starts``; these are returned as well, by role, in seconds.
    """
    asyncio.run(streams.read(WARM_TOKENS))
    first_s, gaps_s = [], []
    for _ in range(PREFILLS):
        trace = asyncio.run(streams.read(WARM_TOKENS))
        first_s.append(trace.times_s[0] - trace.due_s)
        gaps_s += [gap.length_s for gap in gaps([trace], trace.times_s[-1])]
    prefill_s = statistics.median(first_s) / streams.layers
    decode_s = statistics.median(gaps_s) / streams.layers
    starts_s = {
        role: [startup.replace(streams.cluster, role) for _ in range(starts)] for role in startup.ROLES
    }
    constants = {
        # As GPU-time: the seconds of one worker.
        role: Profile(statistics.median(found), prefill_s, decode_s, prefill_s, decode_s)
        for role, found in starts_s.items()
    }
    return constants, starts_s


async def restore_s_per_row(streams: Streams, point: int) -> float:
    """Seconds to restore one position, from a kill of its own. Raises LoadError if nothing was restored."""
    found = await kill(streams, "attention", point)
    if not found["restored_positions"]:
        raise LoadError("a stream was not restored from its checkpoint")
    return found["restore_s"] / found["restored_positions"]


async def kill(streams: Streams, role: str, point: int) -> dict[str, float]:
    """Kill a worker under a stream that has ``point`` tokens; what its reader saw, and what was restored.

    An attention worker is the one that holds the stream. A stream that breaks off is asked for again, from
    its prompt. Raises LoadError if it does not come to its end, FaultError if the kill has no effect.
    """
    cluster = streams.cluster
    before = await asyncio.to_thread(_restored, cluster)
    index, body = streams.body(point + AFTER_TOKENS)
    trace = Trace(index, time.monotonic())
    async with session() as client:
        reading = asyncio.create_task(_to_the_end(client, streams, body, trace))
        await _tokens(trace, 1, reading)
        victim = await _victim(streams, role, index)
        await _tokens(trace, point, reading)
        fault_s, _ = await asyncio.to_thread(inject, cluster, victim, "KILL")
        await reading
    await recovered(cluster, victim, RECOVERY_TIMEOUT_S)
    await asyncio.sleep(REPORTED_S)
    done = _difference(before, await asyncio.to_thread(_restored, cluster))
    found = gaps([trace], trace.times_s[-1])
    usual_s = statistics.median(gap.length_s for gap in found if gap.end_s <= fault_s)
    after = [gap for gap in found if gap.end_s > fault_s]
    if not after:
        raise LoadError(f"the stream ended before {victim.worker_id} was killed")
    largest = max(after, key=lambda gap: gap.length_s)
    return {
        "token": float(sum(at <= fault_s for at in trace.times_s)),
        "rows": float(len(body["prompt"])) + sum(at <= fault_s for at in trace.times_s),
        "stall_s": largest.length_s - usual_s,
        "stall_starts_s": largest.start_s - fault_s,
        "attempts": float(trace.attempts),
        "restore_s": done["restore_s"],
        "restored_positions": done["restored_positions"],
    }


async def _victim(streams: Streams, role: str, index: int) -> Victim:
    """Who is to be killed: the holder of stream ``index``, or any expert worker. Raises FaultError."""
    workers = (await asyncio.to_thread(streams.cluster.status))["workers"]
    if role == "attention":
        ids = [str(worker["id"]) for worker in workers if worker["role"] == role]
        held = [name for name in ids if index in await held_by(streams.cluster.url, name)]
        workers = [worker for worker in workers if worker["id"] in held]
    return choose_victim({"workers": workers}, role, random.Random(index))


async def _tokens(trace: Trace, count: int, reading: asyncio.Task[None]) -> None:
    """Wait until the stream has so many tokens, or has ended."""
    while len(trace.tokens) < count and not (await asyncio.wait({reading}, timeout=_POLL_S))[0]:
        pass


async def _to_the_end(
    client: aiohttp.ClientSession, streams: Streams, body: dict[str, Any], trace: Trace
) -> None:
    deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
    while True:
        await read_stream(client, streams.cluster.url, streams.name, body, trace)
        if trace.finish_reason is not None:
            return
        if time.monotonic() > deadline_s:
            raise LoadError(f"the stream did not come to its end: {trace.error}")
        trace.attempts += 1
        await asyncio.sleep(RESEND_S)
