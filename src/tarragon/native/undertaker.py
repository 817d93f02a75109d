"""A worker's death is seen at once, however much memory it held."""

from __future__ import annotations

import sys

import torch

from tarragon.native.ops import load


def spawn_undertaker() -> int:
    """Have this process's memory freed after its death by a child that shares it; returns the child's pid.

    The child holds no socket, runs nothing, and ends when its parent is gone. Without it, a killed
    worker's sockets stay open while the kernel frees its memory: 100 ms a GiB, and 1.4 s were measured
    for a worker of 1.7 GiB on busy cores. Does nothing on systems other than Linux (returns 0).
    """
    if sys.platform != "linux":
        return 0
    load()
    return int(torch.ops.tarragon.spawn_undertaker.default())
