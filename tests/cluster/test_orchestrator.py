"""The orchestrator as a process of its own: deaths, returns, refusals, restarts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_cluster import (
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    LIMIT_S,
    Cluster,
    Fake,
    make_model,
    run,
    wait_for,
    worker,
)

from tarragon.messages import (
    Hello,
    Peers,
    Refused,
    Report,
    SignalWorker,
    StartWorker,
    Suspicion,
    Welcome,
    WorkerStarted,
)
from tarragon.transport.local import HandshakeError

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


async def replacement(cluster: Cluster, victim: Fake) -> StartWorker:
    """Wait for the order to start a successor."""

    def order() -> StartWorker | None:
        starts = [o for o in cluster.orders if isinstance(o, StartWorker)]
        boot = victim.boot
        return next((o for o in starts if o.worker_id == boot.worker_id and o.epoch > boot.epoch), None)

    found: StartWorker = await wait_for(order, "no replacement is asked for")
    return found


# ------------------------------------------------------------------ life


def test_a_cluster_comes_up_and_says_what_it_is(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        status = await cluster.full()
        assert status["exact"] is True
        assert status["protected"] is False
        assert status["protected_reason"] == "without checkpoints: aw-0, aw-1"
        assert status["experts"] == {
            "total": LAYERS * EXPERTS,
            "with_shadow": LAYERS * EXPERTS,
            "unreachable": 0,
            "loading_cold": 0,
        }
        assert [w["id"] for w in status["workers"]] == [
            "orchestrator", "gateway", "store", "aw-0", "aw-1", "ew-0", "ew-1",
        ]  # fmt: skip
        assert {w["state"] for w in status["workers"]} == {"healthy"}
        assert worker(status, "orchestrator")["pid"] == cluster.process.pid
        await cluster.until(lambda s: worker(s, "aw-0")["ert_version"] == s["ert_version"])
        assert worker(status, "ew-0")["experts_resident"] == LAYERS * EXPERTS
        starts = [o.worker_id for o in cluster.orders if isinstance(o, StartWorker)]
        assert starts[0] == "gateway"
        _, table = await cluster.request("GET", "/table")
        assert table["version"] == status["ert_version"]
        primaries = [found[0] for row in table["candidates"] for found in row]
        assert primaries.count("ew-0") == primaries.count("ew-1") == LAYERS * EXPERTS // 2
        _, events = await cluster.request("GET", "/events?limit=3")
        assert len(events["events"]) == 3
        last = events["events"][-1]["number"]
        assert (await cluster.request("GET", f"/events?after={last}"))[1] == {"events": []}

    run(test, model)


def test_an_expert_workers_death_reaches_attention_workers_at_once_and_it_is_replaced(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        before = await cluster.full()
        victim, attention = cluster.fakes["ew-0"], cluster.fakes["aw-0"]
        cluster.silent.add("ew-0")
        death_s = time.monotonic()
        victim.die()
        old = attention.table
        table = await wait_for(
            lambda: attention.table if attention.table is not old else None, "no new table"
        )
        assert time.monotonic() - death_s < LIMIT_S / 4
        assert [p.worker_id for p in table.workers] == ["ew-1"]
        assert all(found == [0] for row in table.candidates for found in row)
        assert table.version > before["ert_version"]
        order = await replacement(cluster, victim)
        await cluster.exited(victim)
        status = await cluster.until(lambda s: "SIGKILL" in json.dumps(s["workers"]) or s["ready"])
        assert status["ready"] is True
        assert status["full_capacity"] is False
        assert status["experts"]["with_shadow"] == 0
        await cluster.start(order)
        after = await cluster.full()
        assert worker(after, "ew-0")["epoch"] == order.epoch
        _, events = await cluster.request("GET", "/events")
        kinds = [(e["kind"], e["worker_id"]) for e in events["events"]]
        assert ("dead", "ew-0") in kinds
        assert ("exited", "ew-0") in kinds

    # With these, only the end of the connection can tell in time.
    run(test, model, worker_probe_interval_ms=60_000.0, report_interval_ms=60_000.0)


def test_without_shadows_the_survivor_loads_what_was_lost(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        cluster.silent.add("ew-0")
        cluster.fakes["ew-0"].die()
        status = await cluster.until(
            lambda s: worker(s, "ew-0")["state"] == "starting" and s["experts"]["unreachable"] == 0
        )
        assert worker(status, "ew-1")["experts_resident"] == LAYERS * EXPERTS
        assert status["ready"] is True

    run(test, model, shadow_replicas=0)


def test_a_dead_incarnation_that_wakes_up_is_refused(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        zombie = cluster.fakes["ew-0"]
        zombie.die()
        await cluster.until(lambda s: worker(s, "ew-0")["epoch"] > zombie.boot.epoch and s["full_capacity"])
        again = await cluster.join(zombie.boot)
        await asyncio.wait_for(again.task, LIMIT_S)
        assert [type(m) for m in again.inbox] == [Refused]
        assert "has been replaced" in again.inbox[0].reason  # type: ignore[union-attr]
        assert (await cluster.full())["refused"]["stale_epoch"] >= 1

    run(test, model)


def test_suspicion_by_all_attention_workers_ends_and_replaces_a_worker(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        suspect = cluster.fakes["ew-1"]
        for reporter in ("aw-0", "aw-1"):
            await cluster.fakes[reporter].say(
                Suspicion(
                    reporter_id=reporter,
                    suspect_id="ew-1",
                    suspect_epoch=suspect.boot.epoch,
                    cause="no progress",
                )
            )
        await asyncio.wait_for(suspect.task, LIMIT_S)  # it is cut off
        await cluster.until(lambda s: worker(s, "ew-1")["epoch"] > suspect.boot.epoch and s["full_capacity"])
        end = SignalWorker(worker_id="ew-1", epoch=suspect.boot.epoch, signal=signal.SIGTERM)
        assert end in cluster.orders

    run(test, model)


def test_peers_and_reports(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        gateway = cluster.fakes["gateway"]
        known = await wait_for(
            lambda: next(
                (m for m in reversed(gateway.inbox) if isinstance(m, Peers) and len(m.peers) == 2), None
            ),
            "the gateway does not hear of the attention workers",
        )
        assert [(p.worker_id, p.epoch) for p in known.peers] == [
            (i, cluster.fakes[i].boot.epoch) for i in ("aw-0", "aw-1")
        ]
        aw_0 = cluster.fakes["aw-0"]
        await aw_0.say(Report(worker_id="aw-0", epoch=aw_0.boot.epoch, counters={"layers": 7.0}))
        await cluster.until(lambda s: worker(s, "aw-0")["counters"] == {"layers": 7.0})

    run(test, model)


def test_protected_means_a_store_and_a_bucket_for_every_attention_worker(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        for worker_id in ("aw-0", "aw-1"):
            epoch = cluster.fakes[worker_id].boot.epoch
            report = Report(worker_id=worker_id, epoch=epoch, counters={"bucket": 1.0})
            await cluster.fakes[worker_id].say(report)
        status = await cluster.until(lambda s: s["protected"])
        assert status["protected_reason"] == ""
        cluster.silent.add("store")
        store = cluster.fakes["store"]
        store.die()
        status = await cluster.until(lambda s: not s["protected"])
        assert "no checkpoint store runs" in status["protected_reason"]
        assert status["ready"] is True
        await cluster.start(await replacement(cluster, store))
        await cluster.until(lambda s: s["protected"])

    run(test, model)


def test_unequal_workers_are_not_called_exact(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        await cluster.fakes["aw-1"].ready(fingerprint="other")
        status = await cluster.until(lambda s: not s["exact"])
        assert status["exact_reason"] == "aw-0 and aw-1 differ: 'same', 'other'"
        await cluster.fakes["aw-1"].ready(exact=False, inexact_reason="no invariant kernel")
        await cluster.until(lambda s: s["exact_reason"] == "aw-1: no invariant kernel")

    run(test, model)


def test_a_worker_that_does_not_listen_holds_up_nobody(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        deaf = cluster.fakes["aw-1"]
        deaf.task.cancel()
        deaf.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(6):
            epoch = cluster.fakes["ew-0"].boot.epoch
            cluster.fakes["ew-0"].die()
            start_s = time.monotonic()
            await cluster.until(
                lambda s, old=epoch: (  # type: ignore[misc]
                    worker(s, "ew-0")["epoch"] > old and worker(s, "ew-0")["state"] == "healthy"
                )
            )
            aw_0 = cluster.fakes["aw-0"]
            await wait_for(
                lambda old=epoch, aw_0=aw_0: any(p.epoch > old for p in aw_0.table.workers),  # type: ignore[misc]
                "aw-0 gets no table",
            )
            assert time.monotonic() - start_s < LIMIT_S / 4

    run(test, model, crash_loop_restarts_max=100, restart_backoff_s=0.0)


def test_who_breaks_the_protocol_is_cut_off_and_the_others_go_on(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        with pytest.raises(HandshakeError):
            await cluster.dial(secret=b"x" * 32)
        stranger = await cluster.dial()
        await stranger.send(b"\xff\xff no message")
        assert await asyncio.wait_for(stranger.recv(), LIMIT_S) is None
        mute = await cluster.join(msgspec.structs.replace(cluster.boot, worker_id="aw-9", role="attention"))
        await asyncio.wait_for(mute.task, LIMIT_S)
        assert isinstance(mute.inbox[0], Refused)
        second = await cluster.dial()
        await second.send_control(
            Hello(worker_id="agent", role="orchestrator", epoch=1 << 20, pid=1, address="")
        )
        assert isinstance(await asyncio.wait_for(second.recv_control(), LIMIT_S), Refused)
        rude = cluster.fakes["aw-0"]
        await rude.connection.send(b"{}")
        await cluster.until(lambda s: worker(s, "aw-0")["epoch"] > rude.boot.epoch and s["full_capacity"])
        refused = (await cluster.status())["refused"]
        assert refused["no_hello"] == 1
        assert refused["second_agent"] == 1
        stranger.close()
        second.close()

    run(test, model)


def test_the_orchestrator_leaves_with_the_agent(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        assert cluster.agent is not None
        cluster.agent.close()
        code, errors = await asyncio.to_thread(cluster.ended)
        assert code == 0
        assert "the node agent has left" in errors
        await asyncio.wait_for(cluster.fakes["aw-0"].task, LIMIT_S)

    run(test, model)


def test_sigterm_ends_it(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.full()
        cluster.process.send_signal(signal.SIGTERM)
        code, errors = await asyncio.to_thread(cluster.ended)
        assert code == 0
        assert "Traceback" not in errors

    run(test, model)


def test_a_restarted_orchestrator_takes_over_the_workers(model: str) -> None:
    async def test(cluster: Cluster) -> None:
        before = await cluster.full()
        cluster.process.kill()
        await asyncio.to_thread(cluster.ended)
        former = dict(cluster.fakes)
        cluster.boot = msgspec.structs.replace(cluster.boot, epoch=2 << 20)
        cluster.process = cluster.launch()
        cluster.orders.clear()
        await cluster.serve()
        assert cluster.agent is not None
        for worker_id, old in former.items():
            await cluster.agent.send_control(
                WorkerStarted(worker_id=worker_id, epoch=old.boot.epoch, pid=os.getpid())
            )
        for worker_id, old in former.items():
            if worker_id != "aw-1":  # this one has gone meanwhile
                held = old.inbox[0].assigned if isinstance(old.inbox[0], Welcome) else []
                cluster.fakes[worker_id] = await cluster.join(old.boot, resident=held, was_ready=True)
        after = await cluster.full()
        assert after["ert_version"] > before["ert_version"]
        assert [o.worker_id for o in cluster.orders if isinstance(o, StartWorker)] == ["aw-1"]
        for worker_id, old in former.items():
            epoch = worker(after, worker_id)["epoch"]
            assert epoch == old.boot.epoch if worker_id != "aw-1" else epoch >> 20 == 2
        table = cluster.fakes["aw-0"].inbox[0].table  # type: ignore[union-attr]
        assert all(len(found) == 2 for row in table.candidates for found in row)
        told = [m for m in cluster.fakes["gateway"].inbox if isinstance(m, (Welcome, Peers))]
        assert all("aw-0" in [p.worker_id for p in m.peers] for m in told), "aw-0 has the gateway's requests"

    run(test, model, adoption_window_s=3.0)


# ------------------------------------------------------------------ faults of the user


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"admin_host": "0.0.0.0"}, "it needs an admin key"),
        ({"expert_memory_bytes_max": EXPERT_BYTES}, "8 experts of 768 bytes each do not fit on 2 expert"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence_and_exit_code_2(
    model: str, settings: dict[str, Any], sentence: str
) -> None:
    cluster = Cluster(model, **settings)
    code, errors = cluster.ended()
    assert code == 2
    assert errors.count("\n") == 1
    assert sentence in errors


def test_a_port_in_use_is_one_sentence_and_exit_code_2(model: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, errors = Cluster(model, admin_port=port).ended()
    assert code == 2
    assert errors == (
        f"tarragon: the status API cannot listen at 127.0.0.1 port {port} (admin_port): "
        "Address already in use\n"
    )


def test_a_missing_model_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    code, errors = Cluster(str(tmp_path / "nowhere")).ended()
    assert code == 2
    assert errors.count("\n") == 1
    assert "nowhere" in errors


def test_without_an_agent_it_does_not_stay(model: str) -> None:
    code, errors = Cluster(model, connect_timeout_s=0.2).ended()
    assert code == 1
    assert "no node agent has come" in errors
