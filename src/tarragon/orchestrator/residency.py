"""Which experts shall each expert worker hold now, on the way from what is to the placement? Pure.

The rules that make every move safe, planned or not:

* the table lists only what a live worker said it holds;
* nothing is dropped while a table that lists it may still be in use by an attention worker;
* an expert that lost its last live copy is loaded on a survivor at once (cold load), even if a shadow
  has to give way;
* what one worker has and no other keeps is pinned: it makes way for nothing;
* when the wanted holders are back, all of this undoes itself: the copy is unlisted, then dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tarragon.messages import ExpertId, Peer, Table
from tarragon.routing.placement import Placement
from tarragon.routing.table import Located, build_table, empty_table, listed, same_routes

NO_VERSION: Final = -1
"""Stands for the unknown tables of a former orchestrator: older than any of ours."""


@dataclass
class Holder:
    """One live expert worker."""

    peer: Peer
    room: int | None
    """Experts that it may hold, at least 1; None is no limit."""
    order: int = 0
    """Number of the last order; 0 before the first."""
    ordered: set[ExpertId] = field(default_factory=set)
    """What it was told to hold by that order."""
    open_orders: dict[int, set[ExpertId]] = field(default_factory=dict)
    """Orders that it has not yet said to have carried out, the last one included."""
    resident: set[ExpertId] = field(default_factory=set)
    """What it said it holds, as far as it was not told to drop it since."""
    ready: bool = False
    draining: bool = False


class Order(NamedTuple):
    """What a worker shall hold from now on, the most needed first; numbered from 1 per incarnation."""

    number: int
    experts: list[ExpertId]


class Step(NamedTuple):
    """What has to be told: a new table, if routes changed, and new orders per worker id."""

    table: Table | None
    orders: dict[str, Order]


class Residency:
    """Tables and orders of one cluster. Call ``step`` after whatever changed."""

    def __init__(self, target: Placement, version: int, *, cold_loads: bool = True) -> None:
        """``version`` is the number of the empty table that is in force at first.

        Without ``cold_loads`` (a baseline) experts of a lost worker wait for its replacement.
        """
        self._cold_loads = cold_loads
        self.target = target
        self.holders: dict[str, Holder] = {}
        self.cold: dict[ExpertId, str] = {}
        """Experts without a copy of their own, and the survivor that loads them."""
        layers, experts = len(target.holders), len(target.holders[0])
        self.table = empty_table(version, layers, experts)
        self._in_use: list[tuple[int, dict[str, set[ExpertId]]]] = [(version, {})]
        self._served: set[ExpertId] = set()
        self._kept: dict[str, set[ExpertId]] = {}
        """Per worker what it, of all wanted holders that have it, shall not give up; of the last step."""
        self._retarget()

    # ------------------------------------------------------------------ events

    def join(self, peer: Peer, room: int | None, resident: Iterable[ExpertId] = ()) -> None:
        """An incarnation connected; what it holds already, a former orchestrator's tables may name."""
        assert room is None or room > 0
        held = self._real(resident)
        holder = Holder(peer, room, ordered=held, resident=held.copy(), ready=bool(held))
        self.holders[peer.worker_id] = holder
        if held:
            self._in_use.append((NO_VERSION, {peer.worker_id: held.copy()}))

    def leave(self, worker_id: str) -> None:
        """An incarnation is gone, and all that it held."""
        self.holders.pop(worker_id, None)
        self.cold = {expert: w for expert, w in self.cold.items() if w != worker_id}

    def drain(self, worker_id: str) -> None:
        """The worker shall hold nothing in the end."""
        self.holders[worker_id].draining = True

    def holds(self, worker_id: str, resident: Iterable[ExpertId], order: int) -> None:
        """The worker says what it holds, having carried out ``order`` (0: it does not say).

        What an order that is still on its way makes it drop does not count any more.
        """
        holder = self.holders[worker_id]
        holder.ready = True
        known = self._real(resident) & holder.ordered
        if order:
            holder.open_orders = {n: experts for n, experts in holder.open_orders.items() if n > order}
            known = known.intersection(*holder.open_orders.values())
        else:
            holder.open_orders.clear()
        holder.resident = known

    def aim(self, target: Placement) -> None:
        """Pursue another placement."""
        self.target = target
        self._retarget()

    def superseded(self, version: int) -> bool:
        """Every attention worker uses table ``version`` or a later one; True if that retires a table."""
        before = len(self._in_use)
        self._in_use = [(v, names) for v, names in self._in_use if v >= version or v == self.table.version]
        return len(self._in_use) < before

    def is_drained(self, worker_id: str) -> bool:
        """Whether no table in use sends rows to the worker."""
        return not self._routable(worker_id)

    # ------------------------------------------------------------------ the step

    def step(self) -> Step:
        """Decide the next table and orders; the caller sends them."""
        self._kept = self._keepers()
        if self._cold_loads:
            self._choose_cold_loads()
        wanted = {worker_id: self._wanted(worker_id) for worker_id in self.holders}
        ranked = sorted(self.holders.values(), key=lambda h: (h.draining, id_order(h.peer.worker_id)))
        located = [Located(h.peer, h.resident & set(wanted[h.peer.worker_id])) for h in ranked]
        table = build_table(self.table.version + 1, self.target, located)
        changed = not same_routes(table, self.table)
        if changed:
            self.table = table
            names = listed(table)
            self._in_use.append((table.version, names))
            self._served |= set().union(*names.values())
        orders = {}
        for worker_id, holder in self.holders.items():
            experts = self._order(holder, wanted[worker_id])
            if holder.order == 0 or set(experts) != holder.ordered:
                holder.order += 1
                holder.ordered = holder.open_orders[holder.order] = set(experts)
                holder.resident &= holder.ordered
                orders[worker_id] = Order(holder.order, experts)
        return Step(table if changed else None, orders)

    def _real(self, experts: Iterable[ExpertId]) -> set[ExpertId]:
        """Those that the model has: what a worker says is not trusted."""
        layers, count = len(self.target.holders), len(self.target.holders[0])
        return {e for e in experts if 0 <= e.layer < layers and 0 <= e.expert < count}

    def _retarget(self) -> None:
        workers = self.target.workers
        self._assigned = {worker_id: self.target.assigned(worker_id) for worker_id in workers}
        self._own_primaries: dict[str, set[ExpertId]] = defaultdict(set)
        for layer, row in enumerate(self.target.holders):
            for expert, holders in enumerate(row):
                self._own_primaries[workers[holders[0]]].add(ExpertId(layer, expert))

    def _choose_cold_loads(self) -> None:
        held = set().union(*(h.resident for h in self.holders.values())) if self.holders else set()
        loading = {e for h in self.holders.values() if not h.draining for e in h.ordered}
        self.cold = {
            expert: worker_id
            for expert, worker_id in self.cold.items()
            if not self._has_wanted_copy(expert)
            # One that is to leave loads nothing more.
            and not (self.holders[worker_id].draining and expert not in self.holders[worker_id].resident)
        }
        needed = {
            worker_id: self._needed(worker_id)
            for worker_id, holder in self.holders.items()
            if holder.ready and not holder.draining
        }
        self._withdraw_from_full(needed)
        for expert in sorted(self._served - held - loading - set(self.cold)):
            hosts = [w for w, count in needed.items() if count < (self.holders[w].room or count + 1)]
            if not hosts:
                return
            host = min(hosts, key=lambda w: (needed[w], id_order(w)))
            self.cold[expert] = host
            needed[host] += 1

    def _withdraw_from_full(self, needed: dict[str, int]) -> None:
        """A host that keeps more than it did gives back what it was chosen for and not yet told to load."""
        for expert, worker_id in list(self.cold.items()):
            holder = self.holders[worker_id]
            is_full = holder.room is not None and needed.get(worker_id, 0) > holder.room
            if is_full and expert not in holder.ordered:
                del self.cold[expert]
                needed[worker_id] -= 1

    def _needed(self, worker_id: str) -> int:
        """Experts of a worker that leave no room for another cold load: all but spare copies and shadows."""
        return len({*self._pinned(worker_id), *self._cold_of(worker_id), *self._own_primaries[worker_id]})

    def _pinned(self, worker_id: str) -> list[ExpertId]:
        """What the worker has and nobody else keeps; if dropped, it would have to be loaded again."""
        only_copies = self._only_copies(worker_id)
        return [*self._cold_copies(worker_id), *only_copies, *sorted(self._kept[worker_id])]

    def _cold_copies(self, worker_id: str) -> list[ExpertId]:
        """What it was chosen to load, and has."""
        resident = self.holders[worker_id].resident
        return [expert for expert in self._cold_of(worker_id) if expert in resident]

    def _cold_of(self, worker_id: str) -> list[ExpertId]:
        return [expert for expert, host in self.cold.items() if host == worker_id]

    def _only_copies(self, worker_id: str) -> list[ExpertId]:
        """What the worker has, is not to have, and nobody has that is to: it waits to be taken over."""
        holder = self.holders[worker_id]
        target = [] if holder.draining else self._assigned.get(worker_id, [])
        return [
            expert
            for expert in sorted(holder.resident.difference(target))
            if self.cold.get(expert) != worker_id
            and not self._has_wanted_copy(expert)
            and not self._has_cold_copy(expert)
        ]

    def _keepers(self) -> dict[str, set[ExpertId]]:
        """Per worker what it keeps: of the wanted holders that have an expert and stay, the first keeps it.

        The others' copies may make way.
        """
        staying = {w: h.resident for w, h in self.holders.items() if not h.draining}
        resident = [staying.get(worker_id, set()) for worker_id in self.target.workers]
        kept: dict[str, set[ExpertId]] = {worker_id: set() for worker_id in self.holders}
        for layer, row in enumerate(self.target.holders):
            for expert, holders in enumerate(row):
                wanted = ExpertId(layer, expert)
                for index in holders:
                    if wanted in resident[index]:
                        kept[self.target.workers[index]].add(wanted)
                        break
        return kept

    def is_being_loaded(self, expert: ExpertId) -> bool:
        """Whether a worker is to load it without anybody's doing."""
        ordered = any(expert in h.ordered for h in self.holders.values() if not h.draining)
        return ordered or expert in self.cold

    def _has_wanted_copy(self, expert: ExpertId) -> bool:
        ids = self.target.holder_ids(expert.layer, expert.expert)
        return any(expert in self.holders[i].resident for i in ids if i in self.holders)

    def _wanted(self, worker_id: str) -> list[ExpertId]:
        """What the worker shall hold in this state of the cluster, the most needed first, within its room."""
        holder = self.holders[worker_id]
        cold = self._cold_of(worker_id)
        target = [] if holder.draining else self._assigned.get(worker_id, [])
        spare_copy = [e for e in sorted(holder.resident - {*cold, *target}) if self._misses_a_holder(e)]
        pinned = self._pinned(worker_id)
        wanted = list(dict.fromkeys([*pinned, *cold, *target, *spare_copy]))
        if holder.room is None or holder.draining:
            return wanted
        # A copy that waits to be taken over may go one beyond the budget: two full workers could not
        # exchange experts otherwise.
        exchanges = bool(self._only_copies(worker_id))
        exchanges |= any(self._is_to_be_taken(expert) for expert in self._cold_copies(worker_id))
        return wanted[: max(holder.room + exchanges, len(set(pinned)))]

    def _is_to_be_taken(self, expert: ExpertId) -> bool:
        """Whether a wanted holder lives that has yet to load it."""
        ids = self.target.holder_ids(expert.layer, expert.expert)
        return any(i in self.holders and not self.holders[i].draining for i in ids)

    def _has_cold_copy(self, expert: ExpertId) -> bool:
        host = self.cold.get(expert)
        return host is not None and expert in self.holders[host].resident

    def _misses_a_holder(self, expert: ExpertId) -> bool:
        ids = self.target.holder_ids(expert.layer, expert.expert)
        return any(i not in self.holders or expert not in self.holders[i].resident for i in ids)

    def _routable(self, worker_id: str) -> set[ExpertId]:
        """Experts for which a table in use may send rows to the worker."""
        return set().union(*(names.get(worker_id, ()) for _, names in self._in_use))

    def _order(self, holder: Holder, wanted: list[ExpertId]) -> list[ExpertId]:
        """``wanted``, with what must not be dropped yet, and without what finds no room yet."""
        staying = holder.resident & self._routable(holder.peer.worker_id)
        kept = sum(expert in holder.resident for expert in wanted) + len(staying - set(wanted))
        limit = len(wanted) + kept if holder.room is None else max(holder.room, len(wanted))
        order = []
        for expert in wanted:
            if expert in holder.resident:
                order.append(expert)
            elif kept < limit:
                order.append(expert)
                kept += 1
        return order + sorted(staying - set(wanted))


def id_order(worker_id: str) -> tuple[int, str]:
    """Sorts ew-2 before ew-10."""
    return len(worker_id), worker_id
