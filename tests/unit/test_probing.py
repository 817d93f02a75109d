"""The orchestrator's own probes: who hangs is found, suspected or idle, and who answers is cleared."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tarragon.boot import Boot
from tarragon.config import Config
from tarragon.messages import Hello, Peer, Ready, Suspicion
from tarragon.orchestrator.actions import Verify
from tarragon.orchestrator.membership import Membership, Worker
from tarragon.orchestrator.probing import Prober
from tarragon.orchestrator.suspicions import judge
from tarragon.testing.ends import SECRET, WAIT_S, listen, new_address, process
from tarragon.transport.probe import probe_open
from tarragon.transport.responder import ProbeResponder

CONFIG = Config(
    probe_silence_ms=20.0,
    probe_interval_ms=20.0,
    probe_misses_max=4,
    worker_probe_interval_ms=150.0,
    worker_probe_timeout_ms=600.0,
    expert_batch_ms_max=300.0,
)
EPOCH = 5


def _worker(address: str, works: bool) -> None:
    """A worker that answers probes, and makes progress if it ``works``."""
    with contextlib.closing(listen(address)) as listener:
        responder = ProbeResponder(EPOCH)
        while True:
            with contextlib.suppress(TimeoutError):
                connection = listener.accept(0.01)
                opened = probe_open(connection.recv(WAIT_S) or b"")
                assert opened is not None
                responder.adopt(connection, opened)
            responder.progress[0] += works


@dataclass
class Seen:
    """What the prober told, and when (s since the start)."""

    answers: list[float] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)


class Bench:
    """A prober that ticks, and one worker process."""

    def __init__(self, pid: int, address: str, role: str = "expert") -> None:
        self.pid, self.seen = pid, Seen()
        self.start_s = time.monotonic()
        boot = Boot(
            cluster="t",
            secret=SECRET,
            worker_id="orchestrator",
            role="orchestrator",
            epoch=1,
            model="",
            config=CONFIG,
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
        told = len(self.seen.answers) + len(self.seen.failures)
        self.start_s = time.monotonic()
        while self.now_s() < seconds and len(self.seen.answers) + len(self.seen.failures) == told:
            self.prober.tick([self.peer])
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def bench(works: bool = True, role: str = "expert") -> Iterator[Bench]:
    with process(_worker, address := new_address(), works) as child:
        assert child.pid is not None
        yield Bench(child.pid, address, role)


def test_an_idle_worker_that_is_stopped_is_found_patiently() -> None:
    async def main(run: Bench) -> None:
        await run.run(0.5)
        assert run.seen == Seen(), "a healthy one is no news"
        os.kill(run.pid, signal.SIGSTOP)
        await run.run(3.0)
        run.prober.close()

    with bench() as run:
        asyncio.run(main(run))
        [(after_s, cause)] = run.seen.failures
        assert 0.5 < after_s < 2.0
        assert "unanswered" in cause


def test_a_suspect_that_is_stopped_is_found_at_once() -> None:
    async def main(run: Bench) -> None:
        await run.run(0.5)
        os.kill(run.pid, signal.SIGSTOP)
        run.prober.verify("w", EPOCH)
        await run.run(3.0)
        run.prober.close()

    with bench() as run:
        asyncio.run(main(run))
        [(after_s, _)] = run.seen.failures
        assert after_s < 0.5
        assert run.seen.answers == []


def test_a_suspect_that_answers_is_cleared() -> None:
    async def main(run: Bench) -> None:
        await run.run(0.5)
        run.prober.verify("w", EPOCH)
        await run.run(3.0)
        await run.run(0.5)
        run.prober.close()

    with bench() as run:
        asyncio.run(main(run))
        assert (len(run.seen.answers), run.seen.failures) == (1, [])
        assert run.seen.answers[0] < 0.5


def test_an_expert_worker_that_answers_without_progress_is_wedged() -> None:
    with bench(works=False) as run:

        async def main() -> None:
            await run.run(5.0)
            run.prober.close()

        asyncio.run(main())
        [(_, cause)] = run.seen.failures
        assert cause.startswith("no progress")


def test_an_idle_attention_worker_need_not_make_progress() -> None:
    with bench(works=False, role="attention") as run:

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
