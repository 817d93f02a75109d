"""Simulated workers around the real parts: REFE's exchange on one side, the batcher on the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tarragon.experts.batcher import Action, Batcher, RunBatch, WaitUntil
from tarragon.messages import DataFlag
from tarragon.refe.exchange import Exchange, Send
from tarragon.simulate.audit import Frame, WorkerKey

if TYPE_CHECKING:
    from tarragon.simulate.cluster import Cluster

_RETRY_US = 1_000


class AttentionWorker:
    """Computes for a while, sends its rows to all expert workers, waits for all answers; layer by layer."""

    def __init__(self, cluster: Cluster, name: str, epoch: int, pace: float) -> None:
        self.cluster, self.pace = cluster, pace
        self.key: WorkerKey = (name, epoch)
        self.alive = True
        self.step = 0
        self.layer = 0
        self.pairs = 0
        self.in_step = self.prefill = self.continues = self.exchanging = False
        self.unplaced = 0
        """Rows of dead expert workers that no live one could take yet."""
        self._links: list[ExpertWorker | None] = []
        self._exchange = Exchange()
        self._began_us = 0

    def connect(self, expert: ExpertWorker) -> None:
        self._links.append(expert)
        expert.accept(self)

    # ------------------------------------------------------------------ steps

    def next_step(self) -> None:
        if not self.alive:
            return
        cluster, load, random = self.cluster, self.cluster.load, self.cluster.random
        if not cluster.take_step(self.key[0]):
            return
        self.step += 1
        self.layer = 0
        prompt = random.random() < load.prompt_share
        self.pairs = random.randint(*(load.prompt_pairs if prompt else load.decode_pairs))
        self.prefill = self.pairs > cluster.config.decode_pairs_max
        self.pauses = random.random() < load.pause_share or not cluster.has_steps(self.key[0])
        # Some pauses are foreseen; others come as a surprise after a step that promised another.
        self.continues = not self.pauses or random.random() < 0.5
        self.in_step = True
        self._began_us = cluster.clock.now
        self._announce(begin=True)
        self._compute()

    def _end_step(self) -> None:
        cluster, load, random = self.cluster, self.cluster.load, self.cluster.random
        cluster.step_ended(self.pace, cluster.clock.now - self._began_us, self.prefill)
        self.in_step = False
        delay = self._vary(load.between_steps_us)
        if self.pauses:
            if self.continues:
                self._announce(begin=False)
            delay += random.randint(0, load.pause_us)
        cluster.clock.after(delay, self.next_step)

    def _announce(self, *, begin: bool) -> None:
        for expert in self._links:
            if expert is not None:
                link_us = self.cluster.load.link_us
                self.cluster.clock.after(link_us, expert.on_announcement, self, begin, self.prefill)

    # ------------------------------------------------------------------ layers

    def _vary(self, base_us: float) -> int:
        jitter = self.cluster.load.jitter
        return int(base_us * self.pace * self.cluster.random.uniform(1 - jitter, 1 + jitter))

    def _compute(self) -> None:
        load = self.cluster.load
        self.cluster.clock.after(self._vary(load.layer_us + load.layer_pair_us * self.pairs), self._dispatch)

    def _dispatch(self) -> None:
        if not self.alive:
            return
        if not any(self._links):
            self.cluster.clock.after(_RETRY_US, self._dispatch)
            return
        self.exchanging = True
        live = tuple(slot for slot, expert in enumerate(self._links) if expert is not None)
        for send in self._exchange.begin(live, self._spread(self.pairs)):
            self._send(send)

    def _spread(self, pairs: int) -> list[int]:
        """Rows for each slot, as an uneven gate would have it; now and then one gets none."""
        random = self.cluster.random
        weights = [
            0.0 if expert is None or random.random() < 0.1 else random.uniform(0.5, 1.5)
            for expert in self._links
        ]
        live = [slot for slot, expert in enumerate(self._links) if expert is not None]
        total = sum(weights)
        counts = [int(pairs * weight / total) if total else 0 for weight in weights]
        counts[random.choice(live)] += pairs - sum(counts)
        return counts

    def _send(self, send: Send) -> None:
        expert = self._links[send.slot]
        if expert is None:
            return
        flags = DataFlag.PREFILL if self.prefill else DataFlag.NONE
        if send.replay:
            flags |= DataFlag.PRIORITY
            self.cluster.replayed += 1
        if self.continues:
            flags |= DataFlag.CONTINUES
        frame = Frame(self.layer, send.pairs, self.step, send.first)
        self.cluster.audit.sent(self.key, expert.key, frame)
        self.cluster.clock.after(self.cluster.load.link_us, expert.on_rows, self, frame, flags)

    def on_answer(self, expert: ExpertWorker, layer: int, step: int) -> None:
        if not self.alive or expert not in self._links:
            return
        self.cluster.audit.demand(
            (layer, step) == (self.layer, self.step) and self.exchanging,
            f"{self.key} got an answer out of place",
        )
        follow_up = self._exchange.answered(self._links.index(expert))
        if follow_up is not None:
            self._send(follow_up)
        self._advance()

    def _advance(self) -> None:
        if not (self.exchanging and self._exchange.done) or self.unplaced:
            return
        self.exchanging = False
        self.layer += 1
        if self.layer < self.cluster.load.moe_layers:
            self._compute()
        else:
            self._end_step()

    # ------------------------------------------------------------------ failures

    def on_lost(self, expert: ExpertWorker) -> None:
        """An expert worker's death was noticed: what it owed goes to the others (5.1)."""
        if not self.alive or expert not in self._links:
            return
        slot = self._links.index(expert)
        self._links[slot] = None
        rows = self._exchange.rows_of(slot)
        if self.exchanging and self._exchange.lost(slot):
            self.unplaced += rows
            self._place()
        self._advance()

    def _place(self) -> None:
        if not self.alive or not self.unplaced:
            return
        if not any(self._links):
            self.cluster.clock.after(_RETRY_US, self._place)
            return
        counts = self._spread(self.unplaced)
        self.unplaced = 0
        for send in self._exchange.replay(counts):
            self._send(send)


class ExpertWorker:
    """The real batcher, and a kernel that takes as long as the load says."""

    def __init__(self, cluster: Cluster, name: str, epoch: int) -> None:
        self.cluster = cluster
        self.key: WorkerKey = (name, epoch)
        self.alive = True
        self.batcher = Batcher(cluster.load.moe_layers, cluster.config)
        self.born_us = cluster.clock.now
        self.died_us: int | None = None
        self.busy_us = 0
        self.events = 0
        self.costs_ns: list[int] = []
        self._busy = False
        self._free_since_us = 0
        self._alarm = 0
        self._workers: dict[WorkerKey, AttentionWorker] = {}
        # As far as this worker has heard: who computes a prompt, and whose frame is here since when.
        self._prefill: set[WorkerKey] = set()
        self._here: dict[WorkerKey, int] = {}
        self._may_wait: dict[WorkerKey, bool] = {}

    def accept(self, worker: AttentionWorker) -> None:
        self._workers[worker.key] = worker
        self.batcher.worker_joined(worker.key, self.cluster.clock.now)

    def on_left(self, worker: AttentionWorker) -> None:
        if self.alive and self._workers.pop(worker.key, None) is not None:
            self._here.pop(worker.key, None)
            self._event(self.batcher.worker_left, worker.key, self.cluster.clock.now)
            self._act()

    def on_announcement(self, worker: AttentionWorker, begin: bool, prefill: bool) -> None:
        if not self.alive or worker.key not in self._workers:
            return
        now = self.cluster.clock.now
        if begin:
            (self._prefill.add if prefill else self._prefill.discard)(worker.key)
            self._event(self.batcher.step_begin, worker.key, 0, now, prefill)
        else:
            self._event(self.batcher.step_end, worker.key, now)
        self._act()

    def on_rows(self, worker: AttentionWorker, frame: Frame, flags: DataFlag) -> None:
        if not self.alive or worker.key not in self._workers:
            return
        now = self.cluster.clock.now
        if self._event(
            self.batcher.rows, worker.key, frame.layer, frame.pairs, frame.step, int(flags), now, frame.first
        ):
            self._answer(worker.key, frame.layer, frame.step)
        else:
            self._here[worker.key] = now
            self._may_wait[worker.key] = not flags & (DataFlag.PREFILL | DataFlag.PRIORITY)
        self._act()

    def _answer(self, key: WorkerKey, layer: int, step: int) -> None:
        self.cluster.audit.answered(key, self.key, layer)
        self.cluster.clock.after(self.cluster.load.link_us, self._workers[key].on_answer, self, layer, step)

    # ------------------------------------------------------------------ the loop

    def _act(self) -> None:
        if self._busy or not self.alive:
            return
        self._alarm += 1
        expired = self.batcher.stats.waits_expired
        action: Action = self._timed(self.batcher.next_action, self.cluster.clock.now)
        if self.batcher.stats.waits_expired != expired:
            self.cluster.wait_expired(self.key)
        if isinstance(action, RunBatch):
            self._run(action)
        elif isinstance(action, WaitUntil):
            self._check_wait(action)
            self.cluster.clock.at(action.deadline_us, self._on_alarm, self._alarm)
        else:
            self.cluster.audit.demand(not self._here, f"{self.key} idles over a frame")

    def _on_alarm(self, number: int) -> None:
        if number == self._alarm:
            self._act()

    def _run(self, batch: RunBatch) -> None:
        cluster, load = self.cluster, self.cluster.load
        cluster.audit.running(self.key, batch)
        for member in batch.members:
            held_us = cluster.clock.now - max(self._here.get(member.key, 0), self._free_since_us)
            held_us_max = cluster.config.batch_join_wait_us_max if self._may_wait[member.key] else 0
            cluster.audit.demand(
                held_us <= held_us_max, f"{self.key} idled {held_us} us over a frame of {member.key}"
            )
        self._busy = True
        duration_us = int(
            (load.batch_us + load.batch_pair_us * batch.pairs) * cluster.random.uniform(0.95, 1.05)
        )
        self.busy_us += duration_us
        cluster.clock.after(duration_us, self._on_computed)

    def _on_computed(self) -> None:
        if not self.alive:
            return
        self._busy = False
        self._free_since_us = self.cluster.clock.now
        for member in self._event(self.batcher.batch_done, self.cluster.clock.now):
            del self._here[member.key]
            self._answer(member.key, member.layer, member.step)
        self._act()

    def _check_wait(self, wait: WaitUntil) -> None:
        """Batching never waits for who cannot come, nor for a prefill."""
        demand = self.cluster.audit.demand
        demand(wait.deadline_us > self.cluster.clock.now, f"{self.key} waits for the past")
        demand(bool(wait.workers), f"{self.key} waits for nobody")
        for key in wait.workers:
            demand(key not in self._here, f"{self.key} waits for {key}, which is here")
            demand(key not in self._prefill, f"{self.key} waits for the prefill of {key}")
            demand(key in self._workers, f"{self.key} waits for {key}, which has left")

    # ------------------------------------------------------------------ cost

    def _event(self, method: Callable[..., Any], *args: Any) -> Any:
        self.events += 1
        return self._timed(method, *args)

    def _timed(self, method: Callable[..., Any], *args: Any) -> Any:
        if not self.cluster.measure:
            return method(*args)
        start = time.perf_counter_ns()
        result = method(*args)
        self.costs_ns.append(time.perf_counter_ns() - start)
        return result
