"""Who needs whom? What every worker is told about others, and whose suspicions are a verdict. Pure."""

from __future__ import annotations

from typing import Final

from tarragon.messages import Peer, Role
from tarragon.orchestrator.membership import Incarnation, Membership, Worker

_TALKS_TO: Final[dict[Role, tuple[Role, ...]]] = {
    "gateway": ("attention",),
    "expert": ("attention", "expert"),
    "attention": ("gateway", "expert", "store"),
    "store": ("attention",),
}


def peers_of(worker: Worker, membership: Membership) -> list[Peer]:
    """Whom the worker may talk to. The gateway hears of an attention worker once that one is ready.

    Or was: what the gateway does not hear of it gives up, and an adopted worker has its requests.
    """
    others = membership.by_role(*_TALKS_TO.get(worker.role, ()))
    return [w.peer for w in others if w.connected and (w.serving or w.served or not _waits(worker, w))]


def _waits(worker: Worker, other: Worker) -> bool:
    """Whether a worker hears of the other only when that one works."""
    return worker.role in ("gateway", other.role)


def judges_of(suspect: Worker, reporter: Worker, membership: Membership) -> set[Incarnation]:
    """Whose suspicions together are a verdict: all who need the suspect; the gateway's alone is one."""
    if reporter.role == "gateway":
        return {(reporter.worker_id, reporter.epoch)}
    users: Role = "attention" if suspect.role == "expert" else "expert"
    return {(w.worker_id, w.epoch) for w in membership.by_role(users) if w.serving}
