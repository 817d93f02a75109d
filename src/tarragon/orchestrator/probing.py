"""The orchestrator's own probes (section 5, appendix E): a second opinion on suspects, a look at the idle.

Every serving worker is probed slowly, so that one that hangs without traffic is found as well. A suspect is
probed at once, with the patience that its peers have: if it is silent to the orchestrator too it is dead, and
if it answers, the trouble is that pair's alone.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from tarragon.boot import Boot
from tarragon.config import Config
from tarragon.liveness import Failed, Probe, Watch
from tarragon.messages import Peer, ProtocolError, Role
from tarragon.transport.probe import ProbeChannel
from tarragon.transport.probe_dial import close_late, open_in_thread

PROBED: Final[tuple[Role, ...]] = ("attention", "expert", "store")
"""Roles that answer probes."""

OnAnswer = Callable[[str, int], None]
OnFailed = Callable[[str, int, str], None]


class Prober:
    """Watches worker incarnations; lives in the orchestrator's event loop, which never waits for it.

    ``on_answer(worker_id, epoch)`` is called when a suspect has answered, ``on_failed(..., cause)`` once when
    a worker has to be given up.
    """

    def __init__(self, boot: Boot, on_answer: OnAnswer, on_failed: OnFailed) -> None:
        self._boot = boot
        self._on_answer, self._on_failed = on_answer, on_failed
        self._targets: dict[tuple[str, int], _Target] = {}
        self.enabled = True
        """Off, nothing is asked; who joins or leaves is followed all the same."""

    def tick(self, serving: Iterable[Peer]) -> None:
        """Follow exactly these workers, and do what is due; to be called more often than probes are sent."""
        peers = {(peer.worker_id, peer.epoch): peer for peer in serving if peer.role in PROBED}
        for gone in self._targets.keys() - peers.keys():
            self._targets.pop(gone).close()
        for key in peers.keys() - self._targets.keys():
            self._targets[key] = _Target(self._boot, peers[key])
        if not self.enabled:
            return
        now_us = _now_us()
        for (worker_id, epoch), target in list(self._targets.items()):
            was_suspect = target.suspect
            cause = target.look(now_us)
            if cause:
                self._targets.pop((worker_id, epoch)).close()
                self._on_failed(worker_id, epoch, cause)
            elif was_suspect and not target.suspect:
                self._on_answer(worker_id, epoch)

    def verify(self, worker_id: str, epoch: int) -> None:
        """A peer suspects this worker: look at once."""
        target = self._targets.get((worker_id, epoch))
        if target is not None:
            target.verify(_now_us())

    def close(self) -> None:
        for target in self._targets.values():
            target.close()
        self._targets.clear()


class _Target:
    """One incarnation: its channel, kept open in the background, and what is asked on it."""

    def __init__(self, boot: Boot, peer: Peer) -> None:
        self.suspect = False
        self._boot, self._peer = boot, peer
        self._config = boot.config
        self._loop = asyncio.get_running_loop()
        self._channel: ProbeChannel | None = None
        self._opening: asyncio.Future[ProbeChannel] | None = None
        self._open_at_us = 0
        self._watch = _patient(self._config, peer, _now_us())
        self._asking = False
        self._due_us = 0

    def verify(self, now_us: int) -> None:
        if not self.suspect:
            self.suspect, self._asking = True, True
            # What it had answered before it was suspected does not clear it.
            while self._channel is not None and self._channel.recv_ready():
                pass
            self._watch = _strict(self._config, self._peer, now_us)

    def look(self, now_us: int) -> str:
        """Take up answers and send what is due; returns why the worker has to be given up, or ""."""
        channel = self._open_channel(now_us)
        if channel is None or not (self._asking or now_us >= self._due_us):
            return ""
        self._asking = True
        answers = channel.recv_ready()
        for answer in answers:
            self._watch.answered(answer.sequence, answer.progress, now_us)
        verdict = self._watch.next(now_us, owes=True)
        if isinstance(verdict, Failed):
            return f"{verdict.cause} (asked by the orchestrator)"
        if isinstance(verdict, Probe):
            with suppress(ConnectionError):  # it is opened anew; a dead worker's control connection tells
                channel.send(verdict.sequence)
        elif answers:
            self._rest(now_us)
        return ""

    def _rest(self, now_us: int) -> None:
        """It has answered: ask again after a while, and patiently."""
        self._asking, self._due_us = False, now_us + int(self._config.worker_probe_interval_ms * 1e3)
        if self.suspect:
            self.suspect = False
            self._watch = _patient(self._config, self._peer, now_us)

    # ------------------------------------------------------------------ the channel

    def _open_channel(self, now_us: int) -> ProbeChannel | None:
        """The open channel; if there is none, one is dialled in a thread."""
        if self._opening is not None and self._opening.done():
            self._take_opened(now_us)
        if self._channel is not None and self._channel.eof:
            self._channel.close()
            self._channel = None
        if self._channel is None and self._opening is None and now_us >= self._open_at_us:
            self._opening = open_in_thread(self._boot, self._peer, timeout_s=self._config.connect_timeout_s)
        return self._channel

    def _take_opened(self, now_us: int) -> None:
        assert self._opening is not None
        opening, self._opening = self._opening, None
        self._open_at_us = now_us + int(self._config.worker_probe_interval_ms * 1e3)
        with suppress(OSError, TimeoutError, ProtocolError):
            self._channel = opening.result()
            # What it did not answer on another channel is no silence on this one.
            self._watch.heard(now_us)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._opening is not None:
            close_late(self._opening)


def _patient(config: Config, peer: Peer, now_us: int) -> Watch:
    """For one that nobody suspects: there is no hurry, and a false alarm would cost a worker."""
    misses_max = max(config.probe_misses_max, int(config.worker_probe_timeout_ms / config.probe_interval_ms))
    return Watch(config, now_us, _stall_ms_max(config, peer), misses_max=misses_max)


def _strict(config: Config, peer: Peer, now_us: int) -> Watch:
    return Watch(config, now_us, _stall_ms_max(config, peer))


def _stall_ms_max(config: Config, peer: Peer) -> float:
    """An idle expert worker makes progress as well, once per interval; an idle attention worker does not."""
    if peer.role != "expert":
        return math.inf
    return config.expert_batch_ms_max + config.worker_probe_interval_ms


def _now_us() -> int:
    return int(asyncio.get_running_loop().time() * 1e6)
