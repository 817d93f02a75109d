"""An attention worker's checkpoints as a whole: what is written, restored and reported (section 6)."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Mapping
from typing import Any

import torch
from vllm.v1.request import RequestStatus

from tarragon.attention import capture, windows
from tarragon.attention.baseline import Snapshot
from tarragon.attention.comparison import Comparison
from tarragon.attention.reprotect import Reprotector
from tarragon.attention.resume import Resumer, Seat
from tarragon.boot import Boot
from tarragon.checkpoint.bucket import Bucket
from tarragon.checkpoint.client import StoreClient
from tarragon.checkpoint.mode import Mode
from tarragon.checkpoint.mode import parse as parse_mode
from tarragon.checkpoint.restore import Restorer
from tarragon.checkpoint.writer import UNRESTORABLE, Checkpointer


class Checkpoints:
    """Built once the engine stands; ``prepare``, ``begin``, ``load`` and ``end`` frame every step of it.

    Args:
        runner: the engine's model runner.
        attempts: attempt number of every request that this worker has, kept by whoever takes requests.
    """

    def __init__(
        self, engine: Any, runner: Any, boot: Boot, fingerprint: str, attempts: Mapping[str, int]
    ) -> None:
        self._scheduler, self._runner, self._attempts = engine.scheduler, runner, attempts
        self.writer = Checkpointer()
        self.restorer = Restorer(fingerprint)
        self.layers = capture.watch(runner, self.writer) if windows.are_known(self._scheduler) else []
        groups = runner.kv_cache_config.kv_cache_groups
        self._block_sizes = [group.kv_cache_spec.block_size for group in groups]
        exact = not runner.model_config.use_mla
        held = windows.first_held(self._scheduler)
        self.seat = Seat(self.restorer, self.layers, self._block_sizes, held, prompts_may_be_cut=exact)
        self.resumer = Resumer(engine, runner, self.seat)
        self._scheduler.connector = self.seat
        self._granted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._store_up = False
        self._asked_mode = self._mode = parse_mode(boot.config.checkpoint_mode)
        self._reprotect = True
        self.reprotector = Reprotector(self._scheduler, exact=exact)
        self.writer.enabled = self._mode.writes
        self._comparison = Comparison()
        self._snapshot = Snapshot(runner)
        self._steps = 0
        if not self.layers:
            print("no checkpoints: the model keeps state that is no plain KV cache", file=sys.stderr)
            return
        self._shape = capture.bucket_shape(runner, self.layers, fingerprint)
        self.client = StoreClient(
            boot,
            self._shape.total_bytes,
            on_bucket=self._take,
            on_peer=self.restorer.add,
            on_lost=self._lost,
            on_gone=self.restorer.drop,
        )
        self.client.start()

    def wait_for_store(self, timeout_s: float, room_timeout_s: float) -> None:
        """Until it has shown other workers' checkpoints; without it, what they ran is computed anew.

        If it has no room, until there is some: others serve meanwhile, and what runs here shall be protected.
        """
        if not self.layers:
            return
        if not self.client.connected.wait(timeout_s):
            print(f"the checkpoint store was not reached in {timeout_s:g} s", file=sys.stderr)
        elif self._mode.writes and self.client.refusal and not self.client.granted.wait(room_timeout_s):
            print(f"no room for checkpoints in {room_timeout_s:g} s, going on without", file=sys.stderr)

    def counters(self) -> dict[str, float]:
        """For the orchestrator: ``bucket`` is 1 while rows are written and the store is there."""
        # An idle worker takes its bucket, and another way to checkpoint, up with its next step.
        has_bucket = self.writer.bucket is not None or not self._granted.empty()
        writes = self._asked_mode.segments and (self._mode.segments or not self._scheduler.running)
        protected = has_bucket and self._store_up and writes
        return {
            "bucket": float(protected),
            "requests_behind": float(self.reprotector.missing),
            "needs_checkpoints": float(not self.reprotector.exact),
            "requests_unprotected": float(self._unprotected(protected)),
            "checkpoint_ahead_s": self.writer.ahead_s,
            "snapshot_bytes": float(self._snapshot.bytes_copied),
            "store_frames_malformed": float(self.client.frames_malformed if self.layers else 0),
            **self._comparison.counters(),
            **self.writer.counters.as_dict(),
            **self.restorer.counters.as_dict(),
        }

    def _unprotected(self, protected: bool) -> int:
        """Running requests whose rows no bucket keeps: the death of this worker would cost their prefill."""
        running = len(self._scheduler.running)
        if not protected:
            return running
        return max(0, running - len(self.writer.recorded)) + self.reprotector.missing

    # ------------------------------------------------------------------ from other threads

    def ask_mode(self, text: str, reprotect: bool = True) -> None:
        """Checkpoint in another way from the next step on; ``reprotect`` what ran without before."""
        try:
            self._reprotect = reprotect
            self._asked_mode = parse_mode(text)
        except ValueError as error:
            print(f"not obeyed: {error}", file=sys.stderr)

    def _take(self, fd: int) -> None:
        self._store_up = True
        if self.writer.bucket is None and self._granted.empty():
            self._granted.put(os.dup(fd))

    def _lost(self) -> None:
        self._store_up = False

    # ------------------------------------------------------------------ a step

    def prepare(self) -> None:
        """Between steps: take up a bucket or a way to checkpoint, and protect what runs without.

        Raises Fenced: who wakes after its requests were taken away may find none of them left to run.
        """
        self.writer.check_seal()
        while not self._granted.empty():
            fd = self._granted.get_nowait()
            try:
                self.writer.attach(Bucket.map(fd, self._shape))
            finally:
                os.close(fd)
            if self._mode.segments:
                self.reprotector.began()
        if self._mode != self._asked_mode:
            self._change(self._mode, self._asked_mode)
            self._mode = self._asked_mode
        self.reprotector.poll()

    def _change(self, old: Mode, new: Mode) -> None:
        writer = self.writer
        if old.alternate or new.alternate:
            writer.enable(False)  # what one of the two has written is of no use to the other
            self._comparison = Comparison()
        writer.enable(new.writes)
        if not new.segments:
            self.reprotector.ended()
        elif not old.segments and writer.bucket is not None and self._reprotect:
            self.reprotector.began()

    def begin(self, scheduler_output: Any) -> None:
        """Before a step: take back the records whose blocks it may overwrite. Raises Fenced."""
        writer, tokens = self.writer, scheduler_output.total_num_scheduled_tokens
        if self._mode.alternate and not self._has_checkpoints(scheduler_output):
            capture.Capture.noted = None
            return
        capture.Capture.noted = writer.begin_step(tokens)
        writer.check_seal()
        writer.release(scheduler_output.finished_req_ids)
        # One may go on in the same step, in blocks of its own that are in another order now.
        writer.release(scheduler_output.preempted_req_ids or ())
        absent = writer.recorded - scheduler_output.num_scheduled_tokens.keys()
        if absent:
            writer.release([name for name in absent if not self._runs(name)])
        if scheduler_output.kv_cache_block_copies:
            writer.copy_blocks(scheduler_output.kv_cache_block_copies, max(self._block_sizes))

    def _runs(self, name: str) -> bool:
        request = self._scheduler.requests.get(name)
        return request is not None and request.status == RequestStatus.RUNNING

    def _has_checkpoints(self, scheduler_output: Any) -> bool:
        """Whether this step is one with checkpoints where those with and without are compared."""
        tokens = scheduler_output.total_num_scheduled_tokens
        decodes = tokens == len(scheduler_output.num_scheduled_tokens)
        return self._comparison.begin(tokens if decodes else 0)

    def load(self, scheduler_output: Any) -> None:
        """Just before the forward pass: put restored rows into the cache."""
        if scheduler_output.kv_connector_metadata.loads:
            self.seat.load(scheduler_output.kv_connector_metadata.loads)

    def end(self, scheduler_output: Any) -> None:
        """Output commit: after the forward pass, before anything of it is shown."""
        self._steps += 1
        if self._mode.pause_steps and self._steps % self._mode.pause_steps == 0:
            self._snapshot.take()
        if capture.Capture.noted is not None:
            self._commit(scheduler_output)
        if self._mode.alternate:
            self._comparison.end()

    def _commit(self, scheduler_output: Any) -> None:
        batch, scheduled = self._runner.input_batch, scheduler_output.num_scheduled_tokens
        names, tokens = batch.req_ids, scheduler_output.total_num_scheduled_tokens
        self.writer.commit(
            names,
            batch.num_computed_tokens_cpu_tensor,
            None if tokens == len(names) == len(scheduled) else [scheduled[name] for name in names],
            self._tables,
            _unrestorable if self._mode.alternate else self._attempts.get,
        )

    def _tables(self) -> list[torch.Tensor]:
        tables = self._runner.input_batch.block_table
        return [tables[group].block_table.cpu for group in range(len(self._block_sizes))]


def _unrestorable(request_id: str) -> int:
    """Nobody may go on from records that every other step writes."""
    return UNRESTORABLE
