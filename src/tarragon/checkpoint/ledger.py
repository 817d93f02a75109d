"""Which buckets exist, is there room for one more, and when does one go? Pure: events and the time come in.

A bucket belongs to one incarnation of an attention worker and is never given to another. It goes
``bucket_linger_s`` after the orchestrator stopped naming its incarnation among the living: so long the
worker's requests have time to be restored from it. Who finds no room waits, in the order of asking, and
shortens that time to ``bucket_linger_min_s``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tarragon.config import BUCKETS_MAX

Incarnation = tuple[str, int]
"""Worker id and epoch."""


@dataclass
class Entry:
    """One bucket."""

    total_bytes: int
    dead_since_s: float | None = None
    """When its incarnation was found missing among the living; None while it lives or nothing is known."""


@dataclass(frozen=True)
class Granted:
    """The bucket is there: ``is_new`` says whether its memory is still to be made."""

    is_new: bool


@dataclass(frozen=True)
class Waits:
    """No room: the incarnation is remembered and gets its bucket when there is some."""

    reason: str


@dataclass(frozen=True)
class Fenced:
    """Refused for good: a later incarnation of the worker is known, or it asks for something else now."""

    reason: str


class Ledger:
    """All buckets of one store. Times are seconds of one steady clock."""

    def __init__(self, *, bytes_max: int, linger_s: float, linger_min_s: float) -> None:
        """``bytes_max`` bounds the sum of all buckets' sizes; 0 does not."""
        self.entries: dict[Incarnation, Entry] = {}
        self.waiting: dict[Incarnation, int] = {}
        """Bytes that incarnations without room asked for, in the order of asking."""
        self.refused: Counter[str] = Counter()
        self._bytes_max = bytes_max
        self._linger_s, self._linger_min_s = linger_s, min(linger_s, linger_min_s)
        self._newest: dict[str, int] = {}
        self._nobody_lives = False

    @property
    def reserved_bytes(self) -> int:
        return sum(entry.total_bytes for entry in self.entries.values())

    @property
    def dead(self) -> int:
        """Buckets of incarnations that live no more."""
        return sum(entry.dead_since_s is not None for entry in self.entries.values())

    # ------------------------------------------------------------------ events

    def open(self, worker_id: str, epoch: int, total_bytes: int) -> Granted | Waits | Fenced:
        """An incarnation asks for its bucket, for the first time or again."""
        incarnation = (worker_id, epoch)
        newest = self._newest.get(worker_id, epoch)
        entry = self.entries.get(incarnation)
        if epoch < newest:
            self.refused["stale_epoch"] += 1
            return Fenced(f"{worker_id} has been replaced: epoch {epoch} gets no bucket any more")
        if entry is not None and entry.total_bytes != total_bytes:
            self.refused["changed_size"] += 1
            return Fenced(f"{worker_id} has a bucket of {entry.total_bytes} bytes, not of {total_bytes}")
        self._newest[worker_id] = epoch
        for former in [w for w in self.waiting if w[0] == worker_id and w[1] < epoch]:
            del self.waiting[former]
        if entry is not None:
            return Granted(is_new=False)
        if (reason := self._shortage(total_bytes)) != "":
            self.refused["no_room"] += incarnation not in self.waiting
            self.waiting[incarnation] = total_bytes
            return Waits(reason)
        self.waiting.pop(incarnation, None)
        self.entries[incarnation] = Entry(total_bytes)
        return Granted(is_new=True)

    def returned(self, worker_id: str, epoch: int, total_bytes: int) -> None:
        """The node agent gives back what a former store had granted."""
        self.entries[worker_id, epoch] = Entry(total_bytes)
        self._newest[worker_id] = max(epoch, self._newest.get(worker_id, epoch))

    def failed(self, worker_id: str, epoch: int) -> None:
        """The memory of a granted bucket could not be had."""
        del self.entries[worker_id, epoch]

    def left(self, worker_id: str, epoch: int) -> None:
        """The incarnation's connection ended: it waits no more."""
        self.waiting.pop((worker_id, epoch), None)

    def living(self, incarnations: Iterable[Incarnation], now_s: float) -> None:
        """The orchestrator names the attention workers that live."""
        live = set(incarnations)
        for worker_id, epoch in live:
            self._newest[worker_id] = max(epoch, self._newest.get(worker_id, epoch))
        for incarnation, entry in self.entries.items():
            if incarnation in live:
                entry.dead_since_s = None
            elif entry.dead_since_s is None or self._nobody_lives:
                entry.dead_since_s = now_s
        self._nobody_lives = not live

    def due(self, now_s: float) -> list[Incarnation]:
        """Take the buckets whose time has come out of the books; the caller lets their memory go.

        None while no attention worker lives that could restore from them: their time begins with the first.
        """
        if self._nobody_lives:
            return []
        gone = [
            incarnation
            for incarnation, entry in self.entries.items()
            if entry.dead_since_s is not None and now_s - entry.dead_since_s >= self._lingers_s
        ]
        for incarnation in gone:
            del self.entries[incarnation]
        return gone

    def next_due_s(self) -> float | None:
        """When ``due`` has something to return, if nothing else happens before; None: never."""
        since = [entry.dead_since_s for entry in self.entries.values() if entry.dead_since_s is not None]
        return min(since) + self._lingers_s if since and not self._nobody_lives else None

    def next_waiting(self) -> tuple[Incarnation, int] | None:
        """Who asked first of those that find no room, and how much, if it fits now."""
        for incarnation, total_bytes in self.waiting.items():
            return (incarnation, total_bytes) if not self._shortage(total_bytes) else None
        return None

    # ------------------------------------------------------------------ inside

    @property
    def _lingers_s(self) -> float:
        """How long dead buckets are kept as things are."""
        return self._linger_min_s if self.waiting else self._linger_s

    def _shortage(self, total_bytes: int) -> str:
        """Why there is no room for one more bucket; "" if there is."""
        if len(self.entries) >= BUCKETS_MAX:
            return f"there are {len(self.entries)} buckets, and no more are kept"
        free_bytes = self._bytes_max - self.reserved_bytes
        if self._bytes_max and total_bytes > free_bytes:
            return (
                f"{total_bytes} bytes are needed for its checkpoints, but of checkpoint_bytes_max "
                f"({self._bytes_max}) only {max(0, free_bytes)} are free"
            )
        return ""
