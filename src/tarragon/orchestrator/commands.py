"""What people ask of the cluster: kill, drain, add, restart, remove. Pure, on top of recovery.

Each returns actions. Each raises MembershipError, a ValueError whose text is one sentence, if the state
of the cluster does not allow it, and then changes nothing.
"""

from __future__ import annotations

import signal

from tarragon.checkpoint.mode import parse as parse_mode
from tarragon.failpoints import NAMES
from tarragon.messages import Checkpointing, Drain, Failpoint, Probing, SignalWorker
from tarragon.orchestrator.actions import Action, ToAgent
from tarragon.orchestrator.membership import MembershipError, Worker
from tarragon.orchestrator.recovery import PREFIXES, Leave, Recovery, WorkerRole, note, send
from tarragon.routing.placement import Placement

_DEADLY = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT})


class Commands:
    """The requests of operators, carried out on one Recovery."""

    def __init__(self, recovery: Recovery) -> None:
        self._recovery = recovery
        self._membership = recovery.membership

    def kill(self, worker_id: str, number: int) -> tuple[Worker, list[Action]]:
        """Send signal ``number`` to a worker; nothing else changes until its effect shows."""
        worker = self._membership.running(worker_id)
        if number in _DEADLY:
            self._recovery.meant.add((worker_id, worker.epoch))
        order = SignalWorker(worker_id=worker_id, epoch=worker.epoch, signal=number)
        return worker, [note(worker, "signal", signal.Signals(number).name), ToAgent(order)]

    def drain(self, worker_id: str, now_s: float) -> list[Action]:
        """Move a worker's work away, then stop it. Raises PlacementError as well."""
        recovery = self._recovery
        worker = self._membership.known(worker_id)
        target = self._target_without(worker)
        actions = recovery.moved(self._membership.drain(worker_id))
        recovery.leaving[worker_id] = Leave(now_s + recovery.config.drain_timeout_s)
        order = Drain(worker_id=worker_id)
        actions.append(send(worker, order))
        if worker.role == "attention":
            actions += [send(gateway, order) for gateway in self._membership.by_role("gateway")]
        else:
            recovery.residency.drain(worker_id)
        if target is not None:
            recovery.residency.aim(target)
        return actions + recovery.settle(now_s)

    def add(self, role: WorkerRole, now_s: float) -> tuple[str, list[Action]]:
        """Start one more worker, up to ``workers_per_role_max``."""
        taken = self._membership.by_role(role)
        if len(taken) >= self._recovery.config.workers_per_role_max:
            raise MembershipError(f"there are {len(taken)} {role} workers, and no more are allowed")
        config = self._recovery.config
        if role == "attention" and config.checkpoints_bounded and len(taken) > config.attention_workers:
            raise MembershipError(
                f"there are {len(taken)} attention workers, and checkpoint_bytes_max has no room for another"
            )
        numbers = [int(worker.worker_id.rpartition("-")[2]) for worker in taken]
        worker_id = f"{PREFIXES[role]}-{max(numbers, default=-1) + 1}"
        return worker_id, self._recovery.start(worker_id, role, now_s)

    def checkpointing(self, mode: str, reprotect: bool = True) -> list[Action]:
        """Have all attention workers that live checkpoint in another way. Raises MembershipError."""
        try:
            parse_mode(mode)
        except ValueError as error:
            raise MembershipError(str(error)) from error
        workers = [w for w in self._membership.by_role("attention") if w.state == "healthy"]
        return [send(worker, Checkpointing(mode=mode, reprotect=reprotect)) for worker in workers]

    def protection(self, probing: bool, shadow_replicas: int, now_s: float) -> list[Action]:
        """Switch probing, and have so many shadows of every expert; who joins later probes all the same."""
        recovery, membership = self._recovery, self._membership
        peers = [w for role in ("attention", "gateway") for w in membership.by_role(role) if w.connected]
        actions: list[Action] = [send(worker, Probing(enabled=probing)) for worker in peers]
        if shadow_replicas != recovery.planner.replicas:
            recovery.planner.replicas = shadow_replicas
            recovery.residency.aim(recovery.planner.again(recovery.residency.target))
        return actions + recovery.settle(now_s)

    def failpoint(self, worker_id: str, order: Failpoint) -> list[Action]:
        """Have a worker die or hang at a named place. Raises MembershipError."""
        if not self._recovery.config.failpoints:
            raise MembershipError("this cluster was started without --failpoints")
        worker = self._membership.running(worker_id)
        names = NAMES.get(worker.role, ())
        if order.name not in names:
            has = ", ".join(names) or "none"
            raise MembershipError(f"{worker_id} has no failpoint {order.name}; it has {has}")
        text = f"{order.effect} at {order.name}, time {order.after}"
        return [note(worker, "failpoint", text), send(worker, order)]

    def dead(self) -> list[str]:
        """Workers that do not run now, given up or waiting to be started again."""
        return sorted(w.worker_id for w in self._membership.workers.values() if w.state == "dead")

    def restart(self, worker_id: str, now_s: float) -> list[Action]:
        """Replace a worker now, whatever its state."""
        worker = self._membership.known(worker_id)
        if worker.state == "draining":
            raise MembershipError(f"{worker_id} is draining")
        actions = self._retire(worker, "asked to restart", now_s)
        self._recovery.restarts.forget(worker_id)
        return actions + self._recovery.start(worker_id, worker.role, now_s) + self._recovery.settle(now_s)

    def remove(self, worker_id: str, now_s: float) -> list[Action]:
        """Do without a worker from now on: drained if it is healthy. Raises PlacementError as well."""
        recovery = self._recovery
        worker = self._membership.known(worker_id)
        if worker.state in ("healthy", "draining") or worker.role not in PREFIXES:
            return self.drain(worker_id, now_s)
        if len(self._membership.by_role(worker.role)) == 1:
            raise MembershipError(f"{worker_id} is the last {worker.role} worker")
        target = self._target_without(worker)
        if target is not None:
            recovery.residency.aim(target)
        actions = self._retire(worker, "asked to leave", now_s)
        recovery.forget(worker_id)
        return actions + recovery.settle(now_s)

    def _retire(self, worker: Worker, cause: str, now_s: float) -> list[Action]:
        if worker.state == "dead":
            return []
        moved = self._membership.retire(worker.worker_id, cause)
        return self._recovery.died(moved, now_s, replace=False)

    def _target_without(self, worker: Worker) -> Placement | None:
        """The placement if the worker leaves; None if it has no part in it or nobody else has."""
        target = self._recovery.residency.target
        if worker.worker_id not in target.workers or len(target.workers) == 1:
            return None
        return self._recovery.planner.without(worker.worker_id, target)
