"""Workers' output: bytes of a pipe become lines that carry the worker's id, and the last error is kept."""

from __future__ import annotations

import os
import re
import select
from contextlib import suppress
from typing import Final

_READ_BYTES: Final = 64 << 10
_WRITE_BYTES: Final = select.PIPE_BUF
"""A descriptor that polls as writable takes this much without blocking."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ERROR_NAME = re.compile(r"(Error|Exception|Refused|Exit|Interrupt)(:|$)")
_CAUSES = re.compile(r"\bERROR\b|\bCRITICAL\b|^Fatal Python error|^terminate called|^tarragon: ")


def looks_like_error(line: str) -> bool:
    """Whether a line of a log names an error: the last line of a traceback, or one of level ERROR."""
    head = line.split(" ", 1)[0]
    return bool(_CAUSES.search(line)) or (not line.startswith(" ") and bool(_ERROR_NAME.search(head)))


class Lines:
    """Cuts a stream of bytes into lines of bounded length and remembers the last one that names an error."""

    def __init__(self, line_bytes_max: int) -> None:
        self._line_bytes_max = line_bytes_max
        self._rest = b""
        self.last_error = ""

    def feed(self, data: bytes) -> list[str]:
        """Add ``data``; return the lines that it completes, without their line feeds."""
        *complete, self._rest = (self._rest + data).split(b"\n")
        whole = len(self._rest) // self._line_bytes_max * self._line_bytes_max
        if whole:  # no end in sight: pass on what is there
            complete.append(self._rest[:whole])
            self._rest = self._rest[whole:]
        return [self._clean(piece) for raw in complete for piece in self._pieces(raw)]

    def end(self) -> list[str]:
        """Return what the stream left without a line feed."""
        rest, self._rest = self._rest, b""
        return [self._clean(rest)] if rest else []

    def _pieces(self, raw: bytes) -> list[bytes]:
        size = self._line_bytes_max
        return [raw[start : start + size] for start in range(0, max(1, len(raw)), size)]

    def _clean(self, raw: bytes) -> str:
        line = raw.decode("utf-8", "backslashreplace").rstrip("\r")
        bare = _COLOURS.sub("", line)
        if looks_like_error(bare):
            self.last_error = bare.strip()
        return line


class LogPipe:
    """The read end of one worker's output."""

    def __init__(self, fd: int, line_bytes_max: int) -> None:
        self._fd = fd
        self._lines = Lines(line_bytes_max)
        self.is_open = True

    def fileno(self) -> int:
        return self._fd

    @property
    def last_error(self) -> str:
        return self._lines.last_error

    def read(self) -> list[str]:
        """Return the lines that one read completes; ``is_open`` is false after the end of the stream."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            self.is_open = False
            return self._lines.end()
        return self._lines.feed(data)

    def drain(self, reads_max: int = 64) -> list[str]:
        """Return everything that is in the pipe now, for a worker that has ended."""
        found: list[str] = []
        for _ in range(reads_max):
            if not self.is_open or not _is_ready(self._fd, select.POLLIN):
                break
            found += self.read()
        return found + self._lines.end()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.is_open = False


class LogWriter:
    """Writes lines to a descriptor and never waits for its reader: what does not fit is dropped."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.dropped = 0

    def write(self, source: str, lines: list[str]) -> None:
        """Write each line with ``[source]`` before it."""
        for line in lines:
            raw = f"[{source}] {line}\n".encode("utf-8", "backslashreplace")
            for start in range(0, len(raw), _WRITE_BYTES):
                if not self._put(raw[start : start + _WRITE_BYTES]):
                    self.dropped += 1
                    break

    def _put(self, piece: bytes) -> bool:
        with suppress(OSError):  # a reader that has gone away is no reason to end
            if _is_ready(self._fd, select.POLLOUT):
                os.write(self._fd, piece)
                return True
        return False


def _is_ready(fd: int, events: int) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(0))
