"""REFE's engine: dispatch, collect, replay and combine over the links to the expert workers (4.2, 5.1).

Threads: the engine thread alone calls ``expert_io`` and the step announcements;
a control thread hands over tables and links through ``post``. The engine thread
takes them up before a layer or while it waits, so that the per-layer path
needs no lock.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from tarragon import native
from tarragon.config import Config
from tarragon.messages import DataFlag, DataFrame, DataKind, Peer, RefusalReason, Table
from tarragon.refe.exchange import Exchange, Send
from tarragon.routing.table import candidate_array, owner_array
from tarragon.transport.link import DataLink


class ExpertUnreachable(RuntimeError):
    """No live worker hosts a selected expert, and none came within the limit."""


class NewTable(NamedTuple):
    table: Table


class NewLink(NamedTuple):
    peer: Peer
    link: DataLink


class LinkDown(NamedTuple):
    """The control thread saw that this incarnation is gone or hangs."""

    worker_id: str
    epoch: int
    cause: str


Post = NewTable | NewLink | LinkDown


class Counters:
    """What REFE did since it started; read by the control thread for reports."""

    def __init__(self) -> None:
        self.layers = 0
        self.pairs = 0
        self.replayed_pairs = 0
        self.links_lost = 0
        self.stale_frames = 0
        self.dispatch_s = 0.0
        self.wait_s = 0.0
        self.combine_s = 0.0

    def as_dict(self) -> dict[str, float]:
        return {name: float(value) for name, value in vars(self).items()}


class Refe:
    """Connects one attention worker to all expert workers.

    Args:
        layers, experts, top_k: shape of the model's routing.
        pairs_max: most (token, expert) pairs of one step, that is tokens per step x top_k.
        worker_id, epoch: this attention worker's incarnation.
        on_lost: called in the engine thread with the peer whose link died.
    """

    def __init__(
        self,
        *,
        layers: int,
        experts: int,
        top_k: int,
        pairs_max: int,
        epoch: int,
        config: Config,
        on_lost: Callable[[Peer, str], None],
        on_table: Callable[[int], None],
    ) -> None:
        self.layers, self.experts, self.top_k = layers, experts, top_k
        self.epoch = epoch
        self.config = config
        self.counters = Counters()
        self._on_lost = on_lost
        self._on_table = on_table
        self._posts: deque[Post] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._wake_fd, select.EPOLLIN)
        self._links: list[DataLink | None] = []
        self._peers: list[Peer] = []
        self._live: list[int] = []
        self._slot_by_fd: dict[int, int] = {}
        self._rows: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []
        self._results: list[torch.Tensor] = []
        self._table: Table | None = None
        self._candidates = np.empty((0, 0, 0), dtype=np.int32)
        self._owners = torch.full((layers, experts), -1, dtype=torch.int32)
        self._pair_slot = torch.empty(pairs_max, dtype=torch.int32)
        self._pair_row = torch.empty(pairs_max, dtype=torch.int32)
        self._exchange = Exchange()
        self._step = 0
        self._flags = DataFlag.NONE
        self._in_step = False

    # ------------------------------------------------------------------ from the control thread

    def post(self, item: Post) -> None:
        """Hand over a table, a link or the news of a death; thread-safe, never blocks."""
        self._posts.append(item)
        os.eventfd_write(self._wake_fd, 1)

    def fileno(self) -> int:
        """Readable when something was posted, for the idle engine loop."""
        return self._wake_fd

    # ------------------------------------------------------------------ steps

    def begin_step(self, tokens: int, *, continues: bool) -> None:
        """Announce a forward pass over ``tokens`` rows; ``continues``: another step will follow at once."""
        self.take_posts()
        self._step += 1
        self._flags = DataFlag.NONE
        if tokens * self.top_k > self.config.decode_pairs_max:
            self._flags |= DataFlag.PREFILL
        self._continues = continues
        self._in_step = True
        self._announce(DataKind.STEP_BEGIN)

    def end_step(self) -> None:
        """Announce that no step follows: nobody shall wait for this worker."""
        if self._in_step:
            self._in_step = False
            self._announce(DataKind.STEP_END)

    def _announce(self, kind: DataKind) -> None:
        for slot in list(self._live):
            self._send(
                slot, DataFrame(kind, 0, self.epoch, self._peers[slot].epoch, 0, self._step, self._flags)
            )

    # ------------------------------------------------------------------ one layer

    def expert_io(
        self,
        layer_id: int,
        expert_ids: torch.Tensor,
        token_embeddings: torch.Tensor,
        router_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Send rows to their experts, collect the answers, and combine them (4.2).

        Args:
            layer_id: position among the model's MoE layers.
            expert_ids: int32 [T, K], the experts the gate selected.
            token_embeddings: [T, H] rows in the model's dtype.
            router_weights: float32 [T, K].

        Returns:
            [T, H]: per token the weighted sum of its experts' rows, in float32 and in router
            order, rounded once to the model's dtype: independent of where an expert ran.

        Raises:
            ExpertUnreachable: an expert stayed without a live host beyond the limit.
        """
        start = time.perf_counter()
        self.take_posts()
        pairs = expert_ids.numel()
        pair_slot, pair_row = self._pair_slot[:pairs], self._pair_row[:pairs]
        counts = self._dispatch(layer_id, expert_ids, token_embeddings, pair_slot, pair_row)
        sent = time.perf_counter()
        self._begin_exchange(layer_id, counts, expert_ids, token_embeddings, pair_slot, pair_row)
        self._collect(layer_id, expert_ids, token_embeddings, pair_slot, pair_row)
        collected = time.perf_counter()
        out = torch.empty_like(token_embeddings)
        native.combine(self._results, pair_slot, pair_row, router_weights, out)
        counters = self.counters
        counters.layers += 1
        counters.pairs += pairs
        counters.dispatch_s += sent - start
        counters.wait_s += collected - sent
        counters.combine_s += time.perf_counter() - collected
        return out

    def _dispatch(
        self,
        layer: int,
        expert_ids: torch.Tensor,
        rows: torch.Tensor,
        pair_slot: torch.Tensor,
        pair_row: torch.Tensor,
    ) -> list[int]:
        deadline = 0.0
        while True:
            counts = torch.zeros(len(self._links), dtype=torch.int32)
            reachable = native.dispatch(
                rows, expert_ids, self._owners[layer], self._rows, self._ids, pair_slot, pair_row, counts
            )
            if reachable:
                return counts.tolist()
            deadline = deadline or time.monotonic() + self.config.expert_unreachable_timeout_s
            self._wait_for_posts(layer, deadline)

    def _begin_exchange(
        self,
        layer: int,
        counts: list[int],
        expert_ids: torch.Tensor,
        rows: torch.Tensor,
        pair_slot: torch.Tensor,
        pair_row: torch.Tensor,
    ) -> None:
        lost: list[int] = []
        for send in self._exchange.begin(tuple(self._live), counts):
            if not self._send_rows(layer, send):
                lost.append(send.slot)
        for slot in lost:
            self._replay(layer, slot, expert_ids, rows, pair_slot, pair_row)

    def _collect(
        self,
        layer: int,
        expert_ids: torch.Tensor,
        rows: torch.Tensor,
        pair_slot: torch.Tensor,
        pair_row: torch.Tensor,
    ) -> None:
        exchange = self._exchange
        while not exchange.done:
            for fd, _ in self._poll.poll():
                slot = self._slot_by_fd.get(fd)
                if slot is None:
                    for dead in self.take_posts():
                        self._replay(layer, dead, expert_ids, rows, pair_slot, pair_row)
                    continue
                link = self._links[slot]
                if link is None:
                    continue
                for frame in link.recv_ready():
                    follow_up = self._take_answer(layer, slot, frame)
                    if follow_up is not None and not self._send_rows(layer, follow_up):
                        self._replay(layer, slot, expert_ids, rows, pair_slot, pair_row)
                if link.eof:
                    self._drop(slot, "connection closed")
                if self._links[slot] is None:
                    self._replay(layer, slot, expert_ids, rows, pair_slot, pair_row)

    def _take_answer(self, layer: int, slot: int, frame: DataFrame) -> Send | None:
        peer = self._peers[slot]
        if frame.sender_epoch != peer.epoch or frame.receiver_epoch != self.epoch or frame.step != self._step:
            self.counters.stale_frames += 1
            return None
        if frame.kind == DataKind.RESULT and frame.layer == layer:
            return self._exchange.answered(slot)
        if frame.kind == DataKind.REFUSED:
            # The two sides disagree about what is where: this link is of no use, its rows go elsewhere.
            self._drop(slot, f"refused a frame: {RefusalReason(frame.flags).name}")
            return None
        self.counters.stale_frames += 1
        return None

    def _replay(
        self,
        layer: int,
        dead: int,
        expert_ids: torch.Tensor,
        rows: torch.Tensor,
        pair_slot: torch.Tensor,
        pair_row: torch.Tensor,
    ) -> None:
        """Re-dispatch what the dead link owed to the next candidates, as priority frames (5.1)."""
        pending = deque([dead])
        deadline = 0.0
        while pending:
            slot = pending.popleft()
            if not self._exchange.lost(slot):
                continue
            while True:
                counts = torch.zeros(len(self._links), dtype=torch.int32)
                starts = torch.tensor(
                    [self._exchange.rows_of(s) for s in range(len(self._links))], dtype=torch.int32
                )
                reachable = native.replay(
                    rows,
                    expert_ids,
                    self._owners[layer],
                    slot,
                    self._rows,
                    self._ids,
                    starts,
                    pair_slot,
                    pair_row,
                    counts,
                )
                if reachable:
                    break
                deadline = deadline or time.monotonic() + self.config.expert_unreachable_timeout_s
                pending.extend(self._wait_for_posts(layer, deadline))
            moved = counts.tolist()
            self.counters.replayed_pairs += sum(moved)
            for send in self._exchange.replay(moved):
                if not self._send_rows(layer, send):
                    pending.append(send.slot)

    # ------------------------------------------------------------------ links and tables

    def take_posts(self) -> list[int]:
        """Take up what the control thread posted; returns the slots that died."""
        if not self._posts:
            return []
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        dead: list[int] = []
        while self._posts:
            item = self._posts.popleft()
            if isinstance(item, NewTable):
                self._table, self._candidates = item.table, candidate_array(item.table)
                self._on_table(item.table.version)
            elif isinstance(item, NewLink):
                self._add(item.peer, item.link)
            else:
                for slot in list(self._live):
                    peer = self._peers[slot]
                    if (peer.worker_id, peer.epoch) == (item.worker_id, item.epoch):
                        self._drop(slot, item.cause)
                        dead.append(slot)
        self._resolve()
        return dead

    def _wait_for_posts(self, layer: int, deadline: float) -> list[int]:
        """Wait for a table or link that makes the layer's experts reachable; returns slots that died."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise ExpertUnreachable(
                f"an expert of layer {layer} has had no live host for "
                f"{self.config.expert_unreachable_timeout_s:.0f} s"
            )
        select.select([self._wake_fd], [], [], min(remaining, 0.05))
        return self.take_posts()

    def _add(self, peer: Peer, link: DataLink) -> None:
        # Slots of dead links are taken again only between layers, when nothing refers to their rows.
        slot = next(
            (s for s, old in enumerate(self._links) if old is None and self._exchange.done), len(self._links)
        )
        if slot == len(self._links):
            self._links.append(link)
            self._peers.append(peer)
            self._rows.append(link.region.rows)
            self._ids.append(link.region.expert_ids)
            self._results.append(link.region.results)
        else:
            self._links[slot], self._peers[slot] = link, peer
            self._rows[slot], self._ids[slot] = link.region.rows, link.region.expert_ids
            self._results[slot] = link.region.results
        self._live.append(slot)
        self._slot_by_fd[link.fileno()] = slot
        self._poll.register(link.fileno(), select.EPOLLIN)

    def _drop(self, slot: int, cause: str) -> None:
        link = self._links[slot]
        if link is None:
            return
        self._links[slot] = None
        self._live.remove(slot)
        self._poll.unregister(link.fileno())
        del self._slot_by_fd[link.fileno()]
        link.close_socket()
        self.counters.links_lost += 1
        self._resolve()
        self._on_lost(self._peers[slot], cause)

    def _resolve(self) -> None:
        """Recompute who owns what from the table and the links that are up."""
        if self._table is None:
            return
        slot_of = {(self._peers[s].worker_id, self._peers[s].epoch): s for s in self._live}
        slots = np.array(
            [slot_of.get((w.worker_id, w.epoch), -1) for w in self._table.workers], dtype=np.int32
        )
        owner = owner_array(self._table, slots >= 0, self._candidates)
        self._owners = torch.from_numpy(np.where(owner >= 0, slots[owner], -1).astype(np.int32))

    # ------------------------------------------------------------------ sending

    def _send_rows(self, layer: int, send: Send) -> bool:
        flags = self._flags
        if send.replay:
            flags |= DataFlag.PRIORITY
        if self._continues:
            flags |= DataFlag.CONTINUES
        peer = self._peers[send.slot]
        frame = DataFrame(
            DataKind.ROWS, layer, self.epoch, peer.epoch, send.pairs, self._step, flags, send.first
        )
        return self._send(send.slot, frame)

    def _send(self, slot: int, frame: DataFrame) -> bool:
        link = self._links[slot]
        if link is None:
            return False
        try:
            link.send(frame)
        except ConnectionError:
            self._drop(slot, "connection closed")
            return False
        return True
