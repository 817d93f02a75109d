"""Whatever happens to the workers, every text arrives: no token lost, repeated, or from a stale attempt.

A state machine plays workers that run what they are given, whose messages are on their way for a while, that
die, hang, return as ghosts and are drained, and clients that leave.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from tarragon.gateway.streams import Action, Fail, Send, Streams
from tarragon.gateway.wire import Abort, Add, Hold

WORKERS = ("aw-0", "aw-1", "aw-2")
WAIT_S = 50.0
FAILOVERS_MAX = 3
STEPS_TO_THE_END_MAX = 500
PROMPT = EngineCoreRequest("", [1, 2, 3], None, SamplingParams(seed=1), None, 0.0, None, None, None)
Batch = list[tuple[str, int, int, bool]]
"""One message: request, attempt, token, whether it is the last."""
workers = st.sampled_from(WORKERS)


def token(request_id: str, position: int) -> int:
    return int(request_id) * 1_000 + position


@dataclass
class Worker:
    running: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Attempt and position of each request."""
    on_the_way: deque[Batch] = field(default_factory=deque)


class Failover(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.stalls: list[float] = []
        self.streams = Streams(
            failovers_max=FAILOVERS_MAX,
            waiting_max=5,
            wait_s=WAIT_S,
            draw_seed=lambda: 1,
            on_stall=self.stalls.append,
        )
        self.workers: dict[str, Worker] = {}
        self.ghosts: list[tuple[str, Batch]] = []
        """Messages of workers that were given up, which might come all the same."""
        self.epochs = 0
        self.lengths: list[int] = []
        self.got: dict[str, list[int]] = {}
        self.attempts: dict[str, int] = {}
        self.deaths: dict[str, int] = {}
        """Workers lost under each request since its last token."""
        self.apart: set[str] = set()
        """Workers that are drained or have hung up."""
        self.ends: dict[str, str] = {}

    # ------------------------------------------------------------------ the world

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(worker=name, message=Add(attempt=attempt, request=request, sent=sent)):
                    request_id = request.request_id
                    assert name not in self.apart, "only who takes requests is given any"
                    assert sent == self.got[request_id], "it goes on behind what the client has"
                    assert attempt == self.attempts.get(request_id, 0) + 1
                    self.attempts[request_id] = attempt
                    self.workers[name].running[request_id] = (attempt, len(sent))
                case Send(worker=name, message=Hold(attempts=attempts) | Abort(attempts=attempts)):
                    for request_id, attempt in attempts.items():
                        if self.workers[name].running.get(request_id, (0, 0))[0] == attempt:
                            del self.workers[name].running[request_id]
                case Fail(request_id=request_id, harmful=harmful):
                    assert harmful == (self.deaths[request_id] > FAILOVERS_MAX)
                    self.end(request_id, "failed")

    def end(self, request_id: str, how: str) -> None:
        assert request_id not in self.ends, "it ends once"
        self.ends[request_id] = how

    def deliver(self, name: str, batch: Batch) -> int:
        """Let the gateway read one message; return how many of its outputs it accepted."""
        outputs = [
            EngineCoreOutput(request_id, [number], finish_reason=FinishReason.LENGTH if last else None)
            for request_id, _, number, last in batch
        ]
        attempts = {request_id: attempt for request_id, attempt, _, _ in batch}
        accepted = self.streams.accept(name, attempts, outputs, self.now_s)
        for output in accepted:
            self.got[output.request_id] += output.new_token_ids
            self.deaths[output.request_id] = 0
            if output.finish_reason is not None:
                self.end(output.request_id, "whole")
        self.perform(self.streams.due())
        return len(accepted)

    # ------------------------------------------------------------------ what may happen

    @rule(length=st.integers(1, 4))
    def request(self, length: int) -> None:
        request_id = str(len(self.lengths))
        self.lengths.append(length)
        self.got[request_id], self.deaths[request_id] = [], 0
        made = EngineCoreRequest(
            request_id, [1, 2, 3], None, PROMPT.sampling_params, None, 0.0, None, None, None
        )
        self.perform(self.streams.add(made, self.now_s))

    @rule(name=workers)
    def step(self, name: str) -> None:
        """A worker computes one token of each of its requests; they are on their way."""
        worker = self.workers.get(name)
        if worker is None or not worker.running:
            return
        batch: Batch = []
        for request_id, (attempt, position) in list(worker.running.items()):
            last = position + 1 == self.lengths[int(request_id)]
            batch.append((request_id, attempt, token(request_id, position), last))
            worker.running[request_id] = (attempt, position + 1)
            if last:
                del worker.running[request_id]
        worker.on_the_way.append(batch)

    @rule(name=workers)
    def read(self, name: str) -> None:
        worker = self.workers.get(name)
        if worker is not None and worker.on_the_way:
            self.deliver(name, worker.on_the_way.popleft())

    @rule(name=workers, reads_all=st.booleans())
    def lose(self, name: str, reads_all: bool) -> None:
        """A worker dies (what it sent is read to the end), or is given up as hung (the rest never is)."""
        if name not in self.workers:
            return
        while reads_all and self.workers[name].on_the_way:
            self.read(name)
        worker = self.workers.pop(name)
        self.ghosts += [(name, batch) for batch in worker.on_the_way]
        self.ghosts += [
            (name, [(request_id, attempt, token(request_id, position), False)])
            for request_id, (attempt, position) in worker.running.items()
        ]
        for stream in self.streams.live.values():
            self.deaths[stream.request_id] += stream.owner == name
        self.apart.discard(name)
        self.perform(self.streams.worker_down(name, "lost", self.now_s))
        self.streams.draining.discard(name)

    @rule(name=workers)
    def join(self, name: str) -> None:
        if name not in self.workers:
            self.epochs += 1
            self.workers[name] = Worker()
            self.perform(self.streams.worker_up(name, self.epochs, self.now_s))

    @rule(name=workers)
    def hang_up(self, name: str) -> None:
        if name in self.workers:
            self.apart.add(name)
            self.streams.closing(name)

    @rule(name=workers)
    def drain(self, name: str) -> None:
        if name in self.workers and name not in self.streams.draining:
            self.apart.add(name)
            self.perform(self.streams.drain(name, self.now_s))

    @precondition(lambda self: self.ghosts)
    @rule(data=st.data())
    def haunt(self, data: st.DataObject) -> None:
        """What a lost worker had still to say comes after all: nobody listens."""
        name, batch = data.draw(st.sampled_from(self.ghosts))
        assert self.deliver(name, batch) == 0

    @precondition(lambda self: self.streams.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.streams.live)))
        self.perform(self.streams.abort([request_id]))
        self.end(request_id, "aborted")

    @rule(seconds=st.floats(0.0, 30.0))
    def time(self, seconds: float) -> None:
        self.now_s += seconds
        self.perform(self.streams.expire(self.now_s))

    # ------------------------------------------------------------------ what must always hold

    @invariant()
    def texts_are_whole_or_a_beginning(self) -> None:
        for request_id, tokens in self.got.items():
            length = self.lengths[int(request_id)]
            expected = [token(request_id, position) for position in range(length)]
            if self.ends.get(request_id) == "whole":
                assert tokens == expected
            else:
                assert tokens == expected[: len(tokens)]

    @invariant()
    def every_request_is_live_or_has_ended(self) -> None:
        live = set(self.streams.live)
        assert live | set(self.ends) == set(self.got)
        assert not live & set(self.ends)

    @invariant()
    def everybody_knows_who_runs_what(self) -> None:
        owned: dict[str, set[str]] = {name: set() for name in self.workers}
        held: dict[str, set[str]] = {name: set() for name in self.workers}
        for stream in self.streams.live.values():
            assert (stream.owner is None) == (stream.request_id in self.streams.waiting)
            assert len(stream.origins) <= FAILOVERS_MAX
            if stream.owner is not None:
                owned[stream.owner].add(stream.request_id)
            assert not (stream.delivered and stream.held and stream.owner), "its rows are taken over"
            for name, _ in stream.held:
                held[name].add(stream.request_id)
        assert {name: set(load.running) for name, load in self.streams.loads.items()} == owned
        for name, worker in self.workers.items():
            assert set(worker.running) <= owned[name] | held[name], "nobody runs what nobody waits for"
            assert (name in self.streams.drained()) == (
                name in self.streams.draining and not owned[name] and not held[name]
            )

    @invariant()
    def suspects_run_alone(self) -> None:
        running = [s for s in self.streams.live.values() if s.is_suspect and s.owner is not None]
        assert len(running) <= 1
        if self.streams.takers and not running:
            assert not self.streams.waiting, "somebody could take them"

    def teardown(self) -> None:
        """Once the faults stop, everything ends, and nothing is left behind."""
        for name in list(self.workers):
            if name not in self.streams.takers:
                self.lose(name, True)
        for name in WORKERS:
            self.join(name)
        for _ in range(STEPS_TO_THE_END_MAX):
            if not self.streams.live:
                break
            for name in WORKERS:
                self.step(name)
                self.read(name)
        assert not self.streams.live
        assert all(load.tokens == 0 and not load.groups for load in self.streams.loads.values())
        assert not any(worker.running for worker in self.workers.values())
        assert len(self.ends) == self.streams.counters.requests


TestFailover = Failover.TestCase
TestFailover.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
