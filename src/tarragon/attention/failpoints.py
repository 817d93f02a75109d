"""Where an attention worker can be told to die or hang: in a layer, around a commit, while it restores."""

from __future__ import annotations

from typing import Any

from tarragon.attention.checkpoints import Checkpoints
from tarragon.attention.requests import Requests
from tarragon.failpoints import Countdown, wrap
from tarragon.messages import Failpoint
from tarragon.refe.engine import Refe


class Failpoints:
    """Arms the parts of one attention worker; called by the control thread."""

    def __init__(self, refe: Refe, checkpoints: Checkpoints, requests: Requests) -> None:
        self._refe, self._checkpoints, self._requests = refe, checkpoints, requests

    def arm(self, order: Failpoint) -> None:
        countdown = Countdown(order)

        def delivered(outputs: dict[int, Any]) -> None:
            if any(step.outputs for step in outputs.values()):
                countdown.hit()

        match order.name:
            case "prefill" | "mid-layer":
                self._in_a_layer(countdown, of_prompts=order.name == "prefill")
            case "before-commit":
                wrap(self._checkpoints, "end", before=lambda _scheduled: countdown.hit())
            case "between-commit-and-send":
                wrap(self._requests, "deliver", before=delivered)
            case "after-send":
                wrap(self._requests, "deliver", after=delivered)
            case "restore":
                wrap(self._checkpoints.seat, "load", before=lambda _loads: countdown.hit())

    def _in_a_layer(self, countdown: Countdown, *, of_prompts: bool) -> None:
        """Count steps by what they compute; hit when the rows of their middle layer are out."""
        middle = max(1, self._refe.layers // 2)
        left = 0

        def begin(scheduled: Any) -> None:
            nonlocal left
            has_prompt = any(tokens > 1 for tokens in scheduled.num_scheduled_tokens.values())
            left = middle if has_prompt == of_prompts else 0

        def gap() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                countdown.hit()

        wrap(self._checkpoints, "begin", before=begin)
        wrap(self._refe, "on_gap", before=gap)
