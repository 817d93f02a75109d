"""The orchestrator's own probes: who hangs is found, suspected or idle, and who answers is cleared."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from tarragon.boot import Boot
from tarragon.config import Config
from tarragon.messages import Hello, Peer, Ready, Suspicion
from tarragon.orchestrator.actions import Verify
from tarragon.orchestrator.membership import Membership, Worker
from tarragon.orchestrator.probing import Prober, _Target
from tarragon.orchestrator.suspicions import judge
from tarragon.testing.ends import SECRET, WAIT_S, answer_probes, new_address, process, stop
from tarragon.transport.probe import ANSWER, PROBE_FRAME_BYTES, ProbeChannel, pack_probe

CONFIG = Config(
    probe_silence_ms=20.0,
    probe_interval_ms=20.0,
    probe_misses_max=4,
    worker_probe_interval_ms=150.0,
    worker_probe_timeout_ms=5_000.0,
    expert_batch_ms_max=20_000.0,
)
"""A suspect is given up after 100 ms of silence, anybody else after 5 s. Every miss needs a tick of its own:
on a busy machine either may take longer, and the one does not come to look like the other."""
EPOCH = 5


@dataclass
class Seen:
    """What the prober told, and when (s since the start)."""

    answers: list[float] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)


class Bench:
    """A prober that ticks, and one worker process."""

    def __init__(self, pid: int, address: str, role: str = "expert", config: Config = CONFIG) -> None:
        self.pid, self.seen = pid, Seen()
        self.start_s = time.monotonic()
        boot = Boot(
            cluster="t",
            secret=SECRET,
            worker_id="orchestrator",
            role="orchestrator",
            epoch=1,
            model="",
            config=config,
        )
        self.prober = Prober(
            boot,
            lambda worker_id, epoch: self.seen.answers.append(self.now_s()),
            lambda worker_id, epoch, cause: self.seen.failures.append((self.now_s(), cause)),
        )
        assert role in ("expert", "attention")
        self.peer = Peer(
            worker_id="w",
            role="expert" if role == "expert" else "attention",
            epoch=EPOCH,
            address=address,
            pid=pid,
        )

    def now_s(self) -> float:
        return time.monotonic() - self.start_s

    async def run(self, seconds: float) -> None:
        """Tick until something was told or the time is over."""
        self.start_s = time.monotonic()
        told = len(self.seen.answers) + len(self.seen.failures)
        await self.until(
            lambda: self.now_s() >= seconds or len(self.seen.answers) + len(self.seen.failures) > told
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(2 * WAIT_S):
            while not condition():
                self.prober.tick([self.peer])
                await asyncio.sleep(0.01)

    async def answered(self) -> None:
        """Tick until the worker was asked and has answered: it is asked again when that is due."""
        await self.until(lambda: ("w", EPOCH) in self.prober._targets and self.target._due_us > 0)

    @property
    def target(self) -> _Target:
        return self.prober._targets["w", EPOCH]


@contextlib.contextmanager
def bench(works: bool = True, role: str = "expert", config: Config = CONFIG) -> Iterator[Bench]:
    with process(answer_probes, address := new_address(), EPOCH, works, 0.01) as child:
        assert child.pid is not None
        yield Bench(child.pid, address, role, config)


def test_an_idle_worker_that_is_stopped_is_found_patiently() -> None:
    async def main(run: Bench) -> None:
        await run.answered()
        await run.run(0.5)
        assert run.seen == Seen(), "a healthy one is no news"
        stop(run.pid)
        await run.run(WAIT_S)
        run.prober.close()

    with bench(config=msgspec.structs.replace(CONFIG, worker_probe_timeout_ms=1_000.0)) as run:
        asyncio.run(main(run))
        [(after_s, cause)] = run.seen.failures
        assert 0.9 < after_s < WAIT_S
        assert "50 probes in a row unanswered" in cause


def test_a_suspect_that_is_stopped_is_found_at_once() -> None:
    async def main(run: Bench) -> None:
        await run.answered()
        stop(run.pid)
        run.prober.verify("w", EPOCH)
        await run.run(WAIT_S)
        run.prober.close()

    with bench() as run:
        asyncio.run(main(run))
        [(after_s, cause)] = run.seen.failures
        assert after_s < 5.0, "as patiently as with anybody"
        assert "4 probes in a row unanswered" in cause
        assert run.seen.answers == []


def test_what_a_suspect_had_answered_before_does_not_clear_it() -> None:
    """The answer to an earlier probe lies unread while the worker is stopped and its peers notice."""

    async def main(run: Bench, asking: socket.socket, answering: socket.socket) -> None:
        run.prober.enabled = False
        run.prober.tick([run.peer])  # it is followed, and not yet dialled
        run.target._channel = ProbeChannel(asking, EPOCH)
        run.prober.enabled = True
        answering.setblocking(False)
        probes: list[bytes] = []

        def was_asked() -> bool:
            with contextlib.suppress(BlockingIOError):
                probes.append(answering.recv(PROBE_FRAME_BYTES))
            return bool(probes)

        await run.until(was_asked)
        answering.send(pack_probe(ANSWER, EPOCH, int.from_bytes(probes[0][16:24], "little"), 1))
        run.prober.verify("w", EPOCH)
        await run.run(WAIT_S)
        run.prober.close()

    asking, answering = socket.socketpair()
    with asking, answering:
        run = Bench(0, new_address())
        asyncio.run(main(run, asking, answering))
    assert run.seen.answers == []
    assert "4 probes in a row unanswered" in run.seen.failures[0][1]


def test_a_suspect_that_answers_is_cleared() -> None:
    async def main(run: Bench) -> None:
        await run.answered()
        run.prober.verify("w", EPOCH)
        await run.run(WAIT_S)
        await run.run(0.5)
        run.prober.close()

    # After its first answer it is asked again in a minute, or at once if suspected; then it may take 1 s.
    config = msgspec.structs.replace(CONFIG, worker_probe_interval_ms=60_000.0, probe_misses_max=50)
    with bench(config=config) as run:
        asyncio.run(main(run))
        assert (len(run.seen.answers), run.seen.failures) == (1, [])
        assert run.seen.answers[0] < WAIT_S


WEDGED = msgspec.structs.replace(CONFIG, expert_batch_ms_max=300.0)


def test_an_expert_worker_that_answers_without_progress_is_wedged() -> None:
    with bench(works=False, config=WEDGED) as run:

        async def main() -> None:
            await run.run(WAIT_S)
            run.prober.close()

        asyncio.run(main())
        [(_, cause)] = run.seen.failures
        assert cause.startswith("no progress")


def test_an_idle_attention_worker_need_not_make_progress() -> None:
    with bench(works=False, role="attention", config=WEDGED) as run:

        async def main() -> None:
            await run.run(1.5)
            run.prober.close()

        asyncio.run(main())
        assert run.seen == Seen()


# ------------------------------------------------------------------ what follows from a suspicion


def _membership() -> tuple[Membership, dict[str, Worker]]:
    membership = Membership(1)
    for name in ("aw-0", "aw-1"):
        membership.start(name, "attention", 0.0)
    membership.start("ew-0", "expert", 0.0)
    for worker in membership.workers.values():
        worker_id, epoch = worker.worker_id, worker.epoch
        hello = Hello(worker_id=worker_id, role=worker.role, epoch=epoch, pid=1, address="")
        assert membership.hello(hello, 0.0) == ""
        membership.ready(Ready(worker_id=worker_id, epoch=epoch, fingerprint="", exact=True), 0.0)
    return membership, membership.workers


def _say(membership: Membership, reporter: str, *, withdrawn: bool = False) -> list[object]:
    suspect = membership.workers["ew-0"]
    message = Suspicion(
        reporter_id=reporter,
        suspect_id="ew-0",
        suspect_epoch=suspect.epoch,
        cause="silent",
        withdrawn=withdrawn,
    )
    return list(judge(message, membership.workers[reporter], membership)[1])


def test_one_suspicion_asks_for_proof_and_a_withdrawn_one_does_not_count() -> None:
    membership, workers = _membership()
    verify = Verify("ew-0", workers["ew-0"].epoch)
    assert _say(membership, "aw-0") == [verify]
    assert _say(membership, "aw-0", withdrawn=True) == []
    assert _say(membership, "aw-1") == [verify]
    assert workers["ew-0"].state == "suspect", "the two were never of one mind"
    assert _say(membership, "aw-0") == []
    assert workers["ew-0"].state == "dead"


def test_one_that_does_not_answer_the_orchestrator_is_dead_once() -> None:
    membership, workers = _membership()
    epoch = workers["ew-0"].epoch
    assert membership.unresponsive("ew-0", epoch - 1, "old news") is None
    moved = membership.unresponsive("ew-0", epoch, "silent")
    assert moved is not None
    assert (moved.after, moved.cause) == ("dead", "silent")
    assert membership.unresponsive("ew-0", epoch, "silent") is None
