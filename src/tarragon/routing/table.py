"""The expert routing table (ERT, 4.2): which live workers can compute an expert, best first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tarragon.messages import ExpertId, Peer, ProtocolError, Table
from tarragon.routing.placement import Placement

NOBODY = -1
"""Stands for "no live worker" in an owner array."""


class Located(NamedTuple):
    """One live expert worker and the experts to which rows may be sent there."""

    peer: Peer
    experts: Collection[ExpertId]


def build_table(version: int, placement: Placement, located: Sequence[Located]) -> Table:
    """Combine who shall hold an expert with who does.

    Candidates are the primary, then the shadows, as far as they are there. Only while one of them is
    missing do other workers that happen to hold the expert follow, in the order of ``located``: so a
    copy that is not wanted any more loses its traffic as soon as all wanted ones are up.
    """
    index = {one.peer.worker_id: w for w, one in enumerate(located)}
    candidates: list[list[list[int]]] = []
    for layer, row in enumerate(placement.holders):
        candidates.append([])
        for expert, holders in enumerate(row):
            wanted = ExpertId(layer, expert)
            ids = [placement.workers[h] for h in holders]
            found = [index[i] for i in ids if i in index and wanted in located[index[i]].experts]
            if len(found) < len(ids):
                found += [w for w, one in enumerate(located) if w not in found and wanted in one.experts]
            candidates[-1].append(found)
    return Table(version=version, workers=[one.peer for one in located], candidates=candidates)


def empty_table(version: int, layers: int, experts: int) -> Table:
    """The table of a cluster without expert workers."""
    return Table(
        version=version, workers=[], candidates=[[[] for _ in range(experts)] for _ in range(layers)]
    )


def same_routes(a: Table, b: Table) -> bool:
    """Whether two tables differ in their version at most."""
    return a.workers == b.workers and a.candidates == b.candidates


def unreachable(table: Table) -> list[ExpertId]:
    """Experts that no live worker hosts."""
    return [expert for expert, workers in _experts(table) if not workers]


def with_shadow(table: Table) -> int:
    """How many experts have at least two candidates."""
    return sum(len(workers) > 1 for _, workers in _experts(table))


def listed(table: Table) -> dict[str, set[ExpertId]]:
    """Per worker id the experts for which the table names it."""
    result: dict[str, set[ExpertId]] = {peer.worker_id: set() for peer in table.workers}
    for expert, workers in _experts(table):
        for w in workers:
            result[table.workers[w].worker_id].add(expert)
    return result


def _experts(table: Table) -> Iterator[tuple[ExpertId, list[int]]]:
    for layer, row in enumerate(table.candidates):
        for expert, workers in enumerate(row):
            yield ExpertId(layer, expert), workers


# ------------------------------------------------------------------ for an attention worker


def candidate_array(table: Table) -> npt.NDArray[np.int32]:
    """Candidates as int32 [layers, experts, most candidates], padded with NOBODY.

    Raises ProtocolError if layers differ in their number of experts or an index names no worker.
    """
    shape = {len(row) for row in table.candidates}
    if len(shape) > 1:
        raise ProtocolError(f"table version {table.version} has layers of {sorted(shape)} experts")
    lists = [workers for row in table.candidates for workers in row]
    lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    flat = np.fromiter((w for workers in lists for w in workers), dtype=np.int64, count=int(lengths.sum()))
    if flat.size and (flat.min() < 0 or flat.max() >= len(table.workers)):
        raise ProtocolError(f"table version {table.version} names a worker that it does not list")
    width = int(lengths.max(initial=0))
    padded = np.full((len(lists), width), NOBODY, dtype=np.int32)
    padded[np.arange(width) < lengths[:, None]] = flat
    return padded.reshape(len(table.candidates), shape.pop() if shape else 0, width)


def owner_array(
    table: Table, alive: npt.ArrayLike, candidates: npt.NDArray[np.int32] | None = None
) -> npt.NDArray[np.int32]:
    """First live candidate of every expert.

    Args:
        alive: bool [workers], who can be reached, in the order of ``table.workers``.
        candidates: ``candidate_array(table)``, if the caller kept it.

    Returns:
        int32 [layers, experts], indexes into ``table.workers``, NOBODY where none is alive.

    Raises ProtocolError as ``candidate_array`` does.
    """
    if candidates is None:
        candidates = candidate_array(table)
    reachable = np.asarray(alive, dtype=bool)
    assert reachable.shape == (len(table.workers),)
    # One more entry, for the padding: index -1 reads it.
    live = np.append(reachable, False)[candidates]
    if live.shape[2] == 0:
        return np.full(live.shape[:2], NOBODY, dtype=np.int32)
    first = live.argmax(axis=2)[..., None]
    owner = np.take_along_axis(candidates, first, axis=2)[..., 0]
    return np.where(live.any(axis=2), owner, np.int32(NOBODY)).astype(np.int32)
