"""What moved and when: the recorder, the account of its movements, and the slots of the picture."""

from __future__ import annotations

import pytest

from tarragon.bench import traffic
from tarragon.bench.load import LoadError
from tarragon.refe.traffic import FROM_EXPERTS, SEGMENTS, TO_EXPERTS, Movement, TrafficRing

FORMULA = {"checkpoint_bytes_per_token": 40.0, "experts_bytes_per_token": 400.0}


class Shape:
    """Two layers, both with experts."""

    layers = 2
    moe_layers = (0, 1)


def _layer(layer: int, at_s: float, *, late_segment: bool = False) -> list[Movement]:
    """Rows of two tokens for a millisecond, answers until 5 ms later, a segment within or after them."""
    segment_s = at_s + (0.0065 if late_segment else 0.002)
    return [
        Movement(TO_EXPERTS, layer, at_s, at_s + 0.001, 200),
        Movement(SEGMENTS, layer, segment_s, segment_s + 0.0005, 40),
        Movement(FROM_EXPERTS, layer, at_s + 0.005, at_s + 0.005, 150),
        Movement(FROM_EXPERTS, layer, at_s + 0.006, at_s + 0.006, 50),
    ]


def _movements() -> list[Movement]:
    return [one for number in range(9) for one in _layer(number % 2, 0.01 * number)]


def test_the_ring_keeps_the_latest_in_order() -> None:
    ring = TrafficRing(3, row_bytes=8)
    for number in range(5):
        ring.add(TO_EXPERTS, number, float(number), number + 0.5, 8)
    assert [event.layer for event in ring.latest()] == [2, 3, 4]
    assert TrafficRing(3, row_bytes=8).latest() == []


def test_only_layers_with_their_end_are_counted() -> None:
    movements = [Movement(FROM_EXPERTS, 1, 0.0, 0.0, 9), *_movements()]
    found = traffic.exchanges(movements)
    assert len(found) == 8
    assert found[0].gap_s == pytest.approx(0.005)


def test_bytes_are_held_against_the_formulas() -> None:
    found = traffic.conclude(traffic.exchanges(_movements()), Shape(), FORMULA, 4)  # type: ignore[arg-type]
    assert found["tokens_per_layer"] == pytest.approx(2.0)
    by_flow = found["bytes_per_token_and_layer"]
    assert by_flow["AW to EW"] == {"moved": pytest.approx(100.0), "formula": pytest.approx(100.0)}
    assert by_flow["EW to AW"]["moved"] == pytest.approx(100.0)
    assert by_flow["checkpoint segments"] == {"moved": pytest.approx(20.0), "formula": pytest.approx(20.0)}
    assert found["checkpoints_over_experts"]["moved"] == pytest.approx(0.1)
    assert found["segment_bytes_in_gaps"] == 1.0
    assert found["gap_share_of_time"] == pytest.approx(0.5 * 8 / 7)
    assert "in the" not in traffic.report(found).splitlines()[0]


def test_a_segment_after_the_answers_is_in_no_gap() -> None:
    movements = [one for number in range(9) for one in _layer(number % 2, 0.01 * number, late_segment=True)]
    found = traffic.conclude(traffic.exchanges(sorted(movements, key=lambda e: e.end_s)), Shape(), FORMULA, 2)  # type: ignore[arg-type]
    assert found["segment_bytes_in_gaps"] == 0.0


def test_too_little_is_said_so() -> None:
    with pytest.raises(LoadError, match="recorded 1 layers only"):
        traffic.conclude(traffic.exchanges(_movements()[:6]), Shape(), FORMULA, 8)  # type: ignore[arg-type]


def test_slots_hold_all_bytes_that_are_shown() -> None:
    shown = traffic.shown(traffic.exchanges(_movements()), 2)
    sums = traffic.slots(shown, 37)
    assert [sum(flow) for flow in sums] == pytest.approx([400.0, 400.0, 80.0])
    assert shown["length_ms"] == pytest.approx(20.0)
    assert len(shown["gaps_ms"]) == 2
