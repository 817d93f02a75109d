"""How a worker says that it lives: a native thread that answers probes without the interpreter lock (4.1).

Apart from ``probe.py``, because those who only ask, such as the orchestrator, need neither torch nor kernels.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

import numpy as np
import torch

from tarragon import native
from tarragon.config import PROBE_CHANNELS_MAX
from tarragon.messages import ProbeAccepted, ProbeOpen, Refused, encode_control
from tarragon.transport.connection import Connection
from tarragon.transport.pulse import Pulse

_THREAD_NAME: Final = "probe"


def _hurry() -> bool:
    """Give the native thread real-time priority; False without the right to (CAP_SYS_NICE).

    It works for some microseconds per probe. Measured with two busy cores and load 7: without it an answer
    missed up to 30 ms, with it none missed 10 ms.
    """
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{task}/comm") as comm:
            if comm.read().strip() == _THREAD_NAME:
                os.sched_setscheduler(int(task), os.SCHED_RR, os.sched_param(1))
                return True
    return False


class ProbeResponder:
    """The answering side: one native thread per process, which needs no interpreter lock.

    The computing thread calls ``pulse.beat`` with every unit of work that it has done: answers carry how many
    there were, and who asks is given the page to look by itself.
    ``refused`` counts connections that were not for this incarnation. Raises ValueError if the process has
    one already.
    """

    def __init__(self, epoch: int, *, channels_max: int = PROBE_CHANNELS_MAX) -> None:
        self.epoch = epoch
        self.refused = 0
        self.pulse = Pulse()
        # The tensor shares the array's memory, and the native side keeps it.
        try:
            native.probe_start(torch.from_numpy(self.pulse.beats.view(np.int64)), epoch, channels_max)
        except BaseException:
            self.pulse.close()
            raise
        self.realtime = _hurry()
        """Whether the thread goes before all others: where that is allowed, no load delays an answer."""

    def adopt(self, connection: Connection, opened: ProbeOpen) -> bool:
        """Answer on ``connection``, which asked for it and is taken over; False if it was refused."""
        try:
            if opened.receiver_epoch != self.epoch:
                self.refused += 1
                reason = f"the probe is for epoch {opened.receiver_epoch}, but this worker is {self.epoch}"
                connection.send_control(Refused(reason=reason))
                return False
            connection.send_with_fd(encode_control(ProbeAccepted(epoch=self.epoch)), self.pulse.fd)
            # Handed over, not duplicated: a second descriptor would keep the channel in the native thread's
            # epoll set after that thread has closed its own.
            native.probe_adopt(connection.sock.detach())
        except ConnectionError:
            return False
        finally:
            # Not close(): it would cut the connection, the duplicate's as well.
            with suppress(OSError):
                connection.sock.close()
        return True

    @property
    def counters(self) -> dict[str, float]:
        answered, malformed, channels = native.probe_counters()
        return {
            "probes_answered": float(answered),
            "probe_channels": float(channels),
            "probe_channels_refused": float(malformed + self.refused),
            "probe_realtime": float(self.realtime),
        }

    def close(self) -> None:
        """End the thread and its channels."""
        native.probe_stop()
        self.pulse.close()
