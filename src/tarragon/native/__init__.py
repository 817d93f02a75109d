"""Kernels of our own in C++: the batch-invariant linear, and moving rows to experts and back.

Built by ``python -m tarragon.native.build``; ``load()`` before the first use (the ops do it themselves).
"""

from tarragon.native.ops import (
    combine,
    dispatch,
    gather_batch,
    instruction_set,
    linear,
    load,
    pack_linear,
    probe_adopt,
    probe_counters,
    probe_start,
    probe_stop,
    replay,
    scatter_batch,
)

__all__ = [
    "combine",
    "dispatch",
    "gather_batch",
    "instruction_set",
    "linear",
    "load",
    "pack_linear",
    "probe_adopt",
    "probe_counters",
    "probe_start",
    "probe_stop",
    "replay",
    "scatter_batch",
]
