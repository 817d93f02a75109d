"""dispatch, replay, combine, gather and scatter against plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarragon import native
from tarragon.native import build

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Recorded = dict[int, tuple[int, int]]
"""Pair -> (slot, row)."""


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build.build()
    native.load()


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Case:
    """Tensors of one layer's exchange: T tokens of K experts each, over the regions of some slots."""

    def __init__(
        self, seed: int, tokens: int, top_k: int, slots: int, hidden: int, dtype: torch.dtype
    ) -> None:
        random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.tokens, self.top_k, self.slots, self.experts = tokens, top_k, slots, 6
        pairs = tokens * top_k
        wide = torch.randn(tokens, hidden + 3).to(dtype)
        self.x = wide[:, 2 : 2 + hidden]  # rows that are strided, as a slice of a fused output is
        ids = random.integers(0, self.experts, (tokens, top_k))
        self.ids = torch.from_numpy(ids.astype(random.choice(["int32", "int64"])))
        self.rows = [torch.zeros(2 * pairs, hidden, dtype=dtype) for _ in range(slots)]
        self.region_ids = [torch.full((2 * pairs,), -7, dtype=torch.int32) for _ in range(slots)]
        self.pair_slot, self.pair_row = int32([-9] * pairs), int32([-9] * pairs)
        self.counts = int32([99] * slots)
        self.weights = torch.rand(tokens, top_k)

    def dispatch(self, owner: list[int]) -> bool:
        return native.dispatch(
            self.x,
            self.ids,
            int32(owner),
            self.rows,
            self.region_ids,
            self.pair_slot,
            self.pair_row,
            self.counts,
        )

    def replay(self, owner: list[int], lost: int, starts: list[int]) -> bool:
        return native.replay(
            *(self.x, self.ids, int32(owner), lost, self.rows, self.region_ids, int32(starts)),
            *(self.pair_slot, self.pair_row, self.counts),
        )

    def recorded(self) -> Recorded:
        places = zip(self.pair_slot.tolist(), self.pair_row.tolist(), strict=True)
        return dict(enumerate(places))

    def everything(self) -> list[Any]:
        tensors = [*self.rows, *self.region_ids, self.pair_slot, self.pair_row, self.counts]
        return [tensor.tolist() for tensor in tensors]

    def check_regions(self, recorded: Recorded) -> None:
        """Every pair lies where it is recorded, and nothing else was written."""
        taken: list[set[int]] = [set() for _ in range(self.slots)]
        for pair, (slot, row) in recorded.items():
            if slot >= 0:
                assert torch.equal(self.rows[slot][row], self.x[pair // self.top_k])
                assert self.region_ids[slot][row] == self.ids.view(-1)[pair]
                taken[slot].add(row)
        for slot in range(self.slots):
            untouched = [row for row in range(len(self.rows[slot])) if row not in taken[slot]]
            assert not self.rows[slot][untouched].any()
            assert (self.region_ids[slot][untouched] == -7).all()


def place(
    ids: list[int], pairs: list[int], owner: list[int], starts: list[int]
) -> tuple[Recorded, list[int]]:
    """The reference: append pair by pair."""
    recorded: Recorded = {}
    counts = [0] * len(starts)
    for pair in pairs:
        slot = owner[ids[pair]]
        recorded[pair] = (-1, -1)
        if slot >= 0:
            recorded[pair] = (slot, starts[slot] + counts[slot])
            counts[slot] += 1
    return recorded, counts


cases = st.builds(
    Case,
    seed=st.integers(0, 10_000),
    tokens=st.integers(0, 9),
    top_k=st.integers(1, 4),
    slots=st.integers(1, 4),
    hidden=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
)


def owners(case: Case, data: st.DataObject, lowest: int, but: int = -2) -> list[int]:
    slot = st.integers(lowest, case.slots - 1).filter(lambda s: s != but)
    return data.draw(st.lists(slot, min_size=case.experts, max_size=case.experts))


@settings(max_examples=80, deadline=None)
@given(case=cases, data=st.data())
def test_dispatch_and_replay_place_every_pair_once(case: Case, data: st.DataObject) -> None:
    owner = owners(case, data, -1)
    ids = case.ids.view(-1).tolist()
    wanted, counts = place(ids, list(range(len(ids))), owner, [0] * case.slots)
    assert case.dispatch(owner) == all(slot >= 0 for slot, _ in wanted.values())
    assert case.recorded() == wanted
    assert case.counts.tolist() == counts
    case.check_regions(wanted)

    # Lose one slot, or -1: the pairs that could not be placed so far.
    lost = data.draw(st.integers(-1, case.slots - 1))
    heirs = owners(case, data, -1, but=lost) if case.slots > 1 or lost == -1 else [-1] * case.experts
    moving = [pair for pair, (slot, _) in wanted.items() if slot == lost]
    moved, more = place(ids, moving, heirs, counts)
    before = case.everything()
    if any(slot < 0 for slot, _ in moved.values()):
        assert not case.replay(heirs, lost, counts)
        assert case.everything() == before
        return
    assert case.replay(heirs, lost, counts)
    assert case.recorded() == wanted | moved
    assert case.counts.tolist() == more
    left_behind = {-pair - 1: wanted[pair] for pair in moving}  # still in the lost slot's region
    for pair, (slot, row) in left_behind.items():
        assert slot < 0 or torch.equal(case.rows[slot][row], case.x[(-pair - 1) // case.top_k])
    for slot in {slot for slot, _ in left_behind.values() if slot >= 0}:
        case.rows[slot].zero_()
        case.region_ids[slot].fill_(-7)
    case.check_regions(wanted | moved)


@settings(max_examples=80, deadline=None)
@given(case=cases, data=st.data())
def test_combine_sums_in_router_order_wherever_rows_are(case: Case, data: st.DataObject) -> None:
    computed = torch.randn(case.tokens * case.top_k, case.x.shape[1]).to(case.x.dtype)
    wanted = np.zeros(case.x.shape, np.float32)
    for k in range(case.top_k):
        products = case.weights[:, k, None].numpy() * computed[k :: case.top_k].float().numpy()
        wanted = wanted + products
    for _ in range(2):  # two placements, one result
        case.dispatch(owners(case, data, 0))
        results = [torch.full_like(rows, float("nan")) for rows in case.rows]
        for pair, (slot, row) in case.recorded().items():
            results[slot][row] = computed[pair]
        out = torch.empty(case.tokens, case.x.shape[1] + 1, dtype=case.x.dtype)[:, 1:]
        native.combine(results, case.pair_slot, case.pair_row, case.weights, out)
        assert torch.equal(out, torch.from_numpy(wanted).to(out.dtype))


@pytest.mark.parametrize("threads", [1, 2])
def test_large_batches_in_parallel(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case(3, tokens=1500, top_k=2, slots=3, hidden=600, dtype=torch.bfloat16)
        assert case.dispatch([0, 1, 2, 0, 1, 2])
        case.check_regions(case.recorded())
        out = torch.empty(1500, 600, dtype=torch.bfloat16)
        native.combine(case.rows, case.pair_slot, case.pair_row, case.weights, out)
    finally:
        torch.set_num_threads(before)
    x, weights = case.x.float(), case.weights
    assert torch.equal(out, (weights[:, :1] * x + weights[:, 1:] * x).bfloat16())


@settings(max_examples=50, deadline=None)
@given(
    frames=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=5),
    hidden=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_gather_and_scatter(frames: list[tuple[int, int]], hidden: int, dtype: torch.dtype) -> None:
    starts, counts = [start for start, _ in frames], [count for _, count in frames]
    rows = [torch.randn(13, hidden).to(dtype) for _ in frames]
    ids = [torch.randint(0, 99, (13,), dtype=torch.int32) for _ in frames]
    batch, batch_ids = torch.zeros(40, hidden, dtype=dtype), torch.full((40,), -7, dtype=torch.int32)
    total = native.gather_batch(rows, ids, starts, counts, batch, batch_ids)
    assert total == sum(counts)
    parts = [slice(start, start + count) for start, count in frames]
    wanted = torch.cat(
        [torch.zeros(0, hidden, dtype=dtype), *(r[p] for r, p in zip(rows, parts, strict=True))]
    )
    assert torch.equal(batch[:total], wanted)
    assert batch_ids[:total].tolist() == [i for v, p in zip(ids, parts, strict=True) for i in v[p].tolist()]
    assert not batch[total:].any()
    assert (batch_ids[total:] == -7).all()

    results = [torch.zeros(13, hidden, dtype=dtype) for _ in frames]
    native.scatter_batch(batch, starts, counts, results)
    for result, source, part in zip(results, rows, parts, strict=True):
        assert torch.equal(result[part], source[part])
        result[part] = 0
        assert not result.any()


# ------------------------------------------------------------------ errors


def _small(**changes: Any) -> Case:
    case = Case(1, tokens=4, top_k=2, slots=2, hidden=8, dtype=torch.float32)
    case.ids = torch.tensor([[0, 1], [2, 3], [4, 5], [0, 5]], dtype=torch.int32)
    for name, value in changes.items():
        setattr(case, name, value)
    return case


@pytest.mark.parametrize(
    ("case", "owner", "message"),
    [
        (lambda: _small(rows=[torch.zeros(16, 8), torch.zeros(2, 8)]), [0, 0, 0, 1, 1, 1], "holds 2 rows"),
        (lambda: _small(region_ids=[int32([0] * 16), int32([0] * 2)]), [0, 0, 0, 1, 1, 1], "region_ids"),
        (lambda: _small(ids=int32([[0, 1], [2, 6], [0, 0], [0, 0]])), [0] * 6, "expert id 6 of pair 3"),
        (lambda: _small(ids=int32([[0, 1], [2, -1], [0, 0], [0, 0]])), [0] * 6, "expert id -1 of pair 3"),
        (lambda: _small(ids=int32([[0, 1]])), [0] * 6, "must be"),
        (_small, [0, 0, 0, 0, 0, 2], "slot 2, but there are 2 regions"),
        (_small, [0, 0, 0, 0, 0, -2], "slot -2"),
        (lambda: _small(rows=[torch.zeros(16, 9), torch.zeros(16, 9)]), [0] * 6, "region_rows must be"),
        (lambda: _small(pair_slot=int32([0] * 7)), [0] * 6, "pair_slot must be"),
        (lambda: _small(counts=int32([0])), [0] * 6, "counts must be"),
    ],
)
def test_dispatch_refuses_and_writes_nothing(
    case: Callable[[], Case], owner: list[int], message: str
) -> None:
    made = case()
    before = made.everything()
    with pytest.raises(ValueError, match=message):
        made.dispatch(owner)
    assert made.everything() == before


def test_dispatch_refuses_other_types() -> None:
    for change in (
        {"ids": torch.zeros(4, 2)},
        {"rows": [torch.zeros(16, 8).half()] * 2},
        {"pair_row": torch.zeros(8, dtype=torch.int64)},
    ):
        with pytest.raises(TypeError):
            _small(**change).dispatch([0, 0, 0, 1, 1, 1])


def test_replay_refuses_what_would_be_lost_again() -> None:
    case = _small()
    assert case.dispatch([0, 0, 0, 1, 1, 1])
    before = case.everything()
    with pytest.raises(ValueError, match="still owned by the lost slot 0"):
        case.replay([0, 1, 1, 1, 1, 1], 0, [4, 4])
    with pytest.raises(ValueError, match="from row 13 on"):
        case.replay([1, 1, 1, 1, 1, 1], 0, [4, 13])
    assert case.everything() == before


def test_combine_refuses_pairs_that_lie_nowhere() -> None:
    case = _small()
    case.dispatch([0, 0, 0, 0, 0, -1])
    out = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="pair 5 lies in row -1 of slot -1"):
        native.combine(case.rows, case.pair_slot, case.pair_row, case.weights, out)
    case.dispatch([0, 0, 0, 0, 0, 1])
    with pytest.raises(ValueError, match="there are 1 results"):
        native.combine(case.rows[:1], case.pair_slot, case.pair_row, case.weights, out)
    with pytest.raises(ValueError, match="has 1 rows"):
        native.combine([rows[:1] for rows in case.rows], case.pair_slot, case.pair_row, case.weights, out)
    with pytest.raises(TypeError, match="weights must be float32"):
        native.combine(case.rows, case.pair_slot, case.pair_row, case.weights.double(), out)
    assert not out.any()


def test_gather_and_scatter_refuse_frames_outside_their_region() -> None:
    rows, ids = [torch.ones(4, 8)], [int32([1, 1, 1, 1])]
    batch, batch_ids = torch.zeros(3, 8), int32([0, 0, 0])
    with pytest.raises(ValueError, match="frame 0 has 3 rows from row 2 on"):
        native.gather_batch(rows, ids, [2], [3], batch, batch_ids)
    with pytest.raises(ValueError, match="hold 4 rows"):
        native.gather_batch(rows, ids, [0], [4], batch, batch_ids)
    with pytest.raises(ValueError, match="ids must be"):
        native.gather_batch(rows, [int32([1])], [0], [2], batch, batch_ids)
    with pytest.raises(ValueError, match="frame 0"):
        native.scatter_batch(batch, [-1], [1], rows)
    assert not batch.any()
    assert not batch_ids.any()
