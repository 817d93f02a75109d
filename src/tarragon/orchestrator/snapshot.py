"""What does the cluster look like right now? Plain data for the admin API. Pure."""

from __future__ import annotations

from typing import Any, Final

from tarragon.messages import Peer, Role, Table, WorkerState
from tarragon.orchestrator.membership import Membership, Worker
from tarragon.orchestrator.recovery import Recovery
from tarragon.routing.table import with_shadow

_COMPUTING: Final[tuple[Role, ...]] = ("attention", "expert")
_FAULT_STATUS: Final[dict[WorkerState, str]] = {
    "healthy": "healthy",
    "draining": "healthy",
    "starting": "unhealthy",
    "suspect": "unhealthy",
    "dead": "dead",
}
BUCKET: Final = "bucket"
"""Counter of an attention worker: 1 while its rows reach the checkpoint store's memory."""
BEHIND: Final = "requests_behind"
"""Counter of an attention worker: requests that ran without checkpoints and do not have theirs yet."""
NEEDS_CHECKPOINTS: Final = "needs_checkpoints"
"""Counter of an attention worker: 1 if computing a request anew may change its text (latent attention)."""
NO_STORE: Final = "no checkpoint store runs: requests of a failed attention worker are computed again"


def status(recovery: Recovery, me: Peer, now_s: float) -> dict[str, Any]:
    """The body of GET /status. ``me`` is the orchestrator itself."""
    table = recovery.residency.table
    total = sum(len(row) for row in table.candidates)
    reason, unprotected = inexact_reason(recovery.membership), unprotected_reason(recovery)
    return {
        "ready": recovery.ready,
        "full_capacity": recovery.full_capacity,
        "exact": not reason,
        "exact_reason": reason,
        "protected": not unprotected,
        "protected_reason": unprotected,
        "ert_version": table.version,
        "workers": [_orchestrator(me), *(_worker(recovery, w, now_s) for w in _ordered(recovery))],
        "experts": {
            "total": total,
            "with_shadow": with_shadow(table),
            "unreachable": recovery.unreachable,
            "loading_cold": len(recovery.residency.cold),
        },
        "refused": dict(recovery.membership.refused),
        **recovery.tally.as_dict(),
    }


def inexact_reason(membership: Membership) -> str:
    """Why a stream that meets a failure may differ from one that does not; "" if it may not.

    Workers of one role back each other, so all of them must be exact and of one fingerprint.
    """
    for role in _COMPUTING:
        ready = [w for w in membership.by_role(role) if w.serving and w.ready is not None]
        if not ready:
            return f"no {role} worker is ready"
        for worker in ready:
            assert worker.ready is not None
            if not worker.ready.exact:
                return f"{worker.worker_id}: {worker.ready.inexact_reason or 'it says so, without a reason'}"
        prints = {w.worker_id: w.ready.fingerprint for w in ready if w.ready is not None}
        first = ready[0].worker_id
        for worker_id, fingerprint in prints.items():
            if fingerprint != prints[first]:
                return f"{first} and {worker_id} differ: {prints[first]!r}, {fingerprint!r}"
    return ""


def unprotected_reason(recovery: Recovery) -> str:
    """Why the death of an attention worker would cost more than a restoration; "" if it would not."""
    serving = [worker for worker in recovery.membership.by_role("attention") if worker.serving]
    reason = _missing_checkpoints(recovery, [worker.worker_id for worker in serving])
    counters = (recovery.counters.get(worker.worker_id, {}) for worker in serving)
    if reason and any(found.get(NEEDS_CHECKPOINTS) for found in counters):
        return f"{reason}; with latent attention the text may then change"
    return reason


def _missing_checkpoints(recovery: Recovery, serving: list[str]) -> str:
    if not any(worker.state == "healthy" for worker in recovery.membership.by_role("store")):
        return NO_STORE
    if not serving:
        return "no attention worker is ready"
    counters = {worker_id: recovery.counters.get(worker_id, {}) for worker_id in serving}
    without = [worker_id for worker_id, found in counters.items() if found.get(BUCKET) != 1.0]
    if without:
        return f"without checkpoints: {', '.join(without)}"
    behind = [worker_id for worker_id, found in counters.items() if found.get(BEHIND)]
    return f"requests that began without checkpoints: {', '.join(behind)}" if behind else ""


def routes(table: Table) -> dict[str, Any]:
    """The body of GET /table: candidates[layer][expert] lists worker ids, best first."""
    names = [peer.worker_id for peer in table.workers]
    return {
        "version": table.version,
        "workers": [{"id": peer.worker_id, "epoch": peer.epoch, "pid": peer.pid} for peer in table.workers],
        "candidates": [[[names[w] for w in found] for found in row] for row in table.candidates],
    }


def faults(recovery: Recovery) -> dict[str, Any]:
    """The body of GET /fault_tolerance/status."""
    engines = [
        {
            "id": worker.worker_id,
            "role": worker.role,
            "status": _FAULT_STATUS[worker.state],
            "state": worker.state,
            "epoch": worker.epoch,
            "cause": worker.cause,
        }
        for worker in _ordered(recovery)
    ]
    return {"schema_version": 1, "total_engines": len(engines), "engines": engines}


def _ordered(recovery: Recovery) -> list[Worker]:
    return recovery.membership.by_role("gateway", "store") + recovery.membership.by_role(*_COMPUTING)


def _orchestrator(me: Peer) -> dict[str, Any]:
    return {"id": me.worker_id, "role": me.role, "pid": me.pid, "epoch": me.epoch, "state": "healthy"}


def _worker(recovery: Recovery, worker: Worker, now_s: float) -> dict[str, Any]:
    ready = worker.ready
    entry: dict[str, Any] = {
        "id": worker.worker_id,
        "role": worker.role,
        "pid": worker.pid,
        "epoch": worker.epoch,
        "state": worker.state,
        "cause": worker.cause,
        "given_up": recovery.restarts.given_up(worker.worker_id),
        "crashes_in_a_row": recovery.restarts.crashes(worker.worker_id),
        "ready_for_s": None if worker.ready_s is None else round(now_s - worker.ready_s, 3),
        "fingerprint": "" if ready is None else ready.fingerprint,
        "counters": recovery.counters.get(worker.worker_id, {}),
    }
    if worker.role == "attention":
        entry["ert_version"] = recovery.acked.get(worker.worker_id)
        if worker.worker_id in recovery.traffic:
            entry["traffic"] = recovery.traffic[worker.worker_id]
    if worker.role == "expert":
        holder = recovery.residency.holders.get(worker.worker_id)
        entry["experts_resident"] = 0 if holder is None else len(holder.resident)
        entry["resident_bytes"] = 0 if ready is None else ready.resident_bytes
    return entry
