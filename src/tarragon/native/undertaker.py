"""A worker's death is seen at once, however much memory it held."""

from __future__ import annotations

import sys

import torch

from tarragon.native.ops import load


def spawn_undertaker() -> int:
    """Have this process's memory freed after its death by a child that shares it; returns the child's pid.

    To be called from the main thread, whose end is the process's end. The child holds no descriptor, runs
    nothing, and is killed when its parent is gone. Without it, a killed worker's sockets stay open while
    the kernel frees its memory: about 100 ms a GiB. Does nothing on systems other than Linux (returns 0).
    """
    if sys.platform != "linux":
        return 0
    load()
    return int(torch.ops.tarragon.spawn_undertaker.default())
