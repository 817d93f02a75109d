"""The cluster's metrics say what the status says, in a form that Prometheus' own parser reads."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tarragon.observability.metrics import exposition

STATUS: dict[str, Any] = {
    "ready": True,
    "full_capacity": False,
    "exact": True,
    "protected": False,
    "ert_version": 7,
    "experts": {"total": 32, "with_shadow": 20, "unreachable": 1},
    "workers": [
        {"id": "orchestrator", "role": "orchestrator", "epoch": 1, "state": "healthy"},
        {
            "id": "aw-0",
            "role": "attention",
            "epoch": 3,
            "state": "suspect",
            "counters": {"replayed_pairs": 12.0, "bucket": 1.0, "requests_total": 4.0},
        },
    ],
}


def samples() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = exposition(STATUS).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_state_coverage_and_counters() -> None:
    found = samples()
    assert found["tarragon_full_capacity", ()] == 0.0
    assert found["tarragon_experts", (("kind", "with_shadow"),)] == 20.0
    aw = (("role", "attention"), ("worker", "aw-0"))
    assert found["tarragon_worker_epoch", aw] == 3.0
    assert (
        found["tarragon_worker_state", (("role", "attention"), ("state", "suspect"), ("worker", "aw-0"))]
        == 1.0
    )
    assert (
        found["tarragon_worker_state", (("role", "attention"), ("state", "healthy"), ("worker", "aw-0"))]
        == 0.0
    )
    assert found["tarragon_worker_replayed_pairs_total", aw] == 12.0
    assert found["tarragon_worker_requests_total", aw] == 4.0
    assert found["tarragon_worker_bucket", aw] == 1.0
