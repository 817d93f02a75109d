"""The gateway's engine client over real sockets, with attention workers that make up their tokens."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest

from tarragon.boot import Boot, socket_address
from tarragon.config import Config
from tarragon.gateway import wire
from tarragon.gateway.client import Client, RequestFailed
from tarragon.messages import Peer
from tarragon.testing.fake_attention import FakeAttention, token

WAIT_S = 5.0


def boot(**settings: Any) -> Boot:
    return Boot(
        cluster=f"test-{os.getpid()}-{os.urandom(4).hex()}",
        secret=bytes(32),
        worker_id="gateway",
        role="gateway",
        epoch=7,
        model="tiny",
        config=Config(**settings),
    )


def request(request_id: str, *, tokens: int = 4) -> EngineCoreRequest:
    params = SamplingParams(max_tokens=tokens)
    return EngineCoreRequest(request_id, [1, 2, 3], None, params, None, 0.0, None, None, None)


class Cluster:
    """A client and its workers, in one event loop."""

    def __init__(self, **settings: Any) -> None:
        self.boot = boot(**settings)
        self.client = Client(self.boot, max_model_len=512)
        self.failed: dict[str, str] = {}
        self.lost: list[tuple[str, str]] = []
        self.peers: dict[str, Peer] = {}
        self.workers: list[FakeAttention] = []
        self.texts: dict[str, list[int]] = {}
        self.gauges: dict[int, int] = {}
        self.client.on_failed = self._failed
        self.client.on_link_lost = lambda peer, cause: self.lost.append((peer.worker_id, cause))
        self._reader = asyncio.create_task(self._read())

    async def worker(
        self, worker_id: str, epoch: int = 1, *, max_model_len: int = 512, frozen: bool = False
    ) -> FakeAttention:
        """Start a worker and let the client know of it."""
        fake = FakeAttention(worker_id, epoch, max_model_len=max_model_len, vocabulary=1000)
        fake.frozen = frozen
        address = socket_address(self.boot.cluster, f"{worker_id}.{epoch}")
        await fake.listen(address, self.boot.secret)
        self.workers.append(fake)
        self.peers[worker_id] = Peer(worker_id=worker_id, role="attention", epoch=epoch, address=address)
        self.client.set_peers(self.peers.values())
        return fake

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - conditions of all kinds
                await asyncio.sleep(0.005)

    async def connected(self, *names: str) -> None:
        await self.until(lambda: self.client.connected == list(names))

    async def text(self, name: str, *, tokens: int = 4) -> list[int]:
        await self.until(lambda: len(self.texts.get(name, ())) >= tokens)
        return self.texts[name]

    async def close(self) -> None:
        self.client.shutdown()
        await self.until(lambda: not self.client.connected)
        for worker in self.workers:
            worker.close()
        self._reader.cancel()

    async def _read(self) -> None:
        while True:
            outputs = await self.client.get_output_async()
            for output in outputs.outputs:
                self.texts.setdefault(output.request_id, []).extend(output.new_token_ids)
            if outputs.scheduler_stats is not None:
                self.gauges[outputs.engine_index] = outputs.scheduler_stats.num_running_reqs

    def _failed(self, request_id: str, error: RequestFailed) -> list[str]:
        self.failed[request_id] = error.message
        return []


def run(test: Callable[[Cluster], Awaitable[None]], **settings: Any) -> None:
    async def body() -> None:
        cluster = Cluster(**settings)
        try:
            await test(cluster)
        finally:
            await cluster.close()

    asyncio.run(body())


def expected(added: wire.Add, tokens: int = 4) -> list[int]:
    return [token(added.request, position, 1000) for position in range(tokens)]


def test_tokens_come_back_and_both_sides_know_each_other() -> None:
    async def test(cluster: Cluster) -> None:
        worker = await cluster.worker("aw-0", epoch=5)
        await cluster.connected("aw-0")
        assert worker.attached == [wire.Attach(gateway_epoch=7, worker_epoch=5)]
        assert cluster.client.available.is_set()
        await cluster.client.add_request_async(request("r"))
        text = await cluster.text("r")
        assert worker.added[0].request.sampling_params.seed is not None
        assert text == expected(worker.added[0])
        assert not cluster.client.dp_engines_running()

    run(test)


def test_requests_are_spread_and_statistics_kept_apart() -> None:
    async def test(cluster: Cluster) -> None:
        workers = [await cluster.worker(name, frozen=True) for name in ("aw-0", "aw-1")]
        await cluster.connected("aw-0", "aw-1")
        for number in range(8):
            await cluster.client.add_request_async(request(f"r{number}", tokens=500))
        await cluster.until(lambda: [len(worker.added) for worker in workers] == [4, 4])
        for worker in workers:
            worker.frozen = False
        await cluster.until(lambda: cluster.gauges == {0: 4, 1: 4})
        workers[1].close()
        await cluster.until(lambda: cluster.gauges[1] == 0)

    run(test)


def test_requests_that_sent_nothing_start_again_elsewhere() -> None:
    async def test(cluster: Cluster) -> None:
        dying = await cluster.worker("aw-0", frozen=True)
        await cluster.connected("aw-0")
        for number in range(4):
            await cluster.client.add_request_async(request(f"r{number}"))
        await cluster.until(lambda: len(dying.added) == 4)
        other = await cluster.worker("aw-1")
        await cluster.connected("aw-0", "aw-1")
        dying.close()
        for number in range(4):
            text = await cluster.text(f"r{number}")
            assert text == expected(dying.added[number]), "the same seed, so the same text"
        assert [added.attempt for added in other.added] == [2, 2, 2, 2]
        assert cluster.client.streams.counters.restarts == 4
        assert cluster.failed == {}
        assert [worker_id for worker_id, _ in cluster.lost][:1] == ["aw-0"]

    run(test)


def test_requests_that_sent_tokens_end_with_a_reason() -> None:
    async def test(cluster: Cluster) -> None:
        worker = await cluster.worker("aw-0")
        await cluster.connected("aw-0")
        await cluster.client.add_request_async(request("r", tokens=500))
        await cluster.text("r", tokens=2)
        worker.close()
        await cluster.until(lambda: "r" in cluster.failed)
        assert "attention worker aw-0 was lost" in cluster.failed["r"]
        assert f"after {len(cluster.texts['r'])} tokens" in cluster.failed["r"], "all that count as sent came"
        assert not cluster.client.available.is_set()

    run(test)


def test_requests_wait_for_the_first_worker_and_not_for_ever() -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.client.add_request_async(request("late"))
        with pytest.raises(RequestFailed, match="too many requests wait"):
            await cluster.client.add_request_async(request("refused"))
        await cluster.until(lambda: "late" in cluster.failed)
        assert "within 0.2 s" in cluster.failed["late"]
        await cluster.client.add_request_async(request("served"))
        await cluster.worker("aw-0")
        assert len(await cluster.text("served")) == 4

    run(test, attention_unavailable_timeout_s=0.2, request_queue_max=1)


def test_outputs_of_an_old_attempt_are_dropped() -> None:
    async def test(cluster: Cluster) -> None:
        worker = await cluster.worker("aw-0", frozen=True)
        await cluster.connected("aw-0")
        await cluster.client.add_request_async(request("r"))
        await cluster.until(lambda: len(worker.added) == 1)
        stale = EngineCoreOutputs(outputs=[EngineCoreOutput("r", [999])])
        await worker.send(wire.Outputs({"r": 9}, stale))
        worker.frozen = False
        assert await cluster.text("r") == expected(worker.added[0])
        assert cluster.client.streams.counters.outputs_stale == 1

    run(test)


def test_aborts_reach_the_owner() -> None:
    async def test(cluster: Cluster) -> None:
        worker = await cluster.worker("aw-0", frozen=True)
        await cluster.connected("aw-0")
        await cluster.client.add_request_async(request("r"))
        await cluster.client.abort_requests_async(["r", "unknown"])
        await cluster.until(lambda: worker.aborted == {"r": 1})
        assert not cluster.client.streams.live

    run(test)


def test_a_new_incarnation_replaces_the_old_one() -> None:
    async def test(cluster: Cluster) -> None:
        old = await cluster.worker("aw-0", epoch=1, frozen=True)
        await cluster.connected("aw-0")
        await cluster.client.add_request_async(request("r"))
        await cluster.until(lambda: len(old.added) == 1)
        new = await cluster.worker("aw-0", epoch=2)
        assert await cluster.text("r") == expected(old.added[0])
        assert [added.attempt for added in new.added] == [2]
        assert cluster.lost == [], "it was the orchestrator that told us"

    run(test)


def test_a_link_that_is_cut_is_made_again() -> None:
    async def test(cluster: Cluster) -> None:
        worker = await cluster.worker("aw-0")
        await cluster.connected("aw-0")
        assert worker.connection is not None
        worker.connection.close()
        await cluster.until(lambda: len(worker.attached) == 2)
        await cluster.connected("aw-0")
        await cluster.client.add_request_async(request("r"))
        assert len(await cluster.text("r")) == 4

    run(test)


def test_a_worker_that_breaks_the_protocol_is_hung_up_on_and_named() -> None:
    async def test(cluster: Cluster) -> None:
        bad = await cluster.worker("aw-0")
        good = await cluster.worker("aw-1")
        await cluster.connected("aw-0", "aw-1")
        assert bad.connection is not None
        await bad.connection.send(b"nonsense" * 4)
        await cluster.until(lambda: any("engine frame" in cause for _, cause in cluster.lost))
        await good.send(wire.UtilityResult(77, True))  # an answer that nobody waits for is no offence
        await asyncio.sleep(0.05)
        assert "aw-1" in cluster.client.connected

    run(test)


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        ({"max_model_len": 100}, "it serves 100 tokens, the gateway promises 512"),
        ({"epoch": 9}, "it says that it is aw-0 of epoch 9"),
        ({"worker_id": "aw-1"}, "it says that it is aw-1 of epoch 1"),
    ],
)
def test_a_worker_that_is_not_what_it_should_be_is_not_used(facts: dict[str, Any], cause: str) -> None:
    async def test(cluster: Cluster) -> None:
        worker = await cluster.worker("aw-0")
        honest = worker.facts
        fields = {name: getattr(honest, name) for name in honest.__struct_fields__}
        worker.facts = wire.Facts(**(fields | facts))
        await cluster.until(lambda: ("aw-0", cause) in cluster.lost)
        assert cluster.client.connected == []
        assert not cluster.client.was_available

    run(test)


def test_a_draining_worker_ends_what_it_has_and_gets_nothing_new() -> None:
    async def test(cluster: Cluster) -> None:
        drained: list[str] = []
        cluster.client.on_drained = drained.append
        workers = [await cluster.worker(name, frozen=True) for name in ("aw-0", "aw-1")]
        await cluster.connected("aw-0", "aw-1")
        for name in ("a", "b"):
            await cluster.client.add_request_async(request(name))
        cluster.client.drain("aw-0")
        for name in ("c", "d"):
            await cluster.client.add_request_async(request(name))
        await cluster.until(lambda: [len(worker.added) for worker in workers] == [1, 3])
        assert drained == []
        for worker in workers:
            worker.frozen = False
        assert await cluster.text("a") == expected(workers[0].added[0])
        assert drained == ["aw-0"]
        cluster.client.drain("aw-1")
        await cluster.until(lambda: drained == ["aw-0", "aw-1"])
        assert not cluster.client.available.is_set(), "nobody takes requests"
        await cluster.client.add_request_async(request("e"))
        await cluster.worker("aw-1", epoch=2)
        assert len(await cluster.text("e")) == 4, "a new incarnation is not draining"

    run(test)


def test_the_prefix_cache_of_every_worker_is_emptied() -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.worker("aw-0")
        await cluster.worker("aw-1")
        await cluster.connected("aw-0", "aw-1")
        assert await cluster.client.reset_prefix_cache_async()
        assert not cluster.client._calls

    run(test)


def test_a_request_that_cannot_travel_fails_alone() -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.worker("aw-0")
        await cluster.connected("aw-0")
        bad = request("bad")
        bad.sampling_params.extra_args = {"x": object()}
        await cluster.client.add_request_async(bad)
        await cluster.client.add_request_async(request("good"))
        assert len(await cluster.text("good")) == 4
        assert "cannot be given to a worker" in cluster.failed["bad"]
        assert cluster.client.connected == ["aw-0"]

    run(test)


def test_shutting_down_ends_every_request() -> None:
    async def test(cluster: Cluster) -> None:
        worker = await cluster.worker("aw-0", frozen=True)
        await cluster.connected("aw-0")
        await cluster.client.add_request_async(request("r"))
        await cluster.until(lambda: len(worker.added) == 1)
        cluster.client.shutdown()
        await cluster.until(lambda: cluster.failed == {"r": "the gateway is shutting down"})
        cluster.client.set_peers(cluster.peers.values())
        await asyncio.sleep(0.05)
        assert cluster.client.connected == []

    run(test)
