"""Which expert worker shall hold which expert (5.3)? A pure function of what is known.

Every logical expert gets one **primary**, where its rows go in the common case,
and up to ``replicas`` **shadows**: loaded but inactive copies on other workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tarragon.messages import ExpertId
from tarragon.routing.quotas import even_split, layer_quotas

Usage = Sequence[Sequence[float]]
"""Rows computed per [layer][expert]; only the ratios matter."""

_GONE = -1
"""Stands for a former holder that is not among the workers any more."""


class PlacementError(ValueError):
    """The primaries do not fit into the memory of the workers; the message says what would fit."""


class WorkerBudget(NamedTuple):
    """One expert worker and how many bytes of expert weights it may hold; 0 is no limit."""

    worker_id: str
    memory_bytes_max: int = 0


@dataclass(frozen=True)
class Placement:
    """``holders[layer][expert]`` lists indexes into ``workers``: the primary first, then the shadows."""

    workers: tuple[str, ...]
    holders: tuple[tuple[tuple[int, ...], ...], ...]

    def holder_ids(self, layer: int, expert: int) -> tuple[str, ...]:
        """Ids of the workers that shall hold the expert, the primary first."""
        return tuple(self.workers[index] for index in self.holders[layer][expert])

    def assigned(self, worker_id: str) -> list[ExpertId]:
        """What ``worker_id`` shall hold: primaries first, then shadows, each by layer and expert."""
        if worker_id not in self.workers:
            return []
        me = self.workers.index(worker_id)
        primaries: list[ExpertId] = []
        shadows: list[ExpertId] = []
        for layer, row in enumerate(self.holders):
            for expert, holders in enumerate(row):
                if me in holders:
                    (primaries if holders[0] == me else shadows).append(ExpertId(layer, expert))
        return primaries + shadows


def place(
    *,
    layers: int,
    experts: int,
    workers: Sequence[WorkerBudget],
    expert_bytes: int,
    replicas: int,
    usage: Usage | None = None,
    current: Placement | None = None,
    load_ratio_max: float = 1.0,
) -> Placement:
    """Decide who holds what.

    Each worker is primary for the same number of experts, within one, in every layer and in total
    (as far as budgets allow): a step waits for its slowest worker in each layer, and small batches
    cost by the weights they read. Within that, ``usage`` evens out the rows. What ``current`` says
    stays as far as these rules allow; rows alone move an expert only where a layer's busiest worker
    has more than ``load_ratio_max`` times the mean. Shadows take the memory that is left, the most
    used experts first, each worker's spread over all others so that all share in its failure.

    The result depends on the arguments only. Raises PlacementError if the primaries do not fit.
    """
    assert min(layers, experts, expert_bytes) > 0
    assert replicas >= 0
    rooms = _rooms(layers * experts, workers, expert_bytes)
    known = [[float(count) for count in row] for row in usage] if usage is not None else None
    weights = known or [[1.0] * experts for _ in range(layers)]
    before = _former_holders(layers, experts, workers, current)
    primaries = _Primaries(weights, before, rooms).solve(load_ratio_max if current and known else 1.0)
    left = [room - sum(row.count(w) for row in primaries) for w, room in enumerate(rooms)]
    holders = _Shadows(weights, before, primaries, left).solve(min(replicas, len(workers) - 1))
    return Placement(tuple(worker.worker_id for worker in workers), holders)


def covered_share(placement: Placement, usage: Usage) -> float:
    """Part of all rows that went to experts with a shadow: what the loss of one worker does not delay."""
    total = sum(map(sum, usage))
    covered = sum(
        rows
        for row, holders_row in zip(usage, placement.holders, strict=True)
        for rows, holders in zip(row, holders_row, strict=True)
        if len(holders) > 1
    )
    return covered / total if total else 0.0


def _rooms(total: int, workers: Sequence[WorkerBudget], expert_bytes: int) -> list[int]:
    """How many experts each worker may hold; raises PlacementError if all together hold too few."""
    rooms = [
        min(total, worker.memory_bytes_max // expert_bytes) if worker.memory_bytes_max else total
        for worker in workers
    ]
    if sum(rooms) >= total:
        return rooms
    need = f"{total} experts of {expert_bytes:,} bytes each"
    if not workers:
        raise PlacementError(f"{need} need at least one expert worker, but there is none")
    each = -(-total // len(workers)) * expert_bytes
    message = f"{need} do not fit on {len(workers)} expert worker(s): {each:,} bytes on each would do"
    if min(rooms) > 0:
        message += f", or {-(-total // min(rooms))} workers with {min(rooms)} experts each"
    raise PlacementError(message)


def _former_holders(
    layers: int, experts: int, workers: Sequence[WorkerBudget], current: Placement | None
) -> list[list[tuple[int, ...]]]:
    """``current``'s holders as indexes into ``workers``, _GONE where a worker left."""
    if current is None:
        return [[(_GONE,)] * experts for _ in range(layers)]
    index = {worker.worker_id: w for w, worker in enumerate(workers)}
    new = [index.get(worker_id, _GONE) for worker_id in current.workers]
    return [[tuple(new[old] for old in holders) for holders in row] for row in current.holders]


class _Primaries:
    """Chooses the primaries, layer by layer."""

    def __init__(
        self, weights: list[list[float]], before: list[list[tuple[int, ...]]], rooms: list[int]
    ) -> None:
        self.weights, self.before = weights, before
        self.experts, self.workers = len(weights[0]), range(len(rooms))
        had = [[sum(h[0] == w for h in row) for w in self.workers] for row in before]
        self.quotas = layer_quotas(had, self.experts, rooms)
        self.loads = [0.0] * len(rooms)

    def solve(self, load_ratio_max: float) -> list[list[int]]:
        """Return the primary of each [layer][expert]."""
        result = []
        for layer, quota in enumerate(self.quotas):
            owner = self._keep(layer, quota)
            self._fill(layer, quota, owner)
            self._even_out(layer, owner, load_ratio_max)
            for expert, w in enumerate(owner):
                self.loads[w] += self.weights[layer][expert]
            result.append(owner)
        return result

    def _keep(self, layer: int, quota: list[int]) -> list[int]:
        """Who keeps what it had, up to its quota; the rest is _GONE. Experts with a shadow go first."""
        before = self.before[layer]
        owner = [_GONE] * self.experts
        for w in self.workers:
            mine = [e for e in range(self.experts) if before[e][0] == w]
            mine.sort(key=lambda e: (any(h not in (w, _GONE) for h in before[e]), e))
            for expert in mine[: quota[w]]:
                owner[expert] = w
        return owner

    def _fill(self, layer: int, quota: list[int], owner: list[int]) -> None:
        """Give the others a primary: first where a copy is loaded already, then where load is least."""
        weights, before = self.weights[layer], self.before[layer]
        load, count = [0.0] * len(quota), [0] * len(quota)

        def assign(expert: int, w: int) -> None:
            owner[expert] = w
            load[w] += weights[expert]
            count[w] += 1

        for expert, w in enumerate(owner):
            if w != _GONE:
                assign(expert, w)
        for loaded_only in (True, False):
            for expert in sorted(range(self.experts), key=lambda e: (-weights[e], e)):
                if owner[expert] != _GONE:
                    continue
                options = [w for w in self.workers if count[w] < quota[w]]
                if loaded_only:
                    options = [w for w in options if w in before[expert]]
                if options:
                    assign(expert, min(options, key=lambda w: (load[w], self.loads[w], count[w], w)))

    def _even_out(self, layer: int, owner: list[int], load_ratio_max: float) -> None:
        """Swap experts of the busiest and the idlest worker while that lowers the layer's peak."""
        weights = self.weights[layer]
        mean = sum(weights) / len(self.workers)
        for _ in range(self.experts):
            load = [sum(weights[e] for e, o in enumerate(owner) if o == w) for w in self.workers]
            hot = max(self.workers, key=lambda w: (load[w], -w))
            cold = min(self.workers, key=lambda w: (load[w], w))
            if load[hot] <= mean * load_ratio_max:
                return
            gap = load[hot] - load[cold]
            swaps = [
                (abs(gap / 2 - (weights[e] - weights[f])), e, f)
                for e, eo in enumerate(owner)
                if eo == hot
                for f, fo in enumerate(owner)
                if fo == cold and 0 < weights[e] - weights[f] < gap
            ]
            if not swaps:
                return
            _, e, f = min(swaps)
            owner[e], owner[f] = cold, hot


class _Shadows:
    """Chooses the shadows within the memory that the primaries left."""

    def __init__(
        self,
        weights: list[list[float]],
        before: list[list[tuple[int, ...]]],
        primaries: list[list[int]],
        left: list[int],
    ) -> None:
        self.weights, self.before, self.primaries, self.left = weights, before, primaries, left
        self.layers, self.experts, self.workers = len(weights), len(weights[0]), range(len(left))
        self.holders = [[[w] for w in row] for row in primaries]
        self.held = [0] * len(left)
        self.shares = [0] * len(left)
        # How many experts of primary p are shadowed by w: in each layer, and in all.
        self.backs_layer = [[[0] * len(left) for _ in left] for _ in weights]
        self.backs = [[0] * len(left) for _ in left]

    def solve(self, replicas: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return the holders of each [layer][expert], the primary first."""
        wanted = min(replicas * self.layers * self.experts, sum(self.left))
        former = Counter(w for row in self.before for holders in row for w in holders[1:])
        self.shares = even_split(wanted, self.left, [former[w] for w in self.workers])
        order = [(layer, expert) for layer in range(self.layers) for expert in range(self.experts)]
        order.sort(key=lambda at: -self.weights[at[0]][at[1]])  # stable: then by layer and expert
        for copies in range(1, replicas + 1):
            for layer, expert in order[: sum(self.left)]:
                self._keep(layer, expert)
            for layer, expert in order:
                if len(self.holders[layer][expert]) == copies:
                    self._add(layer, expert, copies, order)
        return tuple(tuple(tuple(h) for h in row) for row in self.holders)

    def _keep(self, layer: int, expert: int) -> None:
        """Leave a copy where one was, within the worker's even share of all shadows."""
        holders = self.holders[layer][expert]
        for w in self.before[layer][expert]:
            if w != _GONE and w not in holders and self.left[w] > 0 and self.held[w] < self.shares[w]:
                self._hold(layer, expert, w, +1)
                holders.append(w)
                return

    def _add(self, layer: int, expert: int, copies: int, order: list[tuple[int, int]]) -> None:
        """Give the expert one more copy, if there is or can be made room for it."""
        holders = self.holders[layer][expert]
        options = [w for w in self.workers if self.left[w] > 0 and w not in holders]
        if not options and any(self.left):
            w = self._make_room(holders)
            if w is None:
                w = self._displace(holders, self.weights[layer][expert], copies, order)
            options = [] if w is None else [w]
        if options:
            backs, backs_layer = self.backs[holders[0]], self.backs_layer[layer][holders[0]]
            best = min(
                options,
                key=lambda w: (self.held[w] >= self.shares[w], backs_layer[w], backs[w], self.held[w], w),
            )
            self._hold(layer, expert, best, +1)
            holders.append(best)

    def _hold(self, layer: int, expert: int, w: int, sign: int) -> None:
        primary = self.primaries[layer][expert]
        self.left[w] -= sign
        self.held[w] += sign
        self.backs[primary][w] += sign
        self.backs_layer[layer][primary][w] += sign

    def _make_room(self, holders: list[int]) -> int | None:
        """Free a place for one more copy beside ``holders`` by moving another expert's shadow.

        The only room left is on workers that hold the expert already; a shadow elsewhere may move there.
        """
        free = [w for w in self.workers if self.left[w] > 0]
        for layer, row in enumerate(self.holders):
            for expert, other in enumerate(row):
                target = next((f for f in free if f not in other), None)
                for position, w in enumerate(other[1:], start=1):
                    if w not in holders and target is not None:
                        self._hold(layer, expert, w, -1)
                        self._hold(layer, expert, target, +1)
                        other[position] = target
                        return w
        return None

    def _displace(
        self, holders: list[int], weight: float, copies: int, order: list[tuple[int, int]]
    ) -> int | None:
        """Take the place of a copy that a less used expert kept; that expert's turn comes after this one."""
        for layer, expert in reversed(order):
            other = self.holders[layer][expert]
            if self.weights[layer][expert] >= weight:
                return None
            if len(other) > copies and other[-1] not in holders:
                w = other.pop()
                self._hold(layer, expert, w, -1)
                return w
        return None
