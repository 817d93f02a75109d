"""Signals as readable bytes: the agent's loop meets them like any other event."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_READ_BYTES: Final = 4096


class Interrupted(BaseException):
    """A stop signal came while ``interruptible`` was set."""


class SignalInbox:
    """Owns the handlers of SIGCHLD and the stop signals; ``fileno`` is readable when one has come.

    While ``interruptible`` is true a stop signal also raises Interrupted at
    once: for work of seconds that cannot look into the inbox, such as imports.
    """

    def __init__(self) -> None:
        self.interruptible = False
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGCHLD, *STOP_SIGNALS):
            signal.signal(number, self._on_signal)
            signal.siginterrupt(number, False)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let stop signals raise Interrupted within the block."""
        self.interruptible = True
        try:
            yield
        finally:
            self.interruptible = False

    def fileno(self) -> int:
        return self._read_fd

    def take(self) -> set[int]:
        """Return the numbers of the signals that came since the last call."""
        try:
            return set(os.read(self._read_fd, _READ_BYTES))
        except BlockingIOError:
            return set()

    def close(self) -> None:
        """Restore default handlers and close the pipe."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, *STOP_SIGNALS):
            signal.signal(number, signal.SIG_DFL)
        self.release()

    def release(self) -> None:
        """Close the descriptors only: for a forked child."""
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interruptible and number in STOP_SIGNALS:
            self.interruptible = False  # once: what follows may clean up in peace
            raise Interrupted
