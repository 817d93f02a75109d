"""When does a measured cost of protection count as shown?"""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest

from tarragon.bench import overhead
from tarragon.config import Config, load


@pytest.mark.parametrize(
    ("ci95", "pairs", "verdict"),
    [
        ([-0.004, 0.009], 20, "holds"),
        ([-0.004, 0.011], 20, "inconclusive"),
        ([0.011, 0.03], 20, "does not hold"),
        ([-0.001, 0.001], 4, "inconclusive"),
    ],
)
def test_only_a_whole_interval_decides(ci95: list[float], pairs: int, verdict: str) -> None:
    assert overhead.verdict(ci95, pairs) == verdict


@pytest.mark.parametrize(
    ("cost", "noise", "verdict"),
    [(0.0, 0.002, "holds"), (0.0, 0.2, "inconclusive"), (0.05, 0.005, "does not hold")],
)
def test_a_cost_is_found_through_a_drift_that_hits_both_sides(
    cost: float, noise: float, verdict: str
) -> None:
    rng = random.Random(3)
    rates: dict[str, list[float]] = {"on": [], "off": []}
    metrics: dict[str, Any] = {
        "tokens_per_s": rates,
        "cpu_ms_per_token": {"on": [1.0] * 20, "off": [1.0] * 20},
    }
    for _ in range(20):
        speed = rng.uniform(50.0, 150.0)
        rates["off"].append(speed)
        rates["on"].append(speed * (1.0 - cost) * (1.0 + rng.uniform(-noise, noise)))
    overhead.conclude(metrics)
    assert metrics["verdict"] == verdict
    assert metrics["cost"]["ci95"][0] <= metrics["cost"]["median"] <= metrics["cost"]["ci95"][1]


def test_what_switches_protection_off_are_settings() -> None:
    off = overhead.off_settings()
    assert off["shadow_replicas"] == 0
    assert load(environ={}, flags=off) != Config()


def test_processor_time_of_a_cluster_is_counted() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    class One:
        def processes(self) -> list[int]:
            return [busy.pid]

    try:
        before_s = overhead.cpu_s(One())  # type: ignore[arg-type]
        for _ in range(200):
            if overhead.cpu_s(One()) > before_s + 0.1:  # type: ignore[arg-type]
                return
            sum(range(100_000))
        pytest.fail("no processor time was counted")
    finally:
        busy.kill()
        busy.wait()
