"""A worker's pulse: seen by who watches it, without asking; what is no pulse is refused, nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from tarragon.boot import Boot
from tarragon.config import Config
from tarragon.gateway.probing import Prober
from tarragon.messages import Peer, ProtocolError
from tarragon.testing.ends import SECRET, WAIT_S, answer_probes, new_address, no_leak, process, stop
from tarragon.transport.memory import create_sealed
from tarragon.transport.pulse import Pulse, PulseView

EPOCH = 5
CONFIG = Config(probe_silence_ms=40.0, probe_interval_ms=20.0, probe_misses_max=4, pulse_look_ms=60.0)


class Watching:
    """A gateway's prober of one worker process that owes all the time."""

    def __init__(self, address: str) -> None:
        self.failed: list[str] = []
        boot = Boot(
            cluster="t", secret=SECRET, worker_id="gateway", role="gateway", epoch=1, model="", config=CONFIG
        )
        self.prober = Prober(boot, lambda _id: True, lambda _id, cause: self.failed.append(cause))
        self.peer = Peer(worker_id="aw-0", role="attention", epoch=EPOCH, address=address, pid=0)

    async def __aenter__(self) -> Watching:
        self.prober.link_up(self.peer)
        await self.until(lambda: self.prober.watched == ["aw-0"])
        return self

    async def __aexit__(self, *_: object) -> None:
        self.prober.link_down("aw-0")

    @property
    def probes(self) -> int:
        return self.prober._watched["aw-0"].watch.probes

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@contextlib.contextmanager
def worker(beats: bool) -> Iterator[tuple[int, str]]:
    with process(answer_probes, address := new_address(), EPOCH, beats, 0.001) as child:
        assert child.pid is not None
        yield child.pid, address


def test_one_that_works_is_not_asked_and_is_found_when_it_is_stopped() -> None:
    async def main(pid: int, address: str) -> None:
        async with Watching(address) as watching:
            await asyncio.sleep(1.0)
            assert watching.failed == []
            seen = watching.probes
            assert seen < 10, "of 15 looks: a busy machine may keep it from beating for a while"
            stop(pid)
            await watching.until(lambda: watching.failed)
            assert watching.probes >= seen + CONFIG.probe_misses_max
            assert "unanswered" in watching.failed[0]

    with worker(beats=True) as (pid, address):
        asyncio.run(main(pid, address))


def test_trouble_over_one_that_failed_keeps_nobody_from_the_others() -> None:
    async def main(stopped: tuple[int, str], other: tuple[int, str]) -> None:
        async with Watching(stopped[1]) as watching:
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)
            failed, watching.failed = watching.failed, Refusing()
            watching.prober.link_up(replace(watching.peer, worker_id="aw-1", address=other[1]))
            await watching.until(lambda: watching.prober.watched == ["aw-0", "aw-1"])
            stop(stopped[0])
            await watching.until(lambda: watching.failed.count("refused"))
            watching.failed = failed
            stop(other[0])
            await watching.until(lambda: watching.failed)
            watching.prober.link_down("aw-1")

    with worker(beats=True) as first, worker(beats=True) as second:
        asyncio.run(main(first, second))


class Refusing(list[str]):
    """Notes that something was to be noted, and raises."""

    def append(self, cause: str) -> None:
        super().append("refused")
        raise ZeroDivisionError(cause)


def test_one_without_a_pulse_is_asked_and_its_answers_are_taken() -> None:
    async def main(address: str) -> None:
        async with Watching(address) as watching:
            await watching.until(lambda: watching.probes > 3)
            assert watching.failed == []

    with worker(beats=False) as (_, address):
        asyncio.run(main(address))


@no_leak()
def test_the_time_of_the_last_beat_is_seen_from_outside() -> None:
    with contextlib.closing(Pulse()) as pulse, contextlib.closing(PulseView(os.dup(pulse.fd))) as view:
        assert view.at_us == 0
        before_us = time.monotonic_ns() // 1_000
        pulse.beat()
        assert before_us <= view.at_us <= time.monotonic_ns() // 1_000
        assert pulse.beats[0] == 1


def unsealed() -> int:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, mmap.PAGESIZE)
    return fd


@no_leak()
@pytest.mark.parametrize(
    "make", [unsealed, lambda: create_sealed("large", 1 << 20), lambda: os.open(os.devnull, os.O_RDONLY)]
)
def test_what_is_no_pulse_is_refused(make: Callable[[], int]) -> None:
    with pytest.raises(ProtocolError):
        PulseView(make())
