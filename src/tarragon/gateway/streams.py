"""Live requests and who runs them: pure decisions, no sockets and no clock.

Events come in (a request, outputs, a worker that came or went, the time), actions go out. The gateway alone
assigns a request to an attention worker, and every assignment has an attempt number: outputs of another
attempt, or from another worker than the owner, are dropped and counted. So a request goes over to another
worker (6.2) at the moment its old attempt is sealed: what was accepted until then counts as sent, and
nothing that comes later from there is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from tarragon.gateway.balance import Load, choose
from tarragon.gateway.continuing import as_continuation, for_another_worker, with_seed
from tarragon.gateway.watcher import Watcher
from tarragon.gateway.wire import Abort, Add, Hold, Origin, Resumed

SUSPECT_DEATHS: Final = 2
"""So many workers lost under a request without a token in between make it a suspect: it may be the cause."""


@dataclass
class Stream:
    """One live request: all that is needed to go on with it somewhere else."""

    request: EngineCoreRequest
    sent: list[int] = field(default_factory=list)
    """Tokens that have left for the client, in order."""
    attempt: int = 0
    """Number of the current assignment; grows with each."""
    owner: str | None = None
    """The worker that runs it now; None while it waits for one."""
    delivered: bool = False
    """Whether a token of the current attempt has been sent."""
    origins: list[Origin] = field(default_factory=list)
    """Earlier attempts, newest first, back to the last one that delivered a token; its rows are theirs."""
    held: list[tuple[str, int]] = field(default_factory=list)
    """Sealed attempts at living workers, (worker, attempt): kept there until their rows were taken over."""
    failovers: int = 0
    """Workers that were lost under it without a token in between."""
    lost_s: float | None = None
    """When its worker was lost, until the next token."""
    waits_until_s: float = 0.0
    """While it has no owner: when it is given up."""

    @property
    def request_id(self) -> str:
        return str(self.request.request_id)

    @property
    def tokens(self) -> int:
        """Prompt and text so far: what a worker without its rows has to compute."""
        return len(self.request.prompt_token_ids) + len(self.sent)

    @property
    def is_suspect(self) -> bool:
        return self.failovers >= SUSPECT_DEATHS


@dataclass(frozen=True)
class Send:
    """Give ``message`` to ``worker``."""

    worker: str
    message: Add | Hold | Abort


@dataclass(frozen=True)
class Fail:
    """End a request with an error that the client sees; the stream is gone already.

    ``harmful``: it should not be tried again.
    """

    request_id: str
    message: str
    harmful: bool = False


Action = Send | Fail


@dataclass
class Counters:
    """Cumulative since the gateway started."""

    requests: int = 0
    restarts: int = 0
    """Requests given to another worker after theirs was lost."""
    moved: int = 0
    """Requests given to another worker because theirs is drained, or is to run a suspect alone."""
    failed: int = 0
    """Requests that ended with an error of the gateway's own."""
    outputs_stale: int = 0
    """Outputs dropped because they belong to an older attempt or another owner."""
    outputs_unknown: int = 0
    """Outputs dropped because the request has ended: aborts cross the last outputs on their way."""
    frames_malformed: int = 0
    """Messages of the orchestrator that are none."""
    failovers: Counter[str] = field(default_factory=Counter)
    """Workers lost, by the kind of cause."""


class Streams:
    """All live requests of one gateway."""

    def __init__(
        self,
        *,
        failovers_max: int,
        waiting_max: int,
        wait_s: float,
        draw_seed: Callable[[], int],
        on_stall: Callable[[float], None] = lambda _seconds: None,
        watcher: Watcher | None = None,
    ) -> None:
        """``on_stall`` is told, at the first token after a loss, the seconds since the loss was noticed."""
        self.live: dict[str, Stream] = {}
        self.loads: dict[str, Load] = {}
        """Connected workers."""
        self.draining: set[str] = set()
        """Workers that get nothing new because they are to be stopped."""
        self.waiting: dict[str, Stream] = {}
        """Streams without an owner, the oldest first."""
        self.counters = Counters()
        self._epochs: dict[str, int] = {}
        self._closing: set[str] = set()
        self._held: dict[str, set[str]] = {}
        """Requests with a sealed attempt at each worker."""
        self._alone: str | None = None
        """The suspect that runs: one at a time, and apart from all others, so that they are not lost with
        it."""
        self._aborts: dict[str, dict[str, int]] = {}
        """Attempts to be aborted, by worker, with the next ``due``."""
        self._failovers_max = failovers_max
        self._waiting_max = waiting_max
        self._wait_s = wait_s
        self._draw_seed = draw_seed
        self._on_stall = on_stall
        self._watcher = watcher or Watcher()

    @property
    def takers(self) -> dict[str, Load]:
        """Connected workers that take requests: the one that runs a suspect only if there is no other."""
        apart = self.draining | self._closing
        takers = {worker: load for worker, load in self.loads.items() if worker not in apart}
        suspect = None if self._alone is None else self.live[self._alone].owner
        return {worker: load for worker, load in takers.items() if worker != suspect} or takers

    def owes(self, worker: str) -> bool:
        """Whether outputs of a worker are waited for."""
        return worker in self.loads and bool(self.loads[worker].running)

    def drained(self) -> set[str]:
        """Return the draining workers that have nothing left to do, for others neither."""
        return {worker for worker in self.draining if not self.owes(worker) and not self._held.get(worker)}

    # ------------------------------------------------------------------ events

    def add(self, request: EngineCoreRequest, now_s: float) -> list[Action]:
        """Take over a new request."""
        assert request.request_id not in self.live, request.request_id
        self.counters.requests += 1
        stream = Stream(with_seed(request, self._draw_seed))
        self.live[stream.request_id] = stream
        self._watcher.began(stream)
        return self._assign(stream, now_s)

    def abort(self, request_ids: Iterable[str]) -> list[Action]:
        """Forget requests that nobody waits for any more; unknown ones are ignored."""
        for request_id in request_ids:
            stream = self.live.get(request_id)
            if stream is not None:
                if stream.owner is not None:
                    self._aborts.setdefault(stream.owner, {})[request_id] = stream.attempt
                self._forget(stream, "abort")
        return self.due()

    def accept(
        self,
        worker: str,
        attempts: Mapping[str, int],
        outputs: Sequence[EngineCoreOutput],
        now_s: float,
        resumed: Mapping[str, Resumed] = {},
    ) -> list[EngineCoreOutput]:
        """Return those outputs of ``worker`` that may reach the client; they count as sent.

        Then call ``due``.
        """
        return [output for output in outputs if self._accepts(worker, attempts, output, now_s, resumed)]

    def due(self) -> list[Action]:
        """Return what outputs or ends have made possible: aborts of old attempts, the next suspect's turn."""
        actions: list[Action] = [Send(worker, Abort(attempts)) for worker, attempts in self._aborts.items()]
        self._aborts = {}
        if self._alone is None and self.waiting and self.takers:
            suspect = next((stream for stream in self.waiting.values() if stream.is_suspect), None)
            if suspect is not None:
                actions += self._assign(suspect, 0.0)
        return actions

    def worker_up(self, worker: str, epoch: int, now_s: float) -> list[Action]:
        """A worker takes requests from now on; those that wait are shared out."""
        assert worker not in self.loads, worker
        self.loads[worker] = Load()
        self._epochs[worker] = epoch
        return [action for stream in list(self.waiting.values()) for action in self._assign(stream, now_s)]

    def closing(self, worker: str) -> None:
        """A worker has hung up: what it sent before is still to be read, but it gets nothing new."""
        if worker in self.loads:
            self._closing.add(worker)

    def worker_down(self, worker: str, cause: str, now_s: float, kind: str = "closed") -> list[Action]:
        """A worker is lost, and nothing more is read from it: all that it ran goes over to others.

        ``kind`` is the cause in one word, of a small set. An unknown worker is ignored.
        """
        if self.loads.pop(worker, None) is None:
            return []
        self.counters.failovers[kind] += 1
        self._closing.discard(worker)
        self._aborts.pop(worker, None)
        for request_id in self._held.pop(worker, ()):
            stream = self.live[request_id]
            stream.held = [(holder, attempt) for holder, attempt in stream.held if holder != worker]
        orphans = [stream for stream in self.live.values() if stream.owner == worker]
        actions = [action for stream in orphans for action in self._recover(stream, kind, cause, now_s)]
        del self._epochs[worker]
        return actions + self.due()

    def drain(self, worker: str, now_s: float) -> list[Action]:
        """Give a worker nothing new, and what it runs to others; if there are none it ends what it has.

        Its attempts are sealed at once, but held until the new ones deliver: a request that ended would
        give back the room of the rows that are being taken over.
        """
        self.draining.add(worker)
        if not self.takers:
            return []
        running = [stream for stream in self.live.values() if stream.owner == worker]
        return [action for stream in running for action in self._move(stream, now_s)]

    def expire(self, now_s: float) -> list[Action]:
        """Give up requests that have waited too long for a worker."""
        late = [stream for stream in self.waiting.values() if stream.waits_until_s <= now_s]
        return [*(self._fail(stream, self._why_late(stream)) for stream in late), *self.due()]

    def shut(self, why: str) -> list[Action]:
        """Give up everything."""
        return [self._fail(stream, why) for stream in list(self.live.values())]

    # ------------------------------------------------------------------ decisions

    def _recover(self, stream: Stream, kind: str, cause: str, now_s: float) -> list[Action]:
        """Decide what becomes of a request whose worker is lost."""
        worker = stream.owner
        assert worker is not None
        self._watcher.lost(stream, kind, cause)
        self._seal(stream)
        stream.failovers += 1
        if stream.lost_s is None:
            stream.lost_s = now_s
        if stream.failovers > self._failovers_max:
            deaths = f"{stream.failovers} attention workers were lost under this request"
            why = f"{deaths} without a token in between, the last one {worker} ({cause}): it is given up"
            return [self._fail(stream, why, harmful=True)]
        self.counters.restarts += 1
        return self._assign(stream, now_s, avoid=[worker])

    def _move(self, stream: Stream, now_s: float) -> list[Action]:
        """Give a request of a living worker to another one."""
        worker = stream.owner
        assert worker is not None
        self._held.setdefault(worker, set()).add(stream.request_id)
        stream.held.append((worker, stream.attempt))
        hold = Send(worker, Hold({stream.request_id: stream.attempt}))
        self.loads[worker].remove(stream.request_id)
        why = "is drained" if worker in self.draining else "is to run a suspect alone"
        self._watcher.lost(stream, "drained", f"{worker} {why}")
        self._seal(stream)
        self.counters.moved += 1
        return [hold, *self._assign(stream, now_s)]

    def _seal(self, stream: Stream) -> None:
        """End the current attempt: nothing more of it is accepted, but its rows may be taken over."""
        assert stream.owner is not None
        attempt = Origin(stream.owner, self._epochs[stream.owner], stream.attempt)
        stream.origins = [attempt, *stream.origins][: max(1, self._failovers_max)]
        stream.owner = None
        self._watcher.sealed(stream)
        if self._alone == stream.request_id:
            self._alone = None

    def _assign(self, stream: Stream, now_s: float, avoid: Iterable[str] = ()) -> list[Action]:
        if stream.is_suspect and self._alone is not None:
            return self._wait(stream, now_s)
        holders = (holder for holder, _ in stream.held)
        worker = choose(self.takers, stream.request_id, stream.tokens, [*avoid, *holders])
        if worker is None:
            return self._wait(stream, now_s)
        self.waiting.pop(stream.request_id, None)
        if stream.is_suspect:
            self._alone = stream.request_id
        stream.attempt += 1
        stream.owner = worker
        stream.delivered = False
        self.loads[worker].add(stream.request_id, stream.tokens)
        self._watcher.assigned(stream, self._epochs[worker])
        moved = self._clear_for_suspect(worker, now_s) if stream.is_suspect else []
        request, origins = for_another_worker(stream.request, stream.sent, self._origins_of(stream))
        return [*moved, Send(worker, Add(stream.attempt, request, list(stream.sent), origins))]

    def _origins_of(self, stream: Stream) -> list[Origin]:
        """Where its rows may be: a living worker's bucket must not be sealed, others' requests are in it."""
        living = {(name, self._epochs[name]) for name in self.loads if name not in self._closing}
        return [
            msgspec.structs.replace(origin, living=(origin.worker_id, origin.epoch) in living)
            for origin in stream.origins
        ]

    def _clear_for_suspect(self, worker: str, now_s: float) -> list[Action]:
        """Give what else a suspect's worker runs to the others, if there are any."""
        if worker in self.takers:
            return []
        others = [s for s in self.live.values() if s.owner == worker and s.request_id != self._alone]
        return [action for stream in others for action in self._move(stream, now_s)]

    def _wait(self, stream: Stream, now_s: float) -> list[Action]:
        if stream.request_id in self.waiting:
            return []  # it keeps its place and its time
        # Requests that have begun are as many as may be live; the bound is for those that come.
        if stream.attempt == 0 and len(self.waiting) >= self._waiting_max:
            return [
                self._fail(stream, "no attention worker is available, and too many requests wait for one")
            ]
        stream.waits_until_s = now_s + self._wait_s
        self.waiting[stream.request_id] = stream
        return []

    def _why_late(self, stream: Stream) -> str:
        if not (stream.is_suspect and self.takers):
            return f"no attention worker became available within {self._wait_s:g} s"
        return (
            f"{stream.failovers} attention workers were lost under this request without a token in between; "
            f"it was to be tried alone, and its turn did not come within {self._wait_s:g} s"
        )

    def _accepts(
        self,
        worker: str,
        attempts: Mapping[str, int],
        output: EngineCoreOutput,
        now_s: float,
        resumed: Mapping[str, Resumed],
    ) -> bool:
        stream = self.live.get(output.request_id)
        if stream is None:
            self.counters.outputs_unknown += 1
            return False
        if stream.owner != worker or stream.attempt != attempts[output.request_id]:
            self.counters.outputs_stale += 1
            return False
        if stream.attempt > 1:
            as_continuation(output, anew=not stream.sent)
        if output.new_token_ids and not stream.delivered:
            self._first_token(stream, worker, now_s, resumed.get(stream.request_id))
        stream.sent.extend(output.new_token_ids)
        if output.finish_reason is not None:
            self._forget(stream, str(output.finish_reason))
        return True

    def _first_token(self, stream: Stream, worker: str, now_s: float, resumed: Resumed | None) -> None:
        """The current attempt delivers: it is no suspect, and older attempts are of no use any more."""
        stream.delivered = True
        self._watcher.delivered(stream, resumed)
        stream.failovers = 0
        stream.origins = []
        self._release(stream)
        if self._alone == stream.request_id:
            self._alone = None
        if stream.lost_s is not None:
            self._on_stall(now_s - stream.lost_s)
            stream.lost_s = None
        self.loads[worker].first_token(stream.request_id)

    def _release(self, stream: Stream) -> None:
        """Let living workers forget its sealed attempts."""
        for worker, attempt in stream.held:
            # A worker has one attempt of a request: if that is a newer one, it is the one to abort.
            self._aborts.setdefault(worker, {}).setdefault(stream.request_id, attempt)
            self._held[worker].discard(stream.request_id)
        stream.held = []

    def _fail(self, stream: Stream, message: str, *, harmful: bool = False) -> Fail:
        self.counters.failed += 1
        self._forget(stream, "error", message)
        return Fail(stream.request_id, message, harmful)

    def _forget(self, stream: Stream, outcome: str, error: str = "") -> None:
        del self.live[stream.request_id]
        self._watcher.ended(stream, outcome, error)
        self.waiting.pop(stream.request_id, None)
        if self._alone == stream.request_id:
            self._alone = None
        self._release(stream)
        if stream.owner in self.loads:
            self.loads[stream.owner].remove(stream.request_id)
