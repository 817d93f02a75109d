"""Rows of each call of an expert: what the worker counts, and what the benchmark makes of it (appendix B)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from tarragon.bench import batchsize
from tarragon.experts import batch_sizes
from tarragon.experts.batch_sizes import BOUNDS, SKIPPED, BatchSizes, histogram


def ids(*experts: int) -> npt.NDArray[np.int32]:
    return np.array(experts, dtype=np.int32)


def calls(row: list[float]) -> dict[float, float]:
    """The bins that are not empty."""
    return {bound: count for bound, count in zip([*BOUNDS, float("inf")], row, strict=True) if count}


def test_calls_are_counted_by_layer_and_rows() -> None:
    sizes = BatchSizes(2, 8)
    sizes.note(1, ids(0, 3, 3, 0, 3, 3, 3))  # expert 0 gets 2 rows, expert 3 gets 5
    sizes.note(1, ids(7))
    sizes.note(0, ids(*[4] * 2000))
    found = histogram(sizes.counters())
    assert calls(found[1]) == {1: 1, 2: 1, 6: 1}
    assert calls(found[0]) == {float("inf"): 1}
    sizes.note(1, ids(7))
    assert calls(histogram(sizes.counters())[1]) == {1: 2, 2: 1, 6: 1}  # cumulative


def test_bounds_belong_to_their_bin() -> None:
    sizes = BatchSizes(1, 2)
    for rows in BOUNDS:
        sizes.note(0, ids(*[1] * rows))
    assert calls(histogram(sizes.counters())[0]) == dict.fromkeys(BOUNDS, 1)


def test_a_full_log_drops_batches_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sizes, "LOG_PAIRS_MAX", 10)
    sizes = BatchSizes(1, 4)
    for _ in range(4):
        sizes.note(0, ids(1, 1, 1, 1))
    found = sizes.counters()
    assert (calls(histogram(found)[0]), found[SKIPPED]) == ({4: 2}, 2.0)
    sizes.note(0, ids(1, 1, 1, 1))  # there is room again
    found = sizes.counters()
    assert (calls(histogram(found)[0]), found[SKIPPED]) == ({4: 3}, 2.0)


def test_two_looks_are_subtracted_and_workers_added() -> None:
    first, second = BatchSizes(2, 4), BatchSizes(2, 4)
    first.note(0, ids(0, 0))
    before = [first.counters() | {"pairs": 2.0}, second.counters() | {"pairs": 0.0}]
    first.note(0, ids(0, 0, 0))
    second.note(0, ids(2, 3))
    second.note(1, ids(2))
    after = [first.counters() | {"pairs": 5.0}, second.counters() | {"pairs": 3.0}]
    found = batchsize.conclude(before, after, 2.0)
    assert calls(found["calls"]) == {1: 3, 3: 1}
    assert calls(found["layers"]["1"]["calls"]) == {1: 1}
    assert found["rows_mean"] == pytest.approx(6 / 4)
    assert found["calls_per_s"] == 2.0
    assert found["quantiles"]["0.5"] == 1.0
    assert found["quantiles"]["0.9"] == 3.0


def test_quantiles() -> None:
    row = [0.0] * (len(BOUNDS) + 1)
    assert batchsize.quantile(row, 0.5) == 0.0
    row[0], row[-1] = 1.0, 1.0
    assert batchsize.quantile(row, 0.5) == 1.0
    assert batchsize.quantile(row, 0.51) == float("inf")
