"""What the expert routing table replaces (2.2, 4.2): every expert is bound to one worker for good.

A baseline. The binding is by the worker's name, and it is made once, from the first table under which every
expert can be reached. What remains variable is the incarnation behind the name: rows for a worker that is
gone wait until a worker of that name holds the expert again, which is the best case of figure 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tarragon.messages import Table
from tarragon.routing.table import NOBODY, owner_array

Int32Array = npt.NDArray[np.int32]


class StaticRoutes:
    """The binding of one attention worker; pure."""

    def __init__(self) -> None:
        self._homes: list[str] = []
        """Names that own something, in order."""
        self._home: Int32Array | None = None
        """int32 [layers, experts], indexes into ``_homes``; None before the binding is made."""

    def owners(self, table: Table, alive: npt.ArrayLike, candidates: Int32Array) -> Int32Array:
        """Owner of every expert, as ``owner_array`` returns it, but never another worker than the first.

        Args:
            alive: bool [workers], who can be reached, in the order of ``table.workers``.
            candidates: ``candidate_array(table)``: int32 [layers, experts, most candidates].

        Returns:
            int32 [layers, experts], indexes into ``table.workers``, NOBODY where the owner is away.
        """
        found = owner_array(table, alive, candidates)
        names = [peer.worker_id for peer in table.workers]
        if self._home is None:
            if (found == NOBODY).any():
                return found
            self._homes, self._home = names, found
            return found
        reachable = np.asarray(alive, dtype=bool)
        index = {name: w for w, name in enumerate(names) if reachable[w]}
        # A name that is away becomes -2: no candidate, and not the padding of the candidates either.
        now = np.array([index.get(name, NOBODY - 1) for name in self._homes], dtype=np.int32)
        bound = now[self._home]
        held = (candidates == bound[..., None]).any(axis=2)
        return np.where(held, bound, np.int32(NOBODY)).astype(np.int32)
