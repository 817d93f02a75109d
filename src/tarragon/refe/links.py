"""REFE's links: a slot per expert worker, with its rows' region, its doorbells and its probes (4.1, 4.2).

Called by the engine thread alone, except for what a control thread makes and posts.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tarragon.config import Config
from tarragon.liveness import NEVER_US, Failed, Probe, Verdict, WaitUntil, Watch
from tarragon.messages import DataFrame, Peer, Table
from tarragon.transport.link import DataLink
from tarragon.transport.probe import ProbeChannel


class NewTable(NamedTuple):
    """The orchestrator's routing table has changed."""

    table: Table


class NewLink(NamedTuple):
    """An expert worker is connected: its data link, and the probe channel beside it."""

    peer: Peer
    link: DataLink
    probes: ProbeChannel


class LinkDown(NamedTuple):
    """The control thread saw that this incarnation is gone or hangs."""

    worker_id: str
    epoch: int
    cause: str


Post = NewTable | NewLink | LinkDown


class Lost(NamedTuple):
    """A link that has to be given up, and why."""

    slot: int
    cause: str


class _Guard:
    """What is needed to tell whether the peer of one slot lives."""

    __slots__ = ("owed_since_us", "probes", "watch")

    def __init__(self, probes: ProbeChannel, config: Config) -> None:
        self.probes = probes
        self.watch = Watch(config, now_us(), config.expert_batch_ms_max)
        self.owed_since_us = -1


class Links:
    """Slots are small integers; that of a dead link is taken again, but never while its rows are in use.

    Args:
        on_lost: called with a link's peer and the cause when it is given up.
    """

    def __init__(self, config: Config, on_lost: Callable[[Peer, str], None]) -> None:
        self.poll = select.epoll()
        """Readable data links."""
        self.peers: list[Peer] = []
        self.live: list[int] = []
        self.rows: list[torch.Tensor] = []
        self.ids: list[torch.Tensor] = []
        self.results: list[torch.Tensor] = []
        self.probes_sent = 0
        self._config = config
        self._answer_us_max = int(config.expert_answer_timeout_s * 1e6)
        self._on_lost = on_lost
        self._links: list[DataLink | None] = []
        self._left: set[int] = set()
        """Dead slots that still hold the memory of their region."""
        self._guards: dict[int, _Guard] = {}
        self._slot_by_fd: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._links)

    def at(self, fd: int) -> int | None:
        """The live slot whose data link has this descriptor."""
        return self._slot_by_fd.get(fd)

    def get(self, slot: int) -> DataLink | None:
        """The link in ``slot``, or None if it is dead."""
        return self._links[slot]

    def find(self, worker_id: str, epoch: int) -> int | None:
        """The live slot of this incarnation."""
        for slot in self.live:
            peer = self.peers[slot]
            if (peer.worker_id, peer.epoch) == (worker_id, epoch):
                return slot
        return None

    def slots_of(self, table: Table) -> npt.NDArray[np.int32]:
        """int32 [workers of the table]: the live slot of each, or -1."""
        slots = [self.find(worker.worker_id, worker.epoch) for worker in table.workers]
        return np.array([-1 if slot is None else slot for slot in slots], dtype=np.int32)

    # ------------------------------------------------------------------ coming and going

    def add(self, new: NewLink, *, reuse: bool) -> None:
        """Give the link a slot. ``reuse``: nothing refers to the rows of dead slots."""
        link, region = new.link, new.link.region
        slot = next((s for s, old in enumerate(self._links) if old is None and reuse), len(self._links))
        if slot == len(self._links):
            self._links.append(link)
            self.peers.append(new.peer)
            self.rows.append(region.rows)
            self.ids.append(region.expert_ids)
            self.results.append(region.results)
        else:
            self._links[slot], self.peers[slot] = link, new.peer
            self.rows[slot], self.ids[slot] = region.rows, region.expert_ids
            self.results[slot] = region.results
            self._left.discard(slot)
        self._guards[slot] = _Guard(new.probes, self._config)
        self.live.append(slot)
        self._slot_by_fd[link.fileno()] = slot
        self.poll.register(link.fileno(), select.EPOLLIN)

    def drop(self, slot: int, cause: str) -> bool:
        """Give a link up; False if it was dead already. Its rows and results stay readable."""
        link = self._links[slot]
        if link is None:
            return False
        self._links[slot] = None
        self._left.add(slot)
        self.live.remove(slot)
        self.poll.unregister(link.fileno())
        del self._slot_by_fd[link.fileno()]
        # The peer may be alive: it sees the end, and what it still answers is refused by the closed socket.
        link.close_socket()
        self._guards.pop(slot).probes.close()
        self._on_lost(self.peers[slot], cause)
        return True

    def let_go(self) -> None:
        """Give the memory of dead slots back; to be called when nothing refers to their rows."""
        while self._left:
            slot = self._left.pop()
            self.rows[slot] = self.rows[slot].new_empty(0, self.rows[slot].shape[1])
            self.ids[slot] = self.ids[slot].new_empty(0)
            self.results[slot] = self.results[slot].new_empty(0, self.results[slot].shape[1])

    def send(self, slot: int, frame: DataFrame) -> bool:
        """Send on a live link; False if it is dead, or has to be given up now."""
        link = self._links[slot]
        if link is None:
            return False
        try:
            link.send(frame)
        except ConnectionError:
            return False
        return True

    # ------------------------------------------------------------------ who is silent

    def owes(self, slot: int) -> None:
        """The slot was given more to answer just now."""
        self._owes(self._guards[slot], now_us())

    def _owes(self, guard: _Guard, since_us: int) -> None:
        # The time before is no silence: nothing was owed, or it was answered.
        guard.owed_since_us = since_us
        guard.watch.heard(since_us)

    def question(self, owing: Iterable[int], since_us: int) -> tuple[int, list[Lost]]:
        """Look after slots that have owed an answer since ``since_us`` or ``owes``, and have not given it.

        To be called when a wait for answers has timed out, after all frames that had arrived were taken.

        Returns:
            When to ask again (us), and the links that have to be given up.
        """
        wake_us, lost = NEVER_US, []
        for slot in owing:
            guard = self._guards[slot]
            if guard.owed_since_us < since_us:
                self._owes(guard, since_us)
            # The time is taken before the last look, or a pause of this very thread would be held against it.
            asked_us = now_us()
            verdict = self._verdict(guard, asked_us)
            if isinstance(verdict, Failed):
                lost.append(Lost(slot, verdict.cause))
            elif asked_us >= guard.owed_since_us + self._answer_us_max:
                lost.append(Lost(slot, f"no answer for {self._config.expert_answer_timeout_s:g} s"))
            elif isinstance(verdict, WaitUntil):
                wake_us = min(wake_us, verdict.deadline_us)
        return wake_us, lost

    def _verdict(self, guard: _Guard, asked_us: int) -> Verdict:
        for answer in guard.probes.recv_ready():
            guard.watch.answered(answer.sequence, answer.progress, asked_us)
        while True:
            verdict = guard.watch.next(asked_us, owes=True)
            if not isinstance(verdict, Probe):
                return verdict
            self.probes_sent += 1
            try:
                guard.probes.send(verdict.sequence)
            except ConnectionError as error:
                return Failed(f"it cannot be probed: {error}")


def now_us() -> int:
    return time.monotonic_ns() // 1_000
