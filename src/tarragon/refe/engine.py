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
from tarragon.config import NO_HOST_WAIT_S, PROBES_OFF_S, Config
from tarragon.messages import DataFlag, DataFrame, DataKind, Peer, RefusalReason, Table
from tarragon.refe.counters import RefeCounters
from tarragon.refe.exchange import Exchange, Send
from tarragon.refe.links import Links, NewLink, NewTable, Post
from tarragon.refe.traffic import FROM_EXPERTS, TO_EXPERTS, TrafficRing
from tarragon.routing.static import StaticRoutes
from tarragon.routing.table import candidate_array, owner_array


class ExpertUnreachable(RuntimeError):
    """No live worker hosts a selected expert, and none came within the limit."""


class Layer(NamedTuple):
    """One layer's work: the rows, where they go, and where each (token, expert) pair lies by now."""

    position: int
    expert_ids: torch.Tensor
    """int32 [T, K]."""
    rows: torch.Tensor
    """[T, H]."""
    pair_slot: torch.Tensor
    pair_row: torch.Tensor
    """int32 [T * K], as ``native.dispatch`` writes them."""


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
        self.counters = RefeCounters()
        self.traffic: TrafficRing | None = None
        """Records what moves and when, if that was asked for (fig. 8)."""
        self.beat: Callable[[], None] = lambda: None
        """Called for every layer and wait for experts: whoever watches this worker sees that it works."""
        self._on_table = on_table
        self._before_table: set[int] = set()
        """Slots that still compute rows which went out under an older table."""
        self._owes_acknowledgement = False
        self._posts: deque[Post] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._links = Links(config, on_lost)
        self._poll = self._links.poll
        self._poll.register(self._wake_fd, select.EPOLLIN)
        self._silence_s = config.probe_silence_ms / 1e3
        self._table: Table | None = None
        self._candidates = np.empty((0, 0, 0), dtype=np.int32)
        self._owners = torch.full((layers, experts), -1, dtype=torch.int32)
        self._owners_of = StaticRoutes().owners if config.static_routing else owner_array
        self._pair_slot = torch.empty(pairs_max, dtype=torch.int32)
        self._pair_row = torch.empty(pairs_max, dtype=torch.int32)
        self._exchange = Exchange()
        self._placed = False
        """A layer's rows lie in the regions: those of dead links as well are still referred to."""
        self._step = 0
        self._flags = DataFlag.NONE
        self._in_step = False
        self.on_gap: Callable[[], None] = lambda: None
        """Called once a layer, when its rows are out and the answers are not yet in (6.1)."""
        self.on_unreachable: Callable[[], None] = lambda: None
        """Called now and then while an expert has no live host: what it raises ends the step."""
        self.on_abandoned: Callable[[], None] = lambda: None
        """Called when a step ends early: what its layers have left must not be met by a later step."""

    # ------------------------------------------------------------------ from the control thread

    def post(self, item: Post) -> None:
        """Hand over a table, a link or the news of a death; thread-safe, never blocks."""
        self._posts.append(item)
        os.eventfd_write(self._wake_fd, 1)

    def probe(self, enabled: bool) -> None:
        """Whether expert workers that are silent are probed from now on; thread-safe."""
        self._silence_s = self.config.probe_silence_ms / 1e3 if enabled else PROBES_OFF_S

    def fileno(self) -> int:
        """Readable when something was posted, for the idle engine loop."""
        return self._wake_fd

    # ------------------------------------------------------------------ steps

    def begin_step(self, tokens: int) -> None:
        """Announce a forward pass over ``tokens`` rows; ``end_step`` says that none follows."""
        self.take_posts()
        self._links.let_go()
        self.beat()
        self._step += 1
        self._flags = DataFlag.NONE
        if tokens * self.top_k > self.config.decode_pairs_max:
            self._flags |= DataFlag.PREFILL
        self._in_step = True
        self._announce(DataKind.STEP_BEGIN)

    def end_step(self) -> None:
        """Announce that no step follows: nobody shall wait for this worker."""
        if self._in_step:
            self._in_step = False
            self._announce(DataKind.STEP_END)
        self._links.let_go()

    def _announce(self, kind: DataKind) -> None:
        for slot in list(self._links.live):
            epoch = self._links.peers[slot].epoch
            self._send(slot, DataFrame(kind, 0, self.epoch, epoch, 0, self._step, self._flags))

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
        start = time.monotonic()
        self.take_posts()
        self.beat()
        replayed_pairs = self.counters.replayed_pairs
        pairs = expert_ids.numel()
        work = Layer(layer_id, expert_ids, token_embeddings, self._pair_slot[:pairs], self._pair_row[:pairs])
        try:
            counts = self._dispatch(work)
            self._placed = True
            sent = time.monotonic()
            if self.traffic is not None:
                self.traffic.add(TO_EXPERTS, layer_id, start, sent, pairs * self.traffic.row_bytes)
            self._begin_exchange(work, counts)
            self.on_gap()
            self._collect(work, sent)
        except ExpertUnreachable:
            self.counters.steps_unreachable += 1
            self.on_abandoned()
            self._abandon(layer_id)
            raise
        finally:
            self._placed = False
        collected = time.monotonic()
        out = torch.empty_like(token_embeddings)
        native.combine(self._links.results, work.pair_slot, work.pair_row, router_weights, out)
        counters = self.counters
        counters.layers += 1
        counters.pairs += pairs
        if counters.replayed_pairs != replayed_pairs:
            counters.replays += 1
            counters.replay_s += collected - sent
        counters.dispatch_s += sent - start
        counters.wait_s += collected - sent
        counters.combine_s += time.monotonic() - collected
        return out

    def _dispatch(self, work: Layer) -> list[int]:
        """Put the rows into the regions of their experts' hosts; returns how many lie in each slot's."""
        deadline, links = 0.0, self._links
        while True:
            counts = torch.zeros(len(links), dtype=torch.int32)
            placed = (work.pair_slot, work.pair_row, counts)
            owners = self._owners[work.position]
            reachable = native.dispatch(work.rows, work.expert_ids, owners, links.rows, links.ids, *placed)
            if reachable:
                return counts.tolist()
            deadline = deadline or time.monotonic() + self.config.expert_unreachable_timeout_s
            self._wait_for_posts(work.position, deadline)

    def _begin_exchange(self, work: Layer, counts: list[int]) -> None:
        lost: list[int] = []
        for send in self._exchange.begin(tuple(self._links.live), counts):
            if not self._send_rows(work.position, send):
                lost.append(send.slot)
        for slot in lost:
            self._replay(work, slot)

    def _collect(self, work: Layer, sent_s: float) -> None:
        """Take answers until none is owed; while they come in time, nothing is asked of anybody."""
        exchange = self._exchange
        late_s = sent_s + self._silence_s
        while not exchange.done:
            lost: list[int] = []
            for fd, _ in self._poll.poll(max(0.0, late_s - time.monotonic())):
                lost += self._serve(work.position, fd)
            if not exchange.done and time.monotonic() >= late_s:
                late_s, hung = self._question(sent_s)
                lost += hung
            for dead in lost:
                self._replay(work, dead)
                late_s = min(late_s, time.monotonic() + self._silence_s)  # the replay is owed as well

    def _serve(self, layer: int, fd: int) -> list[int]:
        """Take up what arrived on one descriptor; returns slots that died with it."""
        links = self._links
        slot = links.at(fd)
        if slot is None:
            return self.woken() if fd == self._wake_fd else []
        link = links.get(slot)
        assert link is not None
        for frame in link.recv_ready():
            follow_up = self._take_answer(layer, slot, frame)
            if follow_up is not None:
                self._send_rows(layer, follow_up)
        if link.eof:
            self.counters.frames_malformed += link.frames_malformed
            self._drop(slot, link.end_cause if link.frames_malformed else "connection closed")
        return [slot] if links.get(slot) is None else []

    def _serve_ready(self, layer: int) -> list[int]:
        """Take what has come while one expert is waited for: until the others' answers are in, no table is
        acknowledged, and the memory for that expert may hang on it. Returns slots that died."""
        return [slot for fd, _ in self._poll.poll(0) for slot in self._serve(layer, fd)]

    def _question(self, sent_s: float) -> tuple[float, list[int]]:
        """Answers are late: probe who owes them. Returns when to ask again, and slots that died."""
        self.beat()
        # A slot whose link was dropped in this very turn still owes, until its rows are replayed.
        owing = sorted(self._exchange.owing & set(self._links.live))
        wake_us, lost = self._links.question(owing, int(sent_s * 1e6))
        self.counters.probes = self._links.probes_sent
        for slot, cause in lost:
            self.counters.links_hung += 1
            self._drop(slot, cause)
        return wake_us / 1e6, [slot for slot, _ in lost]

    def _abandon(self, layer: int) -> None:
        """End the layer without its result: what is still owed is waited for, and goes nowhere.

        An expert worker holds one frame of this worker at a time, so the next step begins when all are back.
        """
        exchange = self._exchange
        sent_s = time.monotonic()
        late_s = sent_s + self._silence_s
        exchange.abandon()
        for slot in exchange.owing - set(self._links.live):
            exchange.lost(slot)
        while not exchange.done:
            lost: list[int] = []
            for fd, _ in self._poll.poll(max(0.0, late_s - time.monotonic())):
                lost += self._serve(layer, fd)
            if not exchange.done and time.monotonic() >= late_s:
                late_s, hung = self._question(sent_s)
                lost += hung
            for dead in lost:
                exchange.lost(dead)

    def _take_answer(self, layer: int, slot: int, frame: DataFrame) -> Send | None:
        peer = self._links.peers[slot]
        if frame.sender_epoch != peer.epoch or frame.receiver_epoch != self.epoch or frame.step != self._step:
            self.counters.stale_frames += 1
            return None
        if frame.kind == DataKind.RESULT and frame.layer == layer:
            if self.traffic is not None:
                self._note_answer(self.traffic, layer, slot)
            follow_up = self._exchange.answered(slot)
            if self._before_table and follow_up is None:
                self._acknowledge(slot)
            return follow_up
        if frame.kind == DataKind.REFUSED:
            # The two sides disagree about what is where: this link is of no use, its rows go elsewhere.
            self._drop(slot, self._refusal(frame.flags))
            return None
        self.counters.stale_frames += 1
        return None

    def _refusal(self, reason: int) -> str:
        """The cause that a REFUSED frame gives. With a reason that there is not, it is malformed itself."""
        try:
            return f"refused a frame: {RefusalReason(reason).name}"
        except ValueError:
            self.counters.frames_malformed += 1
            return f"refused a frame for a reason that there is not: {reason}"

    def _note_answer(self, traffic: TrafficRing, layer: int, slot: int) -> None:
        now = time.monotonic()
        traffic.add(FROM_EXPERTS, layer, now, now, self._exchange.rows_of(slot) * traffic.row_bytes)

    def traffic_latest(self) -> list[list[float]]:
        """Thread-safe; nothing unless it is recorded."""
        return [] if self.traffic is None else [list(event) for event in self.traffic.latest()]

    def _replay(self, work: Layer, dead: int) -> None:
        """Re-dispatch what the dead link owed to the next candidates, as priority frames (5.1)."""
        pending = deque([dead])
        deadline, links, exchange = 0.0, self._links, self._exchange
        while pending:
            slot = pending.popleft()
            if not exchange.lost(slot):
                continue
            while True:
                counts = torch.zeros(len(links), dtype=torch.int32)
                starts = torch.tensor([exchange.rows_of(s) for s in range(len(links))], dtype=torch.int32)
                reachable = native.replay(
                    work.rows,
                    work.expert_ids,
                    self._owners[work.position],
                    slot,
                    links.rows,
                    links.ids,
                    starts,
                    work.pair_slot,
                    work.pair_row,
                    counts,
                )
                if reachable:
                    break
                deadline = deadline or time.monotonic() + self.config.expert_unreachable_timeout_s
                pending.extend(self._wait_for_posts(work.position, deadline))
                pending.extend(self._serve_ready(work.position))
            moved = counts.tolist()
            self.counters.replayed_pairs += sum(moved)
            for send in exchange.replay(moved):
                if not self._send_rows(work.position, send):
                    pending.append(send.slot)

    # ------------------------------------------------------------------ links and tables

    def woken(self) -> list[int]:
        """``take_posts`` for whoever has waited on ``fileno``: it is read even if the post is taken."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        return self.take_posts()

    def take_posts(self) -> list[int]:
        """Take up what the control thread posted; returns the slots that died."""
        dead: list[int] = []
        if not self._posts:
            return dead
        while self._posts:
            item = self._posts.popleft()
            if isinstance(item, NewTable):
                self._table, self._candidates = item.table, candidate_array(item.table)
                self._owes_acknowledgement = True
                self._before_table |= self._exchange.owing & set(self._links.live)
            elif isinstance(item, NewLink):
                self._add(item)
            else:
                slot = self._links.find(item.worker_id, item.epoch)
                if slot is not None:
                    self._drop(slot, item.cause)
                    dead.append(slot)
        self._resolve()
        self._acknowledge()
        return dead

    def _acknowledge(self, returned: int | None = None) -> None:
        """Say that the newest table holds, once ``returned`` and all others have given back what they got
        under an older one: with that an expert worker may drop what the table no longer names."""
        if returned is not None:
            self._before_table.discard(returned)
        if self._owes_acknowledgement and not self._before_table:
            assert self._table is not None
            self._owes_acknowledgement = False
            self._on_table(self._table.version)

    def _wait_for_posts(self, layer: int, deadline: float) -> list[int]:
        """Wait for a table or link that makes the layer's experts reachable; returns slots that died.

        That there is none may also mean that all expert workers have given this worker up.
        """
        self.beat()
        self.on_unreachable()
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise ExpertUnreachable(
                f"an expert of layer {layer} has no live host, and none came within "
                f"{self.config.expert_unreachable_timeout_s:g} s"
            )
        select.select([self._wake_fd], [], [], min(remaining, NO_HOST_WAIT_S))
        return self.woken()

    def _add(self, new: NewLink) -> None:
        workers = [] if self._table is None else self._table.workers
        if all((peer.worker_id, peer.epoch) != (new.peer.worker_id, new.peer.epoch) for peer in workers):
            new.probes.close()  # it was declared dead while it was being dialled
            new.link.close()
            return
        # Slots of dead links are taken again only between layers, when nothing refers to their rows.
        self._links.add(new, reuse=not self._placed)

    def _drop(self, slot: int, cause: str) -> None:
        if self._links.drop(slot, cause):
            self.counters.links_lost += 1
            self._resolve()
            self._acknowledge(slot)

    def _resolve(self) -> None:
        """Recompute who owns what from the table and the links that are up."""
        if self._table is None:
            return
        slots = self._links.slots_of(self._table)
        owner = self._owners_of(self._table, slots >= 0, self._candidates)
        # With a -1 at its end, an expert without a live host (-1) gets that, even if no worker is left.
        self._owners = torch.from_numpy(np.append(slots, np.int32(-1))[owner])

    # ------------------------------------------------------------------ sending

    def _send_rows(self, layer: int, send: Send) -> bool:
        flags = self._flags | DataFlag.CONTINUES
        if send.replay:
            flags |= DataFlag.PRIORITY
            if self._links.get(send.slot) is not None:
                self._links.owes(send.slot)
        epoch, step = self._links.peers[send.slot].epoch, self._step
        frame = DataFrame(DataKind.ROWS, layer, self.epoch, epoch, send.pairs, step, flags, send.first)
        return self._send(send.slot, frame)

    def _send(self, slot: int, frame: DataFrame) -> bool:
        if self._links.send(slot, frame):
            return True
        self._drop(slot, "connection closed")
        return False
