"""Which processes has the agent forked and not yet reaped?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tarragon.agent.log import LogPipe
from tarragon.messages import WorkerStarted

CONSOLE: Final = "console"
ORCHESTRATOR: Final = "orchestrator"
STORE: Final = "store"


@dataclass(slots=True)
class Child:
    """One process that the agent forked and has not reaped."""

    name: str
    role: str
    epoch: int
    pid: int
    log: LogPipe | None
    kill_at_s: float | None = None
    """On the monotonic clock; set once it has been told to end."""


class Children(dict[int, Child]):
    """The agent's processes by pid."""

    def named(self, name: str) -> list[Child]:
        return [child for child in self.values() if child.name == name]

    def due_s(self) -> list[float]:
        """When those that were told to end are killed."""
        return [child.kill_at_s for child in self.values() if child.kill_at_s is not None]

    def to_adopt(self) -> list[WorkerStarted]:
        """The workers that an orchestrator of a new generation finds."""
        return [
            WorkerStarted(worker_id=child.name, epoch=child.epoch, pid=child.pid)
            for child in self.values()
            if child.role not in (ORCHESTRATOR, CONSOLE) and child.kill_at_s is None
        ]

    def is_store(self, pid: int, worker_id: str, epoch: int) -> bool:
        """Whether that process of ours is this incarnation of the checkpoint store."""
        child = self.get(pid)
        return child is not None and (child.role, child.name, child.epoch) == (STORE, worker_id, epoch)
