"""The system with some of its parts taken out, as settings: baselines are modes of the same code.

*alt-1* to *alt-3* are those of appendix F, each without one part more. Alt-3 is the non-resilient decoupled
mode (2.2, "MegaScale-Infer-like"): every expert is bound to one worker for good, experts run in lock-step
over all attention workers, nothing is checkpointed, nobody is probed, and no shadow is loaded. What stays in
all of them is the map from expert to link that any dispatch needs, and the socket's end of file.

*coarse* is for measuring failures: alt-3 that gives a request up when its attention worker dies, so that its
client sends it again, and that has one attention worker, so that there is a replacement to wait for. Its
expert workers load weights of their own.
"""

from __future__ import annotations

from typing import Any, Final

from tarragon.config import PROBES_OFF_S

Settings = dict[str, Any]
LOCK_STEP_WAIT_US: Final = 10_000_000
"""Far beyond any step: in lock-step a batch does not start without an attention worker that is in a step."""

TARRAGON: Final = "tarragon"
_ALT_1: Final[Settings] = {"checkpoint_mode": "none"}
_ALT_2: Final[Settings] = {
    **_ALT_1,
    "probe_silence_ms": 1e3 * PROBES_OFF_S,
    "probe_interval_ms": 1e3 * PROBES_OFF_S,
    "worker_probe_interval_ms": 1e3 * PROBES_OFF_S,
}
_ALT_3: Final[Settings] = {
    **_ALT_2,
    "shadow_replicas": 0,
    "static_routing": True,
    "batch_lock_step": True,
    "batch_join_wait_us_max": LOCK_STEP_WAIT_US,
}
MODES: Final[dict[str, Settings]] = {TARRAGON: {}, "alt-1": _ALT_1, "alt-2": _ALT_2, "alt-3": _ALT_3}
"""Appendix F, by name; the settings differ from the defaults."""
WITHOUT: Final = {
    TARRAGON: "everything on",
    "alt-1": "no checkpoints, no restoration",
    "alt-2": "and no failure detection",
    "alt-3": "and no routing table: static, lock-step, no shadows",
}
COARSE: Final[Settings] = {
    **_ALT_3,
    "attention_workers": 1,
    "max_failovers_per_request": 0,
    "share_expert_memory": False,
}
