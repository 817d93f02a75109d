"""vLLM's engine client over attention workers that come and go, in the place of its own.

``AsyncLLM`` sees one engine. Behind it, every request has a ``Stream``, whose owner is one attention worker
(``streams``); a ``Link`` per worker carries messages (``links``, ``wire``).
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, Final

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient

from tarragon import tracing
from tarragon.boot import Boot
from tarragon.config import OUTPUTS_WAITING_MAX
from tarragon.gateway import wire
from tarragon.gateway.links import Link
from tarragon.gateway.probing import Prober
from tarragon.gateway.stats import EngineSlots
from tarragon.gateway.streams import Action, Fail, Send, Streams
from tarragon.messages import Peer, ProtocolError
from tarragon.observability.pace import Pace

SEED_BITS: Final = 63


class RequestFailed(GracefulHTTPError):  # type: ignore[misc]
    """A request ends with an error of the gateway's; 503 means that it may be tried again."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.SERVICE_UNAVAILABLE) -> None:
        super().__init__(message, status)


class Client(EngineCoreClient):  # type: ignore[misc]
    """One per gateway, living in the event loop that creates it."""

    def __init__(self, boot: Boot, max_model_len: int) -> None:
        """``max_model_len`` is the longest sequence in tokens; a worker that serves less is not used."""
        config = boot.config
        self.streams = Streams(
            failovers_max=config.max_failovers_per_request,
            waiting_max=config.request_queue_max,
            wait_s=config.attention_unavailable_timeout_s,
            draw_seed=lambda: secrets.randbits(SEED_BITS),
            on_stall=lambda seconds: self.on_stall(seconds),
            watcher=tracing.watcher(config.otlp_traces_endpoint),
        )
        self.prober = Prober(boot, self.streams.owes, self._hangs)
        self.pace = Pace(config.report_interval_ms / 1e3)
        self.available = asyncio.Event()
        """Set while at least one attention worker takes requests."""
        self.was_available = False
        self.on_failed: Callable[[str, RequestFailed], Iterable[str]] = lambda _request_id, _error: ()
        """Ends a request in vLLM's front end; returns other requests (siblings) that it ended too."""
        self.on_first_facts: Callable[[wire.Facts], None] = lambda _facts: None
        self.on_link_lost: Callable[[Peer, str], None] = lambda _peer, _cause: None
        self.on_drained: Callable[[str], None] = lambda _worker_id: None
        self.on_stall: Callable[[float], None] = lambda _seconds: None
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = list(range(config.attention_workers))
        self._boot = boot
        self.max_model_len = max_model_len
        self._slots = EngineSlots(config.attention_workers)
        self._links: dict[str, Link] = {}
        self._drains: set[str] = set()
        """Drains that have not been reported as done."""
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._room = asyncio.Event()
        self._room.set()
        self._calls: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._call_ids = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        self._expiry: asyncio.TimerHandle | None = None
        self._shutting_down = False

    # ------------------------------------------------------------------ membership

    def set_peers(self, peers: Iterable[Peer]) -> None:
        """Link exactly the attention workers among ``peers``, which the orchestrator says are live."""
        live = {peer.worker_id: peer for peer in peers if peer.role == "attention"}
        gone = [worker_id for worker_id in self._links if worker_id not in live]
        for worker_id in gone:
            self.streams.closing(worker_id)  # none of them shall get what the others had
        for worker_id in gone:
            self._remove(worker_id, "the orchestrator took it out")
        self.add_peers(live.values())

    def add_peers(self, peers: Iterable[Peer]) -> None:
        """Link attention workers besides those that are linked; a newer incarnation replaces an older one."""
        for peer in peers:
            if peer.role != "attention" or self._shutting_down:
                continue
            link = self._links.get(peer.worker_id)
            if link is not None and link.peer.epoch >= peer.epoch:
                continue
            if link is not None:
                self._remove(peer.worker_id, "it was replaced")
            self.streams.draining.discard(peer.worker_id)  # that was another incarnation
            self._links[peer.worker_id] = Link(self._boot, peer, self, self.on_link_lost)

    def drain(self, worker_id: str) -> None:
        """Give a worker nothing new, and what it has to others if there are any.

        ``on_drained`` is called, once, when all that it had runs elsewhere or has ended.
        """
        self._drains.add(worker_id)
        self._perform(self.streams.drain(worker_id, time.monotonic()))

    @property
    def connected(self) -> list[str]:
        """Ids of the workers with a link that is up."""
        return sorted(self.streams.loads)

    def _remove(self, worker_id: str, cause: str) -> None:
        self._links.pop(worker_id).close(cause)
        self.streams.draining.discard(worker_id)
        self._drains.discard(worker_id)

    def _settle(self) -> None:
        """After anything that may have freed or taken a worker, or given it something to do."""
        self.prober.arm()
        if self.streams.takers:
            self.available.set()
        else:
            self.available.clear()
        for worker_id in self._drains & self.streams.drained():
            self._drains.discard(worker_id)
            self.on_drained(worker_id)

    # ------------------------------------------------------------------ what links report

    def link_up(self, link: Link, facts: wire.Facts) -> None:
        if facts.max_model_len < self.max_model_len:
            raise ProtocolError(
                f"it serves {facts.max_model_len} tokens, the gateway promises {self.max_model_len}"
            )
        if not self.was_available:
            self.on_first_facts(facts)
        self.was_available = True
        self.prober.link_up(link.peer)
        self._perform(self.streams.worker_up(link.peer.worker_id, link.peer.epoch, time.monotonic()))

    async def room(self) -> None:
        await self._room.wait()

    def received(self, link: Link, message: wire.Message) -> None:
        worker_id = link.peer.worker_id
        self.prober.heard(worker_id)
        match message:
            case wire.Outputs(attempts=attempts, outputs=outputs, resumed=resumed):
                now_s = time.monotonic()
                accepted = self.streams.accept(worker_id, attempts, outputs.outputs, now_s, resumed)
                for output in accepted:
                    self.pace.sent(output.request_id, len(output.new_token_ids), now_s)
                refused = [output for output in accepted if _refusal(output)]
                outputs.outputs = [output for output in accepted if not _refusal(output)]
                self._publish(worker_id, outputs)
                for output in refused:
                    self._fail(output.request_id, _refusal(output))
                self._perform(self.streams.due())
            case wire.Stats(scheduler_stats=stats):
                self._publish(worker_id, EngineCoreOutputs(scheduler_stats=stats))
            case wire.UtilityResult(call_id=call_id, result=result, failure=failure):
                self._answered(call_id, result, RequestFailed(failure) if failure else None)
            case _:
                raise ProtocolError(f"{type(message).__name__} in mid-stream")

    def unsendable(self, link: Link, message: wire.Message, error: Exception) -> None:
        if isinstance(message, wire.Add):
            request_id = message.request.request_id
            self._perform(self.streams.abort([request_id]))
            self._fail(
                request_id, f"this request cannot be given to a worker: {error}", HTTPStatus.BAD_REQUEST
            )

    def _hangs(self, worker_id: str, cause: str) -> None:
        """Probes say that a worker does not work. If it wakes, it finds its link closed and drops all."""
        self._links[worker_id].cut(cause, "hung")

    def link_down(self, link: Link, cause: str, kind: str) -> None:
        worker_id = link.peer.worker_id
        self.prober.link_down(worker_id)
        for other in self._links.values():
            if other.hung_up:
                self.streams.closing(other.peer.worker_id)  # lost at the same time: its turn comes
        self._perform(self.streams.worker_down(worker_id, cause, time.monotonic(), kind))
        for call_id in [call_id for call_id, (callee, _) in self._calls.items() if callee == worker_id]:
            self._answered(call_id, None, RequestFailed(f"attention worker {worker_id} was lost"))
        index, stats = self._slots.slot(worker_id), self._slots.gone(worker_id)
        self._put(EngineCoreOutputs(engine_index=index, scheduler_stats=stats))
        if worker_id in self._links:  # else it was the orchestrator that told us
            self.on_link_lost(link.peer, cause)

    def _publish(self, worker_id: str, outputs: EngineCoreOutputs) -> None:
        """Hand outputs to AsyncLLM, under the engine index of the worker."""
        outputs.engine_index = self._slots.slot(worker_id)
        if outputs.scheduler_stats is not None:
            outputs.scheduler_stats = self._slots.merged(worker_id, outputs.scheduler_stats)
        if outputs.outputs or outputs.scheduler_stats is not None:
            self._put(outputs)

    def _put(self, outputs: EngineCoreOutputs) -> None:
        self._outputs.put_nowait(outputs)
        if self._outputs.qsize() >= OUTPUTS_WAITING_MAX:
            self._room.clear()

    def _answered(self, call_id: int, result: Any, error: Exception | None) -> None:
        _, future = self._calls.pop(call_id, ("", None))
        if future is None or future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    # ------------------------------------------------------------------ actions

    def _perform(self, actions: Iterable[Action]) -> None:
        failures = []
        for action in actions:
            match action:
                case Send(worker=worker, message=message):
                    self._links[worker].send(message)
                case Fail():
                    failures.append(action)
        # Last, as they end siblings too: an abort must not overtake the request that it ends.
        for failure in failures:
            status = HTTPStatus.INTERNAL_SERVER_ERROR if failure.harmful else HTTPStatus.SERVICE_UNAVAILABLE
            self._fail(failure.request_id, failure.message, status)
        if self.streams.waiting and self._expiry is None:
            first = min(stream.waits_until_s for stream in self.streams.waiting.values())
            self._expiry = self._loop.call_later(max(0.0, first - time.monotonic()), self._expire)
        self._settle()

    def _fail(self, request_id: str, why: str, status: HTTPStatus = HTTPStatus.SERVICE_UNAVAILABLE) -> None:
        """End a request whose stream is gone; its siblings go with it, as one answer holds them all."""
        self._perform(self.streams.abort(self.on_failed(request_id, RequestFailed(why, status))))

    def _expire(self) -> None:
        self._expiry = None
        self._perform(self.streams.expire(time.monotonic()))

    # ------------------------------------------------------------------ what AsyncLLM calls

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def get_output_async(self) -> EngineCoreOutputs:
        outputs = await self._outputs.get()
        self._room.set()
        return outputs

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Run a request, or keep it until a worker is there. Raises RequestFailed if neither is possible."""
        actions = self.streams.add(request, time.monotonic())
        self._perform(actions)
        for action in actions:
            if isinstance(action, Fail):
                raise RequestFailed(action.message)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self._perform(self.streams.abort(request_ids))

    async def reset_mm_cache_async(self) -> None:
        """Requests are text only: there is no such cache."""

    async def reset_encoder_cache_async(self) -> None:
        """Requests are text only: there is no such cache."""

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Empty the prefix cache of every worker; whether all did. Raises RequestFailed if one cannot say."""
        results = await self._call_all("reset_prefix_cache", reset_running_requests, reset_connector)
        return all(result is True for result in results)

    async def is_sleeping_async(self) -> bool:
        return False

    async def is_scheduler_paused_async(self) -> bool:
        return False

    def dp_engines_running(self) -> bool:
        return bool(self.streams.live)

    def shutdown(self, timeout: float | None = None) -> None:
        """End every request with an error and hang up; from any thread, any number of times."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._shut)

    def _shut(self) -> None:
        self._shutting_down = True
        self._perform(self.streams.shut("the gateway is shutting down"))
        self.set_peers(())

    async def _call_all(self, name: str, *args: bool | int | float | str | None) -> list[Any]:
        calls = []
        for worker_id in self.connected:
            call_id = next(self._call_ids)
            future: asyncio.Future[Any] = self._loop.create_future()
            self._calls[call_id] = (worker_id, future)
            calls.append((call_id, future))
            self._links[worker_id].send(wire.Utility(call_id, name, list(args)))
        try:
            async with asyncio.timeout(self._boot.config.utility_timeout_s):
                return [await future for _, future in calls]
        except TimeoutError as error:
            raise RequestFailed(f"an attention worker did not answer {name}") from error
        finally:
            for call_id, _ in calls:
                self._calls.pop(call_id, None)


def _refusal(output: EngineCoreOutput) -> str:
    """Why a worker that is well gave this request up, in one sentence; "" if it did not."""
    if output.finish_reason != FinishReason.ERROR or not isinstance(output.stop_reason, str):
        return ""
    return output.stop_reason
