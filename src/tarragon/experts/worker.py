"""The expert worker's process: batch rows by layer over all attention workers and run the experts (5.2)."""

from __future__ import annotations

import os
import select
import time

import numpy as np
import torch

from tarragon import native
from tarragon.boot import Boot
from tarragon.experts.batch_sizes import BatchSizes
from tarragon.experts.batcher import Batcher, BatchError, Member, RunBatch, WaitUntil
from tarragon.experts.control import ControlThread
from tarragon.experts.kernels import ResidentExperts
from tarragon.failpoints import Countdown, wrap
from tarragon.messages import DataFlag, DataFrame, DataKind, Failpoint, RefusalReason
from tarragon.models.expert_weights import ExpertWeights
from tarragon.models.shape import read_model
from tarragon.native.undertaker import spawn_undertaker
from tarragon.transport.link import DataLink
from tarragon.transport.region import Region


def main(boot: Boot) -> None:
    """Run one expert worker until it is told to stop. The process ends with it."""
    from tarragon.attention.engine import fingerprint

    torch.set_num_threads(boot.threads)
    native.load()
    spawn_undertaker()
    _import_kernels()
    model = read_model(boot.model)
    experts = ResidentExperts(model, ExpertWeights(model), boot.expert_memory)
    service = ExpertService(boot, experts)
    control = ControlThread(boot, experts, fingerprint(model), service.report)
    control.on_failpoint = service.arm
    control.on_colleagues = service.share_cores
    control.start()
    service.serve(control)


def _import_kernels() -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()


class ExpertService:
    """The compute thread: doorbells in, batches through the kernel, doorbells out."""

    def __init__(self, boot: Boot, experts: ResidentExperts) -> None:
        self.boot, self.experts = boot, experts
        self._threads = self._threads_wanted = boot.threads
        model = experts.model
        self._batcher = Batcher(len(model.moe_layers), boot.config)
        self._links: dict[int, DataLink] = {}
        self._frames: dict[int, DataFrame] = {}
        self._checked_ids: dict[int, torch.Tensor] = {}
        """Per link int32 [pairs of its region]: expert ids as they were checked; the region's may change."""
        self._poll = select.epoll()
        self._heartbeat_s = boot.config.worker_probe_interval_ms / 1e3
        counts = boot.config.count_batch_sizes
        self._sizes = BatchSizes(len(model.moe_layers), model.experts) if counts else None
        self._pairs = np.zeros((len(model.moe_layers), model.experts), dtype=np.int64)
        self._rows = torch.empty(boot.config.batch_pairs_max, model.hidden, dtype=getattr(torch, model.dtype))
        self._out = torch.empty_like(self._rows)
        self._ids = torch.empty(boot.config.batch_pairs_max, dtype=torch.int32)
        self.counters = {
            "batches": 0.0,
            "pairs": 0.0,
            "frames": 0.0,
            "batch_members": 0.0,
            "refused_frames": 0.0,
            "frames_malformed": 0.0,
            "links_lost": 0.0,
            "late_answers": 0.0,
            "compute_s": 0.0,
            "copy_s": 0.0,
            "idle_s": 0.0,
        }

    def report(self) -> tuple[dict[str, float], list[list[int]]]:
        """Counters since the start and pairs per [layer][expert]; called by the control thread."""
        counters = {**self.counters, "clock_s": time.perf_counter()}
        counters["waits_expired"] = float(self._batcher.stats.waits_expired)
        if self._sizes is not None:
            counters |= self._sizes.counters()
        return counters, self._pairs.tolist()

    def share_cores(self, workers: int) -> None:
        """So many expert workers share the host now: when one dies, the others take its cores (5.1).

        Rows do not depend on the number of threads (exactness). Called by the control thread.
        """
        cores = len(os.sched_getaffinity(0))
        self._threads_wanted = self.boot.config.threads("expert", cores, max(1, workers))

    def arm(self, order: Failpoint) -> None:
        """Die or hang around a batch; called by the control thread."""
        countdown = Countdown(order)
        if order.name == "before-batch":
            wrap(self, "_run", before=lambda _batch: countdown.hit())
        else:
            wrap(self._batcher, "batch_done", before=lambda _now_us: countdown.hit())

    def serve(self, control: ControlThread) -> None:
        self._poll.register(control.wake_fd, select.EPOLLIN)
        beat = control.responder.pulse.beat
        while not control.stopping.is_set():
            beat()  # once a batch, and now and then when there is none: no wedge goes unseen
            action = self._batcher.next_action(_now_us())
            if isinstance(action, RunBatch):
                self._run(action)
                self._receive(control, 0.0)
            elif isinstance(action, WaitUntil):
                self._receive(control, max(0.0, (action.deadline_us - _now_us()) / 1e6))
            else:
                self._receive(control, self._heartbeat_s)

    # ------------------------------------------------------------------ doorbells

    def _receive(self, control: ControlThread, timeout_s: float) -> None:
        start = time.perf_counter()
        events = self._poll.poll(timeout_s)
        self.counters["idle_s"] += time.perf_counter() - start
        for fd, _ in events:
            link = self._links.get(fd)
            if link is None:
                self._take_links(control)
                continue
            for frame in link.recv_ready():
                self._take(fd, link, frame)
            if link.eof:
                self._leave(fd, link)

    def _take_links(self, control: ControlThread) -> None:
        os.eventfd_read(control.wake_fd)
        while not control.links.empty():
            link = control.links.get_nowait()
            fd = link.fileno()
            self._links[fd] = link
            self._checked_ids[fd] = torch.zeros_like(link.region.expert_ids)
            self._poll.register(fd, select.EPOLLIN)
            self._batcher.worker_joined(fd, _now_us())

    def _leave(self, fd: int, link: DataLink) -> None:
        """An attention worker is gone: its rows are left out, nobody waits for it (5.2)."""
        self._poll.unregister(fd)
        del self._links[fd], self._checked_ids[fd]
        self._frames.pop(fd, None)
        self._batcher.worker_left(fd, _now_us())
        link.close()
        self.counters["links_lost"] += 1
        self.counters["frames_malformed"] += link.frames_malformed

    def _take(self, fd: int, link: DataLink, frame: DataFrame) -> None:
        now = _now_us()
        self.counters["frames"] += 1
        if frame.sender_epoch != link.peer_epoch or frame.receiver_epoch != self.boot.epoch:
            self._refuse(link, frame, RefusalReason.STALE_EPOCH)
            return
        try:
            if frame.kind == DataKind.ROWS:
                reason = self._fault(link.region, self._checked_ids[fd], frame)
                if reason is not None:
                    self._refuse(link, frame, reason)
                    return
                answered = self._batcher.rows(
                    fd, frame.layer, frame.pairs, frame.step, frame.flags, now, frame.first
                )
                if answered:  # an empty frame only says that its worker has arrived
                    self._send(link, DataKind.RESULT, frame)
                else:
                    # Not before the batcher has taken it: one that is out of turn must not be answered in
                    # the place of the one that waits here.
                    self._frames[fd] = frame
            elif frame.kind == DataKind.STEP_BEGIN:
                self._batcher.step_begin(fd, frame.layer, now, bool(frame.flags & DataFlag.PREFILL))
            elif frame.kind == DataKind.STEP_END:
                self._batcher.step_end(fd, now)
            else:
                self._refuse(link, frame, RefusalReason.BAD_LAYER)
        except BatchError as error:
            self._refuse(link, frame, error.reason)

    def _fault(self, region: Region, checked: torch.Tensor, frame: DataFrame) -> RefusalReason | None:
        """What is wrong with a ROWS frame, found before any row is read; ids are copied to ``checked``."""
        if frame.layer >= len(self._pairs):
            return RefusalReason.BAD_LAYER
        if frame.first + frame.pairs > region.shape.pairs_max:
            return RefusalReason.BAD_COUNT
        span = slice(frame.first, frame.first + frame.pairs)
        ids = checked.numpy()[span]
        ids[:] = region.expert_ids.numpy()[span]  # what is checked is what is used
        if frame.pairs and not (ids.min() >= 0 and ids.max() < self._pairs.shape[1]):
            return RefusalReason.BAD_COUNT
        if not self.experts.all_resident(frame.layer, ids):
            return RefusalReason.NOT_RESIDENT
        self._pairs[frame.layer] += np.bincount(ids, minlength=self._pairs.shape[1])
        return None

    def _refuse(self, link: DataLink, frame: DataFrame, reason: RefusalReason) -> None:
        self.counters["refused_frames"] += 1
        self._send(link, DataKind.REFUSED, frame, int(reason))

    def _send(self, link: DataLink, kind: DataKind, frame: DataFrame, flags: int = 0) -> None:
        try:
            link.send(
                DataFrame(
                    kind,
                    frame.layer,
                    self.boot.epoch,
                    link.peer_epoch,
                    frame.pairs,
                    frame.step,
                    flags,
                    frame.first,
                )
            )
        except ConnectionError:
            self.counters["late_answers"] += kind == DataKind.RESULT  # its worker waits for it no longer
            link.eof = True  # the poll reports it, and _leave follows

    # ------------------------------------------------------------------ batches

    def _run(self, batch: RunBatch) -> None:
        start = time.perf_counter()
        if self._threads != self._threads_wanted:
            self._threads = self._threads_wanted
            torch.set_num_threads(self._threads)
        members = batch.members
        if len(members) == 1:
            self._run_in_place(members[0])
        else:
            self._run_together(batch)
        counters = self.counters
        counters["compute_s"] += time.perf_counter() - start
        counters["batches"] += 1
        counters["batch_members"] += len(members)
        counters["pairs"] += batch.pairs
        for member in self._batcher.batch_done(_now_us()):
            fd: int = member.key
            self._send(self._links[fd], DataKind.RESULT, self._frames.pop(fd))

    def _run_in_place(self, member: Member) -> None:
        """One attention worker's rows: from and into shared memory, no row is copied."""
        region = self._links[member.key].region
        span = slice(member.first_pair, member.first_pair + member.pairs)
        ids = self._checked_ids[member.key][span]
        self.experts.run(member.layer, region.rows[span], ids, region.results[span])
        if self._sizes is not None:
            self._sizes.note(member.layer, ids.numpy())

    def _run_together(self, batch: RunBatch) -> None:
        """Rows of several attention workers, side by side in one kernel call."""
        regions = [self._links[member.key].region for member in batch.members]
        starts = [member.first_pair for member in batch.members]
        counts = [member.pairs for member in batch.members]
        self._make_room(batch.pairs)
        start = time.perf_counter()
        native.gather_batch(
            [region.rows for region in regions],
            [self._checked_ids[member.key] for member in batch.members],
            starts,
            counts,
            self._rows,
            self._ids,
        )
        gathered = time.perf_counter()
        span = slice(0, batch.pairs)
        self.experts.run(batch.layer, self._rows[span], self._ids[span], self._out[span])
        if self._sizes is not None:
            self._sizes.note(batch.layer, self._ids[span].numpy())
        computed = time.perf_counter()
        native.scatter_batch(self._out, starts, counts, [region.results for region in regions])
        self.counters["copy_s"] += gathered - start + time.perf_counter() - computed

    def _make_room(self, pairs: int) -> None:
        if pairs > self._rows.shape[0]:
            self._rows = self._rows.new_empty(pairs, self._rows.shape[1])
            self._out = torch.empty_like(self._rows)
            self._ids = self._ids.new_empty(pairs)


def _now_us() -> int:
    return time.monotonic_ns() // 1000
