"""Live requests and who runs them: pure decisions, no sockets and no clock.

Events come in (a request, outputs, a worker that came or went, the time), actions go out. The gateway alone
assigns a request to an attention worker, and every assignment has an attempt number: outputs of another
attempt, or from another worker than the owner, are dropped and counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from tarragon.gateway.balance import Load, choose
from tarragon.gateway.wire import Abort, Add

GREEDY_TEMPERATURE_MAX = 1e-5
"""vLLM samples greedily below this temperature."""


@dataclass
class Stream:
    """One live request: all that is needed to run it again, or to go on with it, somewhere else."""

    request: EngineCoreRequest
    sent: list[int] = field(default_factory=list)
    """Tokens that have left for the client, in order."""
    attempt: int = 0
    """Number of the current assignment; grows with each."""
    owner: str | None = None
    """The worker that runs it now; None while it waits for one."""
    failovers: int = 0
    """Workers that were lost under it."""
    waits_until_s: float = 0.0
    """While it has no owner: when it is given up."""

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)


@dataclass(frozen=True)
class Send:
    """Give ``message`` to ``worker``."""

    worker: str
    message: Add | Abort


@dataclass(frozen=True)
class Fail:
    """End a request with an error that the client sees; the stream is gone already."""

    request_id: str
    message: str


Action = Send | Fail


@dataclass
class Counters:
    """Cumulative since the gateway started."""

    requests: int = 0
    restarts: int = 0
    """Requests given to another worker after theirs was lost."""
    failed: int = 0
    """Requests that ended with an error of the gateway's own."""
    outputs_stale: int = 0
    """Outputs dropped because they belong to an older attempt or another owner."""
    outputs_unknown: int = 0
    """Outputs dropped because the request has ended: aborts cross the last outputs on their way."""


class Streams:
    """All live requests of one gateway."""

    def __init__(
        self, *, failovers_max: int, waiting_max: int, wait_s: float, draw_seed: Callable[[], int]
    ) -> None:
        self.live: dict[str, Stream] = {}
        self.loads: dict[str, Load] = {}
        """Connected workers."""
        self.draining: set[str] = set()
        """Workers that finish what they have and get nothing new."""
        self.waiting: dict[str, Stream] = {}
        """Streams without an owner, the oldest first."""
        self.counters = Counters()
        self._failovers_max = failovers_max
        self._waiting_max = waiting_max
        self._wait_s = wait_s
        self._draw_seed = draw_seed

    @property
    def takers(self) -> dict[str, Load]:
        """Connected workers that take new requests."""
        return {worker: load for worker, load in self.loads.items() if worker not in self.draining}

    def drained(self) -> set[str]:
        """Return the draining workers that have nothing left to do."""
        return {
            worker for worker in self.draining if worker not in self.loads or not self.loads[worker].running
        }

    # ------------------------------------------------------------------ events

    def add(self, request: EngineCoreRequest, now_s: float) -> list[Action]:
        """Take over a new request."""
        assert request.request_id not in self.live, request.request_id
        self.counters.requests += 1
        stream = Stream(with_seed(request, self._draw_seed))
        self.live[request.request_id] = stream
        return self._assign(stream, now_s)

    def abort(self, request_ids: Iterable[str]) -> list[Action]:
        """Forget requests that nobody waits for any more; unknown ones are ignored."""
        by_worker: dict[str, dict[str, int]] = {}
        for request_id in request_ids:
            stream = self.live.get(request_id)
            if stream is None:
                continue
            self._forget(stream)
            if stream.owner is not None:
                by_worker.setdefault(stream.owner, {})[request_id] = stream.attempt
        return [Send(worker, Abort(attempts)) for worker, attempts in by_worker.items()]

    def accept(
        self, worker: str, attempts: Mapping[str, int], outputs: Sequence[EngineCoreOutput]
    ) -> list[EngineCoreOutput]:
        """Return those outputs of ``worker`` that may reach the client; they count as sent."""
        return [output for output in outputs if self._accepts(worker, attempts, output)]

    def worker_up(self, worker: str, now_s: float) -> list[Action]:
        """A worker takes requests from now on; those that wait are shared out."""
        assert worker not in self.loads, worker
        self.loads[worker] = Load()
        waiting = list(self.waiting.values())
        self.waiting.clear()
        return [action for stream in waiting for action in self._assign(stream, now_s)]

    def worker_down(self, worker: str, cause: str, now_s: float) -> list[Action]:
        """A worker is lost, with everything it was doing; unknown ones are ignored."""
        if self.loads.pop(worker, None) is None:
            return []
        orphans = [stream for stream in self.live.values() if stream.owner == worker]
        return [action for stream in orphans for action in self._recover(stream, worker, cause, now_s)]

    def expire(self, now_s: float) -> list[Action]:
        """Give up requests that have waited too long for a worker."""
        late = [stream for stream in self.waiting.values() if stream.waits_until_s <= now_s]
        why = f"no attention worker became available within {self._wait_s:g} s"
        return [self._fail(stream, why) for stream in late]

    def shut(self, why: str) -> list[Action]:
        """Give up everything."""
        return [self._fail(stream, why) for stream in list(self.live.values())]

    # ------------------------------------------------------------------ decisions

    def _recover(self, stream: Stream, worker: str, cause: str, now_s: float) -> list[Action]:
        """Decide what becomes of a request whose worker is lost.

        One of which no token was sent starts again elsewhere: with its seed in the request, its text is
        the one it would have been. One that has sent tokens can only go on where its state is.
        """
        stream.owner = None
        stream.failovers += 1
        if stream.failovers > self._failovers_max:
            return [self._fail(stream, f"{stream.failovers} attention workers were lost under this request")]
        if stream.sent:
            lost = f"attention worker {worker} was lost ({cause})"
            return [self._fail(stream, f"{lost} after {len(stream.sent)} tokens of this text")]
        self.counters.restarts += 1
        return self._assign(stream, now_s, avoid=[worker])

    def _assign(self, stream: Stream, now_s: float, avoid: Iterable[str] = ()) -> list[Action]:
        request_id = stream.request.request_id
        worker = choose(self.takers, request_id, stream.prompt_tokens, avoid)
        if worker is None:
            return self._wait(stream, now_s)
        stream.attempt += 1
        stream.owner = worker
        self.loads[worker].add(request_id, stream.prompt_tokens)
        return [Send(worker, Add(stream.attempt, stream.request))]

    def _wait(self, stream: Stream, now_s: float) -> list[Action]:
        if len(self.waiting) >= self._waiting_max:
            return [
                self._fail(stream, "no attention worker is available, and too many requests wait for one")
            ]
        stream.waits_until_s = now_s + self._wait_s
        self.waiting[stream.request.request_id] = stream
        return []

    def _accepts(self, worker: str, attempts: Mapping[str, int], output: EngineCoreOutput) -> bool:
        stream = self.live.get(output.request_id)
        if stream is None:
            self.counters.outputs_unknown += 1
            return False
        if stream.owner != worker or stream.attempt != attempts[output.request_id]:
            self.counters.outputs_stale += 1
            return False
        if output.new_token_ids and not stream.sent:
            self.loads[worker].first_token(output.request_id)
        stream.sent.extend(output.new_token_ids)
        if output.finish_reason is not None:
            self._forget(stream)
        return True

    def _fail(self, stream: Stream, message: str) -> Fail:
        self.counters.failed += 1
        self._forget(stream)
        return Fail(stream.request.request_id, message)

    def _forget(self, stream: Stream) -> None:
        request_id = stream.request.request_id
        del self.live[request_id]
        self.waiting.pop(request_id, None)
        if stream.owner in self.loads:
            self.loads[stream.owner].remove(request_id)


def with_seed(request: EngineCoreRequest, draw: Callable[[], int]) -> EngineCoreRequest:
    """Return the request with a seed if it samples without one, so that any worker continues it alike.

    Children of one request share their parameters, so these are copied: each child gets its own seed.
    """
    params: Any = request.sampling_params
    assert params is not None, "only text generation reaches the gateway's client"
    if params.seed is not None or params.temperature < GREEDY_TEMPERATURE_MAX:
        return request
    params = copy.copy(params)
    params.seed = draw()
    seeded = copy.copy(request)
    seeded.sampling_params = params
    return seeded
