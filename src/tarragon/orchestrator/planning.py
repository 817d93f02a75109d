"""What placement shall the cluster pursue? Binds the placement to settings, model and usage. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tarragon.config import Config
from tarragon.orchestrator.residency import id_order
from tarragon.orchestrator.usage import ExpertUsage
from tarragon.routing.placement import Placement, WorkerBudget, covered_share, place


class ExpertShape(NamedTuple):
    """The model as seen from here: MoE layers, experts in each, bytes of one expert's weights."""

    layers: int
    experts: int
    expert_bytes: int


class Planner:
    """Computes placements, and remembers how much each expert was used."""

    def __init__(self, config: Config, shape: ExpertShape) -> None:
        self.usage = ExpertUsage(shape.layers, shape.experts)
        self.replicas = config.shadow_replicas
        """Shadows wanted of every expert."""
        self._config, self._shape = config, shape

    @property
    def room(self) -> int | None:
        """Experts that one worker may hold; None is no limit."""
        budget = self._config.expert_memory_bytes_max
        return budget // self._shape.expert_bytes if budget else None

    def first(self) -> Placement:
        """The placement on the configured workers. Raises PlacementError if they are too few or too small."""
        return self._place([f"ew-{i}" for i in range(self._config.expert_workers)], None)

    def having(self, worker_id: str, current: Placement) -> Placement:
        """The placement with one more worker. Raises PlacementError."""
        return self._place([*current.workers, worker_id], current)

    def without(self, worker_id: str, current: Placement) -> Placement:
        """The placement with one worker less. Raises PlacementError."""
        return self._place([i for i in current.workers if i != worker_id], current)

    def again(self, current: Placement) -> Placement:
        """The placement on the same workers, as far as what is wanted has changed. Raises PlacementError."""
        return self._place(current.workers, current)

    def better(self, current: Placement) -> Placement | None:
        """A placement on the same workers whose shadows cover clearly more of what is used, or None."""
        usage = self.usage.totals()
        if self.room is None or usage is None:
            return None
        found = self.again(current)
        gain = covered_share(found, usage) - covered_share(current, usage)
        return found if gain >= self._config.shadow_gain_min else None

    def _place(self, members: Iterable[str], current: Placement | None) -> Placement:
        budget = self._config.expert_memory_bytes_max
        return place(
            layers=self._shape.layers,
            experts=self._shape.experts,
            workers=[WorkerBudget(i, budget) for i in sorted(members, key=id_order)],
            expert_bytes=self._shape.expert_bytes,
            replicas=self.replicas,
            usage=self.usage.totals(),
            current=current,
            load_ratio_max=self._config.expert_load_ratio_max,
        )
