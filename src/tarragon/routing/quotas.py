"""How many primaries shall each worker have in each layer, so that few move? A transportation problem.

Every worker gets an even share of all experts, and an even part of its share in
each layer. What is left to choose is where the odd ones go; they go where the
most experts can stay. Shapes: L layers, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]
_NEVER = 1 << 30
"""Cost of an exchange that is impossible."""


def even_split(total: int, rooms: Sequence[int], prefer: Sequence[int]) -> list[int]:
    """Split ``total`` as evenly as ``rooms`` allow; odd ones go to those with most in ``prefer``."""
    levels, odd, open_ = _levels(total, rooms)
    takers = sorted(open_, key=lambda w: (-prefer[w], w))[:odd]
    return [level + (w in takers) for w, level in enumerate(levels)]


def layer_quotas(had: Sequence[Sequence[int]], experts: int, rooms: Sequence[int]) -> list[list[int]]:
    """Primaries per [layer][worker] that keep the most of ``had``, the primaries of now.

    Every layer sums to ``experts``; no worker exceeds its room. Within that, workers differ by at most
    one in total, and each worker's layers differ by at most one.
    """
    had_LW: _Ints = np.array(had, dtype=np.int64)
    layers = len(had)
    levels, odd, open_ = _levels(layers * experts, rooms)
    level_W: _Ints = np.array(levels, dtype=np.int64)
    base_W = level_W // layers
    # More than the base in a layer is worth granting where there is more to be kept.
    wants_LW = (had_LW > base_W).astype(np.int64)
    lower_W = level_W % layers
    upper_W = lower_W + np.isin(np.arange(len(rooms)), open_)
    if odd == 0:
        upper_W = lower_W
    extra_LW = _first_extras(wants_LW, lower_W, upper_W, odd)
    while _improve(extra_LW, wants_LW, lower_W, upper_W):
        pass
    quotas: list[list[int]] = (base_W + extra_LW).tolist()
    return quotas


def _levels(total: int, rooms: Sequence[int]) -> tuple[list[int], int, list[int]]:
    """Fill rooms like water: (level of each, how many get one more, who may be one of these)."""
    assert sum(rooms) >= total
    levels = list(rooms)
    open_ = list(range(len(rooms)))
    while True:
        level = total // len(open_)
        full = [w for w in open_ if rooms[w] <= level]
        if not full or len(full) == len(open_):
            for w in open_:
                levels[w] = level
            return levels, total - level * len(open_), open_
        total -= sum(rooms[w] for w in full)
        open_ = [w for w in open_ if rooms[w] > level]


def _first_extras(wants_LW: _Ints, lower_W: _Ints, upper_W: _Ints, odd: int) -> _Ints:
    """Any choice with the right sums: 0 or 1 per [layer][worker], the same number in every layer."""
    layers, workers = wants_LW.shape
    takers = sorted(np.flatnonzero(upper_W > lower_W), key=lambda w: (-wants_LW[:, w].sum(), w))[:odd]
    left_W = lower_W.copy()
    left_W[takers] += 1
    assert left_W.sum() % layers == 0
    extra_LW = np.zeros((layers, workers), dtype=np.int64)
    for layer in range(layers):
        # Those who still need most go first: so nobody is left with more than there are layers.
        order = sorted(range(workers), key=lambda w: (-left_W[w], -wants_LW[layer, w], w))
        chosen = order[: left_W.sum() // (layers - layer)]
        extra_LW[layer, chosen] = 1
        left_W[chosen] -= 1
    assert not left_W.any()
    return extra_LW


def _improve(extra_LW: _Ints, wants_LW: _Ints, lower_W: _Ints, upper_W: _Ints) -> bool:
    """Apply one round of exchanges that keeps more experts where they are; False if there is none.

    Edge u -> v: in some layer the extra of u goes to v. A cycle leaves all sums as they are; the last
    node stands for the slack of sums that may vary by one. A cycle of negative cost is an improvement.
    """
    workers = len(lower_W)
    has, lacks = extra_LW[:, :, None] == 1, extra_LW[:, None, :] == 0
    cost_LWW = np.where(has & lacks, wants_LW[:, :, None] - wants_LW[:, None, :], _NEVER)
    cost = np.full((workers + 1, workers + 1), _NEVER, dtype=np.int64)
    cost[:workers, :workers] = cost_LWW.min(axis=0)
    total_W = extra_LW.sum(axis=0)
    cost[:workers, workers] = np.where(total_W < upper_W, 0, _NEVER)
    cost[workers, :workers] = np.where(total_W > lower_W, 0, _NEVER)
    cycle = _negative_cycle(cost)
    for u, v in zip(cycle, cycle[1:] + cycle[:1], strict=True):
        if u < workers and v < workers:
            layer = int(cost_LWW[:, u, v].argmin())
            extra_LW[layer, u], extra_LW[layer, v] = 0, 1
    return bool(cycle)


def _negative_cycle(cost: _Ints) -> list[int]:
    """Nodes of one cycle with negative cost, in order, or none (Bellman and Ford)."""
    nodes = len(cost)
    distance = np.zeros(nodes, dtype=np.int64)
    before = np.full(nodes, -1)
    changed = np.zeros(nodes, dtype=bool)
    for _ in range(nodes):
        through = distance[:, None] + cost
        best = through.min(axis=0)
        changed = best < distance
        before[changed] = through.argmin(axis=0)[changed]
        distance = np.minimum(distance, best)
    if not changed.any():
        return []
    node = int(np.flatnonzero(changed)[0])
    for _ in range(nodes):  # now surely on the cycle, not on a path that leads to it
        node = int(before[node])
    cycle = [node]
    while (node := int(before[node])) != cycle[0]:
        cycle.append(node)
    return cycle[::-1]
