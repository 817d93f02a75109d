"""The parts of `tarragon bench failover` that need no cluster."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tarragon.bench import failover, failover_report, faults, owners
from tarragon.bench.timeline import Trace
from tarragon.config import Config, ConfigError


def result(stalls_ms: list[float], **metrics: Any) -> dict[str, Any]:
    series = {
        "after_fault_s": [-0.05, 0.05],
        "tokens_per_s": [100.0, 0.0],
        "gap_median_ms": [10.0, 0.0],
        "gap_largest_ms": [12.0, 0.0],
    }
    trials = [
        {
            "victim": "ew-0",
            "stall_ms": stall_ms,
            "stall_began_s": 0.0,
            "stall_first_second_ms": stall_ms / 2,
            "resume_ms": {"max": stall_ms},
            "full_capacity_s": 8.0,
            "serving_after_s": 20.0,
            "before": {"median_ms": 10.0, "p95_ms": 12.0, "largest_ms": 15.0},
            "series": series,
        }
        for stall_ms in stalls_ms
    ]
    baseline = {"tarragon": {"trials": [{**trials[0], "stall_ms": 20_000.0}]}}
    return {
        "name": "failover",
        "settings": {"role": "expert", "signal": "KILL"},
        "metrics": {
            "trials": trials,
            "baseline": baseline,
            "rate_per_s": 1.0,
            "capacity_tokens_per_s": 256.0,
            **metrics,
        },
    }


def test_the_gate_is_the_median_of_trials_and_the_ratio_is_against_it() -> None:
    made = result([20.0, 40.0, 500.0])
    failover_report.conclude(made["metrics"], "expert", "KILL")
    metrics = made["metrics"]
    assert metrics["gate"]["holds"]
    assert metrics["stall_ms"]["median"] == 40.0
    assert metrics["stall_ms"]["p95"] == pytest.approx(454.0)
    assert metrics["baseline"]["tarragon"]["ratio_of_stalls"]["median"] == 500.0
    assert "500 times ours" in failover_report.table(made)

    none = result([0.0])
    failover_report.conclude(none["metrics"], "expert", "KILL")
    assert "ours was none" in failover_report.table(none)

    late = result([20.0, 140.0, 500.0])
    failover_report.conclude(late["metrics"], "expert", "KILL")
    assert not late["metrics"]["gate"]["holds"]


def test_for_attention_workers_the_gate_is_about_the_streams_that_they_held() -> None:
    made = result([0.0, 0.0, 320.0])
    made["metrics"]["trials"][2]["held"] = {"stall_ms": 320.0}
    failover_report.conclude(made["metrics"], "attention", "KILL")
    assert not made["metrics"]["gate"]["holds"]
    assert made["metrics"]["stall_judged_ms"]["n"] == 1
    assert "300 ms, 1 trials): does not hold" in failover_report.table(made)

    nobody = result([0.0])
    failover_report.conclude(nobody["metrics"], "attention", "KILL")
    assert "gate" not in nobody["metrics"]
    assert "no lost worker held a stream" in failover_report.table(nobody)


@pytest.mark.parametrize(
    ("metrics", "kept"),
    [
        ({"requests": 5, "compared": 5, "failed": {}, "differing": []}, True),
        ({"requests": 5, "compared": 4, "failed": {}, "differing": []}, False),
        ({"requests": 5, "compared": 5, "failed": {3: "HTTP 503"}, "differing": []}, False),
        ({"requests": 5, "compared": 5, "failed": {}, "differing": [3]}, False),
        ({"requests": 5}, False),
    ],
)
def test_promises_are_kept_only_if_all_requests_were_compared(metrics: dict[str, Any], kept: bool) -> None:
    assert failover_report.promises_kept(result([1.0], **metrics)) is kept


def test_the_control_looks_at_windows_as_long_as_a_trial() -> None:
    trace = Trace(0, 0.0)
    for position in range(400):
        trace.take(position, 1, position * 0.01 + (0.2 if position > 250 else 0.0))
    trace.ended_s = 4.2
    found = failover_report.control([trace], 0.0, 4.0, 2.0)
    assert found["largest_in_window_ms"]["n"] == 2
    assert found["largest_in_window_ms"]["max"] == pytest.approx(210.0)
    assert found["largest_in_window_ms"]["min"] == pytest.approx(10.0)


def test_a_picture_is_drawn_from_the_json_alone(tmp_path: Path) -> None:
    from tarragon.bench.plots import failover_picture, middle

    made = result([30.0, 10.0, 20.0])
    assert middle(made["metrics"]["trials"])["stall_ms"] == 20.0
    failover_picture(made, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------ settings


def test_quick_changes_only_what_was_not_given() -> None:
    options = failover.with_defaults(failover.parser().parse_args(["--quick", "--trials", "7"]))
    assert (options.trials, options.baseline_trials, options.layers) == (7, 1, failover.QUICK_LAYERS)
    assert failover.with_defaults(failover.parser().parse_args([])).trials == 10


def test_settings_reach_the_cluster_and_unknown_ones_are_refused() -> None:
    options = failover.with_defaults(failover.parser().parse_args(["--set", "shadow_replicas=0"]))
    assert options.settings == {"shadow_replicas": "0"}
    with pytest.raises(ConfigError):
        failover.with_defaults(failover.parser().parse_args(["--set", "shadows=0"]))


def test_a_smaller_cluster_gets_no_more_threads_per_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failover.os, "sched_getaffinity", lambda _: set(range(8)))
    assert failover.attention_threads(Config(attention_workers=4)) == {"attention_threads": 2}


# ------------------------------------------------------------------ owners


def test_requests_of_the_lost_worker_are_known_by_their_ids() -> None:
    live = {
        f"cmpl-{owners.ID_PREFIX}12-0-1a2b": "aw-0",
        f"cmpl-{owners.ID_PREFIX}3-0-ffff": "aw-0",
        f"cmpl-{owners.ID_PREFIX}4-0-ffff": "aw-1",
        f"cmpl-{owners.ID_PREFIX}5-0-ffff": "",
        "cmpl-someone-else-0-ffff": "aw-0",
    }
    assert owners.indexes_held(live, "aw-0") == [3, 12]


def test_the_gateway_answers_who_holds_what_and_passes_everything_else_on() -> None:
    stream = SimpleNamespace(owner="aw-1")
    waiting = SimpleNamespace(owner=None)
    core = SimpleNamespace(streams=SimpleNamespace(live={"cmpl-bench-1-0-aa": stream, "other": waiting}))
    app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(engine_core=core)))
    passed_on: list[str] = []

    async def server(scope: dict[str, Any], receive: Any, send: Any) -> None:
        passed_on.append(scope["path"])

    async def ask(path: str) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await owners.Owners(server)({"type": "http", "path": path, "app": app}, None, send)
        return sent

    start, body = asyncio.run(ask(owners.PATH))
    assert start["status"] == 200
    assert json.loads(body["body"]) == {"cmpl-bench-1-0-aa": "aw-1", "other": ""}
    assert asyncio.run(ask("/v1/models")) == []
    assert passed_on == ["/v1/models"]


# ------------------------------------------------------------------ faults


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield sleeper
    sleeper.kill()
    sleeper.wait()


class FakeCluster:
    """Sends the signal itself, or does nothing at all."""

    def __init__(self, pid: int, works: bool = True) -> None:
        self.pid, self.works = pid, works

    def kill(self, worker_id: str, name: str) -> None:
        if self.works:
            subprocess.run(["kill", f"-{name.removeprefix('SIG')}", str(self.pid)], check=True)


def victim(process: subprocess.Popen[bytes]) -> faults.Victim:
    return faults.choose_victim(status(process.pid), "expert", random.Random(0))


def status(pid: int, epoch: int = 5) -> dict[str, Any]:
    worker = {"id": "ew-0", "role": "expert", "state": "healthy", "pid": pid, "epoch": epoch}
    other = {"id": "aw-0", "role": "attention", "state": "healthy", "pid": 1, "epoch": 9}
    return {"workers": [other, worker], "full_capacity": True}


def test_a_stop_is_seen_in_proc_and_undone(process: subprocess.Popen[bytes]) -> None:
    target = victim(process)
    ran_s, seen_s = faults.inject(FakeCluster(process.pid), target, "STOP")  # type: ignore[arg-type]
    assert ran_s < seen_s
    assert target.state == "T"
    assert faults.wake(target)
    assert target.alive
    assert target.state != "T"


def test_a_kill_is_seen_in_proc(process: subprocess.Popen[bytes]) -> None:
    target = victim(process)
    faults.inject(FakeCluster(process.pid), target, "KILL")  # type: ignore[arg-type]
    assert not target.alive
    assert not faults.wake(target)


@pytest.mark.parametrize("name", faults.SIGNALS)
def test_a_fault_that_did_not_happen_is_no_trial(
    process: subprocess.Popen[bytes], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_EFFECT_TIMEOUT_S", 0.1)
    with pytest.raises(faults.FaultError, match="had no effect"):
        faults.inject(FakeCluster(process.pid, works=False), victim(process), name)  # type: ignore[arg-type]


def test_another_process_with_the_same_pid_is_not_the_victim(process: subprocess.Popen[bytes]) -> None:
    target = victim(process)
    later = faults.Victim(target.worker_id, target.pid, target.epoch, target.started + 1)
    assert target.alive
    assert not later.alive


def test_without_a_healthy_worker_of_the_role_there_is_no_fault() -> None:
    with pytest.raises(faults.FaultError, match="no healthy attention"):
        faults.choose_victim({"workers": []}, "attention", random.Random(0))
