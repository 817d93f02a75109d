"""What REFE counts."""

from __future__ import annotations

from tarragon.counters import Counters


class RefeCounters(Counters):
    """What REFE did since it started; read by the control thread for reports."""

    def __init__(self) -> None:
        self.layers = 0
        self.pairs = 0
        self.replayed_pairs = 0
        self.replays = 0
        self.replay_s = 0.0
        self.links_lost = 0
        self.links_hung = 0
        self.probes = 0
        self.steps_unreachable = 0
        self.stale_frames = 0
        self.frames_malformed = 0
        self.dispatch_s = 0.0
        self.wait_s = 0.0
        self.combine_s = 0.0
