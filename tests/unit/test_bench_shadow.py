"""The knee of an expert's latency, and the verdict on a shadow that is only loaded (appendix D)."""

from __future__ import annotations

import pytest

from tarragon.bench import shadow


def test_the_knee_is_where_the_floor_meets_the_best_time_per_row() -> None:
    # 100 us for the weights, then 2 us a row from row 50 on.
    points = [(rows, max(100.0, 2.0 * rows)) for rows in (1, 8, 64, 256, 512)]
    found = shadow.knee(points[::-1])
    assert found == pytest.approx((50.0, 100.0, 2.0))


def test_without_growth_the_knee_is_at_the_end() -> None:
    assert shadow.knee([(1, 100.0), (64, 100.0)]).rows == pytest.approx(64.0)


@pytest.mark.parametrize(
    ("with_shadow", "expected"),
    [([101.0] * 6, "holds"), ([99.0, 104.0] * 3, "inconclusive"), ([104.0] * 6, "does not hold")],
)
def test_a_shadow_costs_nothing_only_if_the_whole_interval_says_so(
    with_shadow: list[float], expected: str
) -> None:
    none = [100.0] * 6
    found = shadow.compare({"none": none, "shadow": with_shadow, "in turn": none, "at once": none})
    assert found["verdict"] == expected


def test_sides_are_compared_round_by_round() -> None:
    found = shadow.compare(
        {
            "none": [100.0, 200.0] * 3,
            "shadow": [101.0, 202.0] * 3,
            "in turn": [150.0, 300.0] * 3,
            "at once": [220.0, 440.0] * 3,
        }
    )
    assert found["shadow"]["ratio"]["median"] == pytest.approx(1.01)
    assert found["at once"]["ratio"]["ci95"] == pytest.approx([2.2, 2.2])
    assert found["verdict"] == "holds"
    metrics = {
        "latency_us": {"1": {"median": 1.0, "min": 1.0, "max": 1.0}},
        "knee": shadow.Knee(50.0, 100.0, 2.0)._asdict(),
        "sides": {"64": found},
        "on_core_share": 0.99,
        "carries_over": "",
    }
    assert "64 rows: a loaded shadow is within 3% of none: holds" in shadow.table(metrics)
