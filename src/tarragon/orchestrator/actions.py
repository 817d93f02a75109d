"""What recovery wants done. Plain values: the process carries them out, a simulator interprets them."""

from __future__ import annotations

from dataclasses import dataclass

from tarragon.messages import Control


@dataclass(frozen=True)
class SendTo:
    """Send ``message`` to this incarnation, if it is still connected."""

    worker_id: str
    epoch: int
    message: Control


@dataclass(frozen=True)
class ToAgent:
    """Send ``message`` to the node agent."""

    message: Control


@dataclass(frozen=True)
class Disconnect:
    """Close the connection of an incarnation that is dead to us."""

    worker_id: str
    epoch: int


@dataclass(frozen=True)
class Verify:
    """Probe this incarnation now: a peer suspects it."""

    worker_id: str
    epoch: int


@dataclass(frozen=True)
class Note:
    """Something that a person may want to know."""

    kind: str
    worker_id: str
    epoch: int
    text: str


Action = SendTo | ToAgent | Disconnect | Verify | Note
