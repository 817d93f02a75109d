"""Who is told of every request's way over the attention workers? By default, nobody."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tarragon.gateway.streams import Stream
    from tarragon.gateway.wire import Resumed


class Watcher:
    """Does nothing. Its methods are called a few times per attempt at a request, never per token."""

    def began(self, stream: Stream) -> None:
        """A request came; its trace headers may be replaced."""

    def assigned(self, stream: Stream, epoch: int) -> None:
        """``stream.owner``, in that incarnation, is to run attempt ``stream.attempt``."""

    def lost(self, stream: Stream, kind: str, cause: str) -> None:
        """The owner is lost, or drained (``kind`` is the cause in one word)."""

    def sealed(self, stream: Stream) -> None:
        """Nothing more of the current attempt is accepted."""

    def delivered(self, stream: Stream, resumed: Resumed | None) -> None:
        """The current attempt's first token is there; ``resumed`` is None for a first attempt."""

    def ended(self, stream: Stream, outcome: str, error: str = "") -> None:
        """The request is over: "stop", "length"..., "abort" or "error"."""


class Narrator(Watcher):
    """Writes one line to the log whenever a request goes on elsewhere, and one if it ends with an error."""

    def __init__(self) -> None:
        self._losses: dict[str, str] = {}
        """What happened to requests that wait for another worker, in words, by id."""

    def lost(self, stream: Stream, kind: str, cause: str) -> None:
        self._losses[stream.request_id] = f"{stream.owner} was lost ({kind}: {cause})"

    def assigned(self, stream: Stream, epoch: int) -> None:
        if not self._losses:
            return
        loss = self._losses.pop(stream.request_id, None)
        if loss is not None:
            print(
                f"WARNING request {stream.request_id}: {loss}, attempt {stream.attempt} goes on behind "
                f"{len(stream.sent)} tokens at {stream.owner} ({epoch})",
                file=sys.stderr,
            )

    def ended(self, stream: Stream, outcome: str, error: str = "") -> None:
        if self._losses:
            self._losses.pop(stream.request_id, None)
        if error:
            print(f"WARNING request {stream.request_id}: {error}", file=sys.stderr)
