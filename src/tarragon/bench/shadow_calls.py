"""Calls of expert kernels that are timed, for `tarragon bench shadow`; one may run in a second process."""

from __future__ import annotations

import os
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tarragon.messages import ExpertId

if TYPE_CHECKING:
    import torch

    from tarragon.experts.kernels import ResidentExperts
    from tarragon.models.shape import MoeModel

PRIMARY, SHADOW = 0, 1
_ORDER: Final = struct.Struct("<II")
"""Layer and rows of one call."""


class Beside:
    """A process that runs one call at a time for this one, at the same time; it ends with it.

    ``make`` is called in the new process and returns what it runs. Fork it before any parallel region.
    """

    def __init__(self, make: Callable[[], Callable[[int, int], None]]) -> None:
        theirs, self._orders = os.pipe()
        self._answers, ours = os.pipe()
        if os.fork() == 0:
            os.close(self._orders)
            os.close(self._answers)
            try:
                _obey(make(), theirs, ours)
            finally:
                os._exit(0)
        os.close(theirs)
        os.close(ours)

    def start(self, layer: int, rows: int) -> None:
        os.write(self._orders, _ORDER.pack(layer, rows))

    def wait(self) -> None:
        """Until the call is through. Raises RuntimeError if the process is gone."""
        if not os.read(self._answers, 1):
            raise RuntimeError("the process that runs the second expert is gone")


def _obey(run: Callable[[int, int], None], orders: int, answers: int) -> None:
    while raw := os.read(orders, _ORDER.size):
        run(*_ORDER.unpack(raw))
        os.write(answers, b".")


class _Shadow:
    """The second expert of every layer, in a process of its own."""

    def __init__(self, shape: MoeModel, threads: int, rows_max: int) -> None:
        import torch

        from tarragon.experts.kernels import ResidentExperts
        from tarragon.models.expert_weights import ExpertWeights

        torch.set_num_threads(threads)
        self._experts = ResidentExperts(shape, ExpertWeights(shape))
        for layer in range(len(shape.moe_layers)):
            self._experts.load(ExpertId(layer, SHADOW))
        self._rows = torch.randn(rows_max, shape.hidden).to(getattr(torch, shape.dtype))
        self._out = torch.empty_like(self._rows)
        self._ids = torch.full((rows_max,), SHADOW, dtype=torch.int32)

    def run(self, layer: int, rows: int) -> None:
        self._experts.run(layer, self._rows[:rows], self._ids[:rows], self._out[:rows])


class Calls:
    """The resident experts of one process, and calls of them that are timed."""

    def __init__(self, model: Path, threads: int, calls: int, rows_max: int) -> None:
        import torch
        from vllm.platforms import current_platform

        from tarragon.experts.kernels import ResidentExperts
        from tarragon.models.expert_weights import ExpertWeights
        from tarragon.models.shape import read_model

        current_platform.import_kernels()
        shape = read_model(model)
        self._beside = Beside(lambda: _Shadow(shape, threads, rows_max).run)
        torch.set_num_threads(threads)
        self.calls, self.expert_bytes, self._threads = calls, shape.expert_bytes, threads
        self._cpu_s = self._wall_s = 0.0
        self.layers = len(shape.moe_layers)
        self.experts: ResidentExperts = ResidentExperts(shape, ExpertWeights(shape))
        for layer in range(self.layers):
            self.experts.load(ExpertId(layer, PRIMARY))
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, shape.dtype)
        self.rows = torch.randn(rows_max, shape.hidden, generator=generator).to(dtype)
        self.out = torch.empty_like(self.rows)
        self.primary = torch.full((rows_max,), PRIMARY, dtype=torch.int32)
        self.shadow = torch.full((rows_max,), SHADOW, dtype=torch.int32)

    @property
    def on_core_share(self) -> float:
        """Of the time that was measured, the part in which this process had its cores."""
        return self._cpu_s / (self._wall_s * self._threads)

    def with_shadow(self, *, loaded: bool) -> None:
        """Load a second expert in every layer, or give its memory back; the primary stays where it lies."""
        act = self.experts.load if loaded else self.experts.unload
        for layer in range(self.layers):
            act(ExpertId(layer, SHADOW))

    def alone(self, rows: int) -> float:
        """Seconds per call of the primary with all rows."""
        return self._timed(lambda layer: self._run(layer, self.primary[:rows], 0))

    def in_turn(self, rows: int) -> float:
        """Seconds per call of both experts, half of the rows each, in one call of the kernel."""
        import torch

        ids = torch.cat((self.primary[: rows - rows // 2], self.shadow[: rows // 2]))
        return self._timed(lambda layer: self._run(layer, ids, 0))

    def at_once(self, rows: int) -> float:
        """Seconds until both experts, half of the rows each, called at the same moment, are through."""

        def both(layer: int) -> None:
            self._beside.start(layer, rows // 2)
            self._run(layer, self.primary[: rows - rows // 2], 0)
            self._beside.wait()

        return self._timed(both, alone=False)

    def _run(self, layer: int, ids: torch.Tensor, first: int) -> None:
        span = slice(first, first + len(ids))
        self.experts.run(layer, self.rows[span], ids, self.out[span])

    def _timed(self, call: Callable[[int], None], *, alone: bool = True) -> float:
        """Median seconds of one of ``calls`` calls, which go around the layers; ``alone``: no other is meant
        to have the cores meanwhile."""
        took_s = []
        cpu_s = time.process_time()
        for number in range(self.calls):
            start_s = time.perf_counter()
            call(number % self.layers)
            took_s.append(time.perf_counter() - start_s)
        if alone:
            self._cpu_s += time.process_time() - cpu_s
            self._wall_s += sum(took_s)
        return statistics.median(took_s)
