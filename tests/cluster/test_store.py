"""The checkpoint store and the orchestrator die, or hang, under running streams: nobody notices."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.cluster.observe import fresh, until
from tests.cluster.test_attention_failover import Once
from tests.streams import Reading, kinds, read_all
from tests.undisturbed import Undisturbed

from tarragon.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

WAIT_S = 120.0
TOKENS = 64
BODIES = [kinds("The lighthouse keeper", list(range(100, 500)), TOKENS)[name] for name in ("greedy", "three")]


def read_while(cluster: Cluster, model: str, act: Callable[[], None]) -> list[Reading]:
    """What the readers of BODIES get if something is done in the middle of it."""
    midway = Once(act, at=40)
    got = read_all(cluster.url, model, BODIES, midway)
    midway.join()
    return got


def workers(status: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Pid and epoch of every worker."""
    return {w["id"]: (w["pid"], w["epoch"]) for w in status["workers"]}


def of(status: dict[str, Any], worker_id: str) -> dict[str, Any]:
    return next(w for w in status["workers"] if w["id"] == worker_id)


def whole(cluster: Cluster) -> dict[str, Any]:
    """Wait until nothing is missing; the status."""
    cluster.wait_for("protected", WAIT_S)
    return cluster.wait_for("full_capacity", WAIT_S)


def whole_with_another(cluster: Cluster, worker_id: str, pid: int) -> dict[str, Any]:
    """Wait until nothing is missing, and another process is ``worker_id``."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        status = whole(cluster)
        if of(status, worker_id)["pid"] != pid and status["protected"]:
            return status
        assert time.monotonic() < deadline_s, f"{worker_id} is not replaced"
        time.sleep(0.05)


def reported_by_store(cluster: Cluster) -> dict[str, float]:
    """Wait for the first report of a new store, which follows after it is healthy."""
    deadline_s = time.monotonic() + WAIT_S
    while "restarts" not in (counters := of(cluster.status(), "store")["counters"]):
        assert time.monotonic() < deadline_s, "the store reports nothing"
        time.sleep(0.05)
    return counters


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_a_store_that_dies_or_hangs_stops_no_stream(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed, number: str
) -> None:
    before = whole(cluster)
    wanted = undisturbed.readings(cluster, model_name, BODIES)
    store_pid = of(before, "store")["pid"]
    assert read_while(cluster, model_name, lambda: cluster.kill("store", number)) == wanted
    after = whole_with_another(cluster, "store", store_pid)
    others = {i: who for i, who in workers(before).items() if i != "store"}
    assert {i: who for i, who in workers(after).items() if i != "store"} == others
    counters = reported_by_store(cluster)
    assert counters["restarts"] >= 1
    assert counters["buckets"] >= 2
    assert counters["bytes_touched"] > 0
    fresh(cluster, "aw-0", "aw-1")
    whole(cluster)  # by reports from after it: the attention workers have found the new store


def test_an_attention_worker_killed_after_the_store_loses_nothing(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    before = whole(cluster)
    wanted = undisturbed.readings(cluster, model_name, BODIES)

    def act() -> None:
        cluster.kill("store")
        os.kill(workers(before)["aw-0"][0], signal.SIGKILL)

    assert read_while(cluster, model_name, act) == wanted
    after = whole_with_another(cluster, "aw-0", workers(before)["aw-0"][0])
    # What the new store knows is enough to restore from, and what it handed out too.
    restored = of(after, "aw-0")["counters"]["restored_positions"]
    assert read_while(cluster, model_name, lambda: cluster.kill("aw-1")) == wanted
    whole_with_another(cluster, "aw-1", workers(after)["aw-1"][0])
    until(
        "nothing was restored",
        lambda: of(cluster.status(), "aw-0")["counters"]["restored_positions"] > restored,
    )


def test_the_orchestrators_death_costs_nothing_and_it_learns_from_the_workers(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    before = whole(cluster)
    wanted = undisturbed.readings(cluster, model_name, BODIES)
    pid = of(before, "orchestrator")["pid"]
    assert read_while(cluster, model_name, lambda: os.kill(pid, signal.SIGKILL)) == wanted
    after = whole_with_another(cluster, "orchestrator", pid)
    assert {i: who for i, who in workers(after).items() if i != "orchestrator"} == {
        i: who for i, who in workers(before).items() if i != "orchestrator"
    }
    assert {w["state"] for w in after["workers"]} == {"healthy"}
    assert after["ert_version"] > before["ert_version"]
    # It is in charge: what dies now is replaced.
    old = workers(after)["ew-0"][0]
    assert read_while(cluster, model_name, lambda: cluster.kill("ew-0")) == wanted
    last = whole_with_another(cluster, "ew-0", old)
    assert workers(last)["ew-0"][1] > workers(after)["ew-0"][1]
    assert last["ert_version"] > after["ert_version"]


def test_a_worker_that_dies_while_there_is_no_orchestrator_is_replaced_afterwards(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed
) -> None:
    before = whole(cluster)
    wanted = undisturbed.readings(cluster, model_name, BODIES)
    pids = {i: pid for i, (pid, _) in workers(before).items()}

    def act() -> None:
        os.kill(pids["orchestrator"], signal.SIGKILL)
        os.kill(pids["ew-1"], signal.SIGKILL)

    assert read_while(cluster, model_name, act) == wanted
    after = whole_with_another(cluster, "ew-1", pids["ew-1"])
    others = {i: who for i, who in workers(before).items() if i not in ("orchestrator", "ew-1")}
    assert {i: who for i, who in workers(after).items() if i in others} == others


def test_a_hung_orchestrator_is_replaced(cluster: Cluster, model_name: str, undisturbed: Undisturbed) -> None:
    before = whole(cluster)
    wanted = undisturbed.readings(cluster, model_name, BODIES)
    pid = of(before, "orchestrator")["pid"]
    assert read_while(cluster, model_name, lambda: os.kill(pid, signal.SIGSTOP)) == wanted
    after = whole_with_another(cluster, "orchestrator", pid)
    assert {i: who for i, who in workers(after).items() if i != "orchestrator"} == {
        i: who for i, who in workers(before).items() if i != "orchestrator"
    }
