"""How do requests that ran while nothing was written become protected? They are computed anew, one at a time.

The engine's cache cannot be copied out exactly (see ``capture``), but a request's rows are the same whenever
they are computed (exactness): so it is preempted, as under a small cache, and its rows are taken as
they come. Not for latent attention, where a decoded token's row differs from a prompt's.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.request import RequestStatus


class Reprotector:
    """Over vLLM's scheduler; called by the engine thread between steps."""

    def __init__(self, scheduler: Any, *, exact: bool) -> None:
        """``exact``: computing a request anew gives the same rows."""
        self.exact = exact
        self._scheduler = scheduler
        self._missing: set[str] = set()
        self._current = ""

    @property
    def missing(self) -> int:
        """Requests of which some rows are not written."""
        return len(self._missing) + bool(self._current)

    def began(self) -> None:
        """Rows are written from now on. No later request may share a block whose rows were not written."""
        scheduler = self._scheduler
        self._missing = {request.request_id for request in scheduler.running if request.num_computed_tokens}
        self._current = ""
        pool = scheduler.kv_cache_manager.block_pool
        pool.evict_blocks(set(range(len(pool.blocks))))

    def ended(self) -> None:
        """Nothing is written from now on."""
        self._missing.clear()
        self._current = ""

    def poll(self) -> None:
        """Before a step: preempt the next request, once the one before is whole."""
        if not self.missing:
            return
        requests = self._scheduler.requests
        self._missing = {name for name in self._missing if name in requests}
        if not self.exact or self._is_under_way():
            return
        self._current = ""
        for request in self._scheduler.running:
            if request.request_id in self._missing:
                self._preempt(request)
                return

    def _is_under_way(self) -> bool:
        """Whether the last request that was preempted does not yet decode again."""
        request = self._scheduler.requests.get(self._current)
        if request is None:
            return False
        return request.status != RequestStatus.RUNNING or request.num_computed_tokens < request.num_tokens - 1

    def _preempt(self, request: Any) -> None:
        scheduler, name = self._scheduler, request.request_id
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic())
        self._missing.discard(name)
        self._current = name
