"""What follows from one worker's word about another (section 5)? Pure."""

from __future__ import annotations

from tarragon.messages import Suspicion
from tarragon.orchestrator.actions import Action, Verify
from tarragon.orchestrator.membership import Membership, Transition, Worker
from tarragon.orchestrator.relations import judges_of


def judge(
    message: Suspicion, reporter: Worker, membership: Membership
) -> tuple[Transition | None, list[Action]]:
    """Take note of a suspicion or its end; a suspect whose death is not yet certain is to be probed."""
    by = reporter.worker_id, reporter.epoch
    if message.withdrawn:
        membership.withdrawn(message.suspect_id, message.suspect_epoch, by)
        return None, []
    suspect = membership.workers.get(message.suspect_id)
    judges = set() if suspect is None else judges_of(suspect, reporter, membership)
    moved = membership.suspected(message.suspect_id, message.suspect_epoch, by, message.cause, judges)
    if suspect is None or suspect.epoch != message.suspect_epoch or suspect.state != "suspect":
        return moved, []
    return moved, [Verify(suspect.worker_id, suspect.epoch)]
