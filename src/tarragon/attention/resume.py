"""How does a request go on that began on another attention worker? As its own continuation (6.2).

The tokens that were sent are its *output*, so that limits, penalties, grammars, usage and finish reasons are
as if it had never moved. It is queued the way the engine queues a request that it preempted; the scheduler
then asks who sits in its connector's seat how many positions need no computing.
"""

from __future__ import annotations

import concurrent.futures
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.sampling_params import SamplingType
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from tarragon.attention.capture import CachedLayer
from tarragon.attention.randomness import PositionalGenerator
from tarragon.attention.windows import FirstHeld
from tarragon.checkpoint.bucket import slots_at
from tarragon.checkpoint.restore import LayerRows, Restorer, Source
from tarragon.config import RESTORE_THREADS, RESTORED_POSITIONS_PER_STEP, ROWS_PATIENCE_S
from tarragon.gateway.wire import Add, Origin, Resumed


class Load(NamedTuple):
    """Rows to be put into a request's new blocks before the step's forward pass."""

    blocks: tuple[np.ndarray, ...]
    rows: list[LayerRows]


class Expected(NamedTuple):
    """A request from elsewhere, and where its committed rows lie."""

    sources: Sequence[Source]
    """The longest first; the others are for when it is of no use."""
    origins: Sequence[Origin]


class Reading(NamedTuple):
    """Rows of positions [start, stop) on their way out of another worker's bucket."""

    start: int
    stop: int
    job: concurrent.futures.Future[list[LayerRows] | None]


class Foreseen(NamedTuple):
    """What was begun for a request from elsewhere before the engine took it up."""

    sources: Sequence[Source]
    reading: Reading | None


class Loads(KVConnectorMetadata):
    """What the scheduler hands to the model runner with a step."""

    def __init__(self, loads: list[Load]) -> None:
        self.loads = loads


class Seat(KVConnectorBase_V1, SupportsHMA):
    """Sits where vLLM's scheduler expects a KV connector, and knows of rows in other workers' buckets."""

    def __init__(
        self,
        restorer: Restorer,
        layers: Sequence[CachedLayer],
        block_sizes: Sequence[int],
        first_held: FirstHeld,
        *,
        prompts_may_be_cut: bool,
    ) -> None:
        """``prompts_may_be_cut``: a prompt's last position gives the same bits when it is computed alone.

        With latent attention it does not: alone, it takes the way of decoded tokens.
        """
        # Not the base's: that one wants a transfer configuration, which would change the engine elsewhere.
        self._restorer = restorer
        self._kinds = [layer.kind for layer in layers]
        self._layers = layers
        self._block_sizes = block_sizes
        self._first_held = first_held
        self._prompts_may_be_cut = prompts_may_be_cut
        self._expected: dict[str, Expected] = {}
        self._readings: dict[str, Reading] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(RESTORE_THREADS, "restore")
        self._positions_left = RESTORED_POSITIONS_PER_STEP
        """That this step may still take up."""
        self._patience_s = ROWS_PATIENCE_S
        """That this step may still wait for rows."""
        self._loads: list[Load] = []
        self.resumed: dict[str, Resumed] = {}
        """Requests from elsewhere that have not delivered yet; whoever sends outputs takes them out."""

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def foresee(self, request_id: str, origins: Sequence[Origin], prompt_tokens: int, sent: int) -> Foreseen:
        """Look for the rows of a request, and begin to read them; called by the gateway link's thread.

        Its prompt has ``prompt_tokens``, and ``sent`` tokens of its output were sent.
        """
        sources = self._find(request_id, origins, has_begun=sent > 0)
        if not sources:
            return Foreseen((), None)
        stop = min(sources[0].record.positions, prompt_tokens + sent - 1)
        return Foreseen(sources, self._read_from(request_id, Expected(sources, origins), 0, stop))

    def expect(
        self,
        request_id: str,
        origins: Sequence[Origin],
        *,
        has_begun: bool,
        foreseen: Foreseen | None = None,
    ) -> int:
        """A request is about to be queued: look for its rows, unless they were foreseen.

        ``has_begun``: tokens of it were sent, so that no position of its prompt is left to be computed.
        Returns the positions found.
        """
        self.resumed[request_id] = Resumed()
        if foreseen is None or not foreseen.sources:
            foreseen = Foreseen(self._find(request_id, origins, has_begun=has_begun), None)
        if not foreseen.sources:
            self._restorer.counters.restore_misses += 1
            return 0
        self._expected[request_id] = Expected(foreseen.sources, origins)
        if foreseen.reading is not None:
            self._readings[request_id] = foreseen.reading
        return foreseen.sources[0].record.positions

    def _find(self, request_id: str, origins: Sequence[Origin], *, has_begun: bool) -> Sequence[Source]:
        if not self._layers or not (has_begun or self._prompts_may_be_cut):
            return ()
        start = time.perf_counter()
        sources = self._restorer.find(request_id, origins)
        self._restorer.spent(time.perf_counter() - start)
        return sources

    def _read_from(self, request_id: str, expected: Expected, start: int, stop: int) -> Reading:
        return Reading(start, stop, self._pool.submit(self._read, request_id, expected, start, stop))

    def forget(self, request_id: str) -> None:
        self._expected.pop(request_id, None)
        self._readings.pop(request_id, None)
        self.resumed.pop(request_id, None)

    # ------------------------------------------------------------------ called by the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Positions beyond ``num_computed_tokens`` that need no computing; the last one always does.

        None as long as their rows are being read, or if this step has enough to load: the scheduler asks
        again with the next step, and meanwhile other requests go on.
        """
        if request.request_id in self.resumed:
            self.resumed[request.request_id] = Resumed(cached=num_computed_tokens)
        expected = self._expected.get(request.request_id)
        if expected is None:
            return 0, False
        stop = min(expected.sources[0].record.positions, request.num_tokens - 1)
        if stop <= num_computed_tokens:
            return 0, False
        reading = self._readings.get(request.request_id)
        if reading is None or reading.start > num_computed_tokens or reading.stop != stop:
            reading = self._read_from(request.request_id, expected, num_computed_tokens, stop)
            self._readings[request.request_id] = reading
        if self._positions_left <= 0 or not self._has_read(reading):
            return None, False
        if reading.job.result() is None:
            return self._without_first(request, num_computed_tokens, expected)
        return stop - num_computed_tokens, False

    def _has_read(self, reading: Reading) -> bool:
        """Whether the rows are there; what is short of it is waited for, as a step is long."""
        if not reading.job.done() and self._patience_s > 0:
            start = time.perf_counter()
            concurrent.futures.wait([reading.job], self._patience_s)
            self._patience_s -= time.perf_counter() - start
        return reading.job.done()

    def _without_first(
        self, request: Any, num_computed_tokens: int, expected: Expected
    ) -> tuple[int | None, bool]:
        """The longest commit is of no use: go on with the next one, or compute the request anew."""
        name, left = request.request_id, expected.sources[1:]
        self.forget(name)
        self.resumed[name] = Resumed(cached=num_computed_tokens)
        instead = f"that of {left[0].record.positions} positions is tried" if left else "computed anew"
        print(f"WARNING request {name}: its checkpoint is not usable: {instead}", file=sys.stderr)
        if not left:
            return 0, False
        self._expected[name] = Expected(left, expected.origins)
        return self.get_num_new_matched_tokens(request, num_computed_tokens)

    def wait_for_rows(self, timeout_s: float) -> None:
        """The engine has nothing else to do: wait until rows are read, if any are being read."""
        jobs = [reading.job for reading in self._readings.values() if not reading.job.done()]
        if jobs:
            concurrent.futures.wait(jobs, timeout_s, concurrent.futures.FIRST_COMPLETED)

    def _read(self, request_id: str, expected: Expected, start: int, stop: int) -> list[LayerRows] | None:
        """Read and check positions [start, stop), beside the engine; None if they are of no use."""
        begin = time.perf_counter()
        rows = self._rows(expected.sources[0], start, stop)
        if rows is None and (newer := self._committed_since(request_id, expected)) is not None:
            rows = self._rows(newer, start, stop)
        self._restorer.spent(time.perf_counter() - begin)
        return rows

    def _rows(self, source: Source, start: int, stop: int) -> list[LayerRows] | None:
        """Those of positions [start, stop) that position ``stop`` attends to.

        None also if the writer's sliding window has moved beyond one of them: a step was perhaps under way,
        and a block that it gave back may have other rows by now.
        """
        starts = [max(start, first) for first in self._first_held(stop)]
        left = self._first_held(source.record.positions)
        if any(first < held for first, held in zip(starts, left, strict=True)):
            self._restorer.count_unusable(absent=True)
            return None
        return self._restorer.read(source, starts, stop, self._kinds)

    def _committed_since(self, request_id: str, expected: Expected) -> Source | None:
        """A newer commit of a living worker, which may have ended a step before it learned to hold."""
        source = expected.sources[0]
        if source.bucket.unchanged(source.record):
            return None
        for newer in self._restorer.find(request_id, expected.origins):
            if newer.bucket is source.bucket and newer.record.positions >= source.record.positions:
                return newer
        return None

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        reading = self._readings.pop(request.request_id, None)
        self._expected.pop(request.request_id, None)
        if not num_external_tokens or reading is None:
            return
        start, rows = reading.stop - num_external_tokens, reading.job.result()
        assert rows is not None
        if start > reading.start:  # the cache has got some of them from a sibling meanwhile
            rows = [layer.beyond(start) for layer in rows]
        self.resumed[request.request_id] = Resumed(restored=num_external_tokens, cached=start)
        tables = tuple(np.array(ids, dtype=np.int32) for ids in blocks.get_block_ids())
        self._loads.append(Load(tables, rows))
        self._positions_left -= num_external_tokens
        counters = self._restorer.counters
        counters.restored_requests += 1
        counters.restored_positions += num_external_tokens
        counters.restored_bytes += sum(layer.key.nbytes + layer.value.nbytes for layer in rows)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        loads, self._loads = self._loads, []
        self._positions_left, self._patience_s = RESTORED_POSITIONS_PER_STEP, ROWS_PATIENCE_S
        return Loads(loads)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self.forget(request.request_id)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids)

    # ------------------------------------------------------------------ called by the model runner

    def load(self, loads: Sequence[Load]) -> None:
        """Give restored rows to the function that wrote them first."""
        begin = time.perf_counter()
        for load in loads:
            for layer, rows in zip(self._layers, load.rows, strict=True):
                group = layer.kind.group
                slots = slots_at(load.blocks[group], self._block_sizes[group], rows.positions.numpy())
                layer.update(rows.key, rows.value, slots)
        self._restorer.spent(time.perf_counter() - begin)

    # The worker's side of vLLM's interface: this engine runs in one process, ``load`` does it all.
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: the runner calls ``load``."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: rows are taken where the cache is written."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""


class Resumer:
    """Queues requests that come from elsewhere; a grammar may have to be compiled first."""

    def __init__(self, engine: Any, runner: Any, seat: Seat) -> None:
        self._engine, self._runner, self._seat = engine, runner, seat
        self._compiling: list[tuple[Request, list[int]]] = []

    @property
    def resumed(self) -> dict[str, Resumed]:
        """See Seat."""
        return self._seat.resumed

    @property
    def waiting(self) -> bool:
        return bool(self._compiling)

    def foresee(self, message: Add) -> Foreseen:
        """Begin to restore a request that the engine will be given; called by the gateway link's thread."""
        request = message.request
        tokens = len(request.prompt_token_ids or ())
        return self._seat.foresee(request.request_id, message.origins, tokens, len(message.sent))

    def add(self, message: Add, foreseen: Foreseen | None) -> None:
        """Queue a request behind the tokens that were sent; called between steps."""
        request, _ = self._engine.preprocess_add_request(message.request)
        self._seat.expect(
            request.request_id, message.origins, has_begun=bool(message.sent), foreseen=foreseen
        )
        if not message.sent:
            self._engine.add_request(request)
        elif request.structured_output_request is not None:
            self._compiling.append((request, message.sent))
            self.poll()
        else:
            self._queue(request, message.sent)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests that wait for their grammar."""
        gone = set(request_ids)
        self._compiling = [entry for entry in self._compiling if entry[0].request_id not in gone]
        for request_id in gone:
            self._seat.forget(request_id)

    def poll(self) -> None:
        """Queue the requests whose grammar is ready."""
        still = []
        for request, sent in self._compiling:
            structured = request.structured_output_request
            if not structured.is_grammar_ready:
                still.append((request, sent))
                continue
            if isinstance(structured.grammar, Exception):
                self._engine.add_request(request)  # the scheduler fails it as it fails any other
                continue
            self._feed(request, sent)
        self._compiling = still

    def _feed(self, request: Request, sent: list[int]) -> None:
        """Bring a fresh grammar to where the request is, token by token as the first time."""
        manager = self._engine.structured_output_manager
        request.status = RequestStatus.PREEMPTED
        for token in sent:
            request.append_output_token_ids(token)
            manager.accept_tokens(request, [token])
        self._enqueue(request)

    def _queue(self, request: Request, sent: list[int]) -> None:
        request.append_output_token_ids(sent)
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions = 1
        request.prefill_stats = None
        params = request.sampling_params
        generator = PositionalGenerator() if params.sampling_type == SamplingType.RANDOM_SEED else None
        self._runner.requests[request.request_id] = CachedRequestState(
            req_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            mm_features=[],
            sampling_params=params,
            generator=generator,
            block_ids=tuple([] for _ in self._runner.kv_cache_config.kv_cache_groups),
            num_computed_tokens=0,
            output_token_ids=list(request.output_token_ids),
            lora_request=request.lora_request,
        )
        self._engine.add_request(request)
