"""The death of an attention worker: nothing lost, repeated or changed, for every kind of request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import pytest
from tests.cluster.observe import fresh, is_gone, metric, replaced, stopped, until
from tests.pool import Clusters
from tests.streams import Reading, read_all, streamed_tokens
from tests.undisturbed import Undisturbed

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

FULL_CAPACITY_S = 120.0
STOPPED_S = 120.0
"""Longer than a test leaves the orchestrator stopped, which nobody is to hold against it."""
STALLS = "tarragon_stall_seconds_count"
"""At the gateway: streams that have got a token again since their worker was lost."""


class Once:
    """Does something in a thread the first time that the streams have brought so many tokens."""

    def __init__(self, act: Callable[[], None], at: int) -> None:
        self._act, self._at = act, at
        self._counts: dict[int, int] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __call__(self, stream: int, count: int) -> None:
        self._counts[stream] = count
        if self._thread is None and sum(self._counts.values()) >= self._at:
            self._thread = threading.Thread(target=self._run)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._act()
        except Exception as error:
            self._error = error  # a thread's own would fail no test

    def join(self) -> None:
        """Wait until it is done: on a busy machine the streams may end before. Raises what it raised."""
        assert self._thread is not None, "the moment never came"
        self._thread.join(FULL_CAPACITY_S)
        assert not self._thread.is_alive(), "the kill is not answered"
        if self._error is not None:
            raise self._error


def assert_same(names: Iterable[str], got: list[Reading], wanted: list[Reading]) -> None:
    for name, reading, other in zip(names, got, wanted, strict=True):
        assert reading == other, name


@pytest.mark.parametrize(
    ("victim", "share"),
    [("aw-0", 0.02), ("aw-1", 0.5), ("aw-0", 0.9)],
    ids=["first tokens", "middle", "last tokens"],
)
def test_a_killed_attention_worker_changes_no_stream(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed, victim: str, share: float
) -> None:
    bodies, wanted = undisturbed.of_every_kind(cluster, model_name)
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    moment = max(1, int(share * streamed_tokens(bodies.values(), wanted)))
    fault = Once(lambda: cluster.kill(victim), moment)

    got = read_all(cluster.url, model_name, list(bodies.values()), fault)

    fault.join()
    assert_same(bodies, got, wanted)
    replaced(cluster, pids, victim)


def test_requests_are_restored_from_the_checkpoint(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    every, readings = undisturbed.of_every_kind(cluster, model_name)
    # Of one weight, so that both workers have some all the time.
    names = [name for name in ("greedy", "seeded", "penalties", "three", "logprobs") if name in every]
    bodies = {name: every[name] for name in names}
    wanted = [readings[list(every).index(name)] for name in names]
    status = cluster.wait_for("protected", FULL_CAPACITY_S)
    assert status["protected"]
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    before = fresh(cluster, "aw-0")["aw-0"]  # the survivor: what the victim has counted goes with it
    fault = Once(lambda: cluster.kill("aw-1"), 60)
    got = read_all(cluster.url, model_name, list(bodies.values()), fault)
    fault.join()
    assert_same(bodies, got, wanted)
    replaced(cluster, pids, "aw-1")
    after = fresh(cluster, "aw-0")["aw-0"]
    assert after["restored_positions"] > before["restored_positions"]
    assert after["restore_corrupt"] == before["restore_corrupt"]


def test_a_stopped_attention_worker_that_wakes_does_no_harm(
    clusters: Clusters, model_name: str, undisturbed: Undisturbed
) -> None:
    """It wakes with its old requests while others run them, and nobody but itself ends it then.

    The orchestrator would have it ended: so that one is stopped too, and not replaced for it. The gateway
    needs no orchestrator to see that a worker hangs.
    """
    cluster = clusters.get(2, 2, orchestrator_silence_s=STOPPED_S)
    bodies, wanted = undisturbed.of_every_kind(cluster, model_name)
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    went_on = metric(cluster.url, STALLS)
    said = len(cluster.logs())

    def stop_and_wake() -> None:
        with stopped(pids["orchestrator"]):
            with stopped(pids["aw-0"]):
                until("no stream went on elsewhere", lambda: metric(cluster.url, STALLS) > went_on)
            until("it woke and did not find that it is fenced", lambda: is_gone(pids["aw-0"]))

    fault = Once(stop_and_wake, 200)
    got = read_all(cluster.url, model_name, list(bodies.values()), fault)
    fault.join()
    assert_same(bodies, got, wanted)
    replaced(cluster, pids, "aw-0")
    assert "attention worker: fenced" in cluster.logs()[said:]


def test_both_roles_at_once(cluster: Cluster, model_name: str, undisturbed: Undisturbed) -> None:
    bodies, wanted = undisturbed.of_every_kind(cluster, model_name)
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()

    def both() -> None:
        cluster.kill("aw-1")
        cluster.kill("ew-0")

    fault = Once(both, 250)
    got = read_all(cluster.url, model_name, list(bodies.values()), fault)
    fault.join()
    assert_same(bodies, got, wanted)
    replaced(cluster, pids, "aw-1", "ew-0")


def test_a_drained_attention_worker_hands_its_streams_over(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    bodies, wanted = undisturbed.of_every_kind(cluster, model_name)
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    order = Once(lambda: cluster.drain("aw-1"), 200)
    got = read_all(cluster.url, model_name, list(bodies.values()), order)
    order.join()
    assert_same(bodies, got, wanted)
    deadline_s = time.monotonic() + FULL_CAPACITY_S
    while any(w["id"] == "aw-1" and w["state"] != "dead" for w in cluster.status()["workers"]):
        assert time.monotonic() < deadline_s, "it never left"
        time.sleep(0.1)
