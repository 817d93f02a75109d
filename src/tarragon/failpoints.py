"""Places at which a worker can be told to die or to hang, for tests of what is hard to hit by chance.

Off unless the cluster was started with ``failpoints``. A worker is armed at run time by wrapping the one
method that passes the place: one that is not armed runs not a single instruction more.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from tarragon.messages import Failpoint

ATTENTION: Final = (
    "prefill",
    "mid-layer",
    "before-commit",
    "between-commit-and-send",
    "after-send",
    "restore",
)
"""In the middle of the layers of a step with a prompt, or without one; before a step's rows are committed;
before and after its tokens are sent; before restored rows are put into the cache."""
EXPERT: Final = ("before-batch", "between-compute-and-answer")
NAMES: Final = {"attention": ATTENTION, "expert": EXPERT}


class Countdown:
    """Has the order's effect at its ``after``-th hit, once."""

    def __init__(self, order: Failpoint) -> None:
        self._name, self._left = order.name, order.after
        self._effect = _EFFECTS[order.effect]

    def hit(self) -> None:
        self._left -= 1
        if self._left == 0:
            print(f"failpoint {self._name} reached", file=sys.stderr, flush=True)
            self._effect()


def kill_self() -> None:
    """End this process as a crash would: nothing is flushed, closed or said good-bye to."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Wedge this thread for good; the others go on, and answer probes."""
    threading.Event().wait()


_EFFECTS: Final[dict[str, Callable[[], None]]] = {"die": kill_self, "hang": hang}


def wrap(
    target: object,
    method: str,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
) -> None:
    """Have ``before`` and ``after`` called with the arguments of every call of ``target.method``."""
    inner: Callable[..., Any] = getattr(target, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        found = inner(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return found

    setattr(target, method, outer)
