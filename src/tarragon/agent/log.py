"""Workers' output: bytes of a pipe become lines that say when, how grave and whose they are.

A worker writes plain lines, whoever in it does: our own words, vLLM's logger, a traceback, the C library.
The level and the request are read out of the line; the time, the worker and its epoch are added here. So no
worker has to be whole to have its last words told in full.
"""

from __future__ import annotations

import json
import os
import re
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Final, NamedTuple

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


_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_LEVEL = re.compile(
    # vLLM's loggers name the process, the level and the time; our own words at most the level.
    rf"^(?:\([^)]* pid=\d+\) )?({'|'.join(_LEVELS)}):? +(?:\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? )?"
)
_REQUEST = re.compile(r"\brequest ((?:chatcmpl|cmpl|resp|msg|generate-tokens)-[\w.-]*\w)", re.IGNORECASE)


class Record(NamedTuple):
    """One line of a log with all that is known of it."""

    time_s: float
    """Seconds since 1970."""
    level: str
    """"debug", "info", "warning" or "error"."""
    worker: str
    epoch: int
    text: str
    request: str = ""
    """Id of the request that the line is about; "" if it is about none or several."""


def record(line: str, worker: str, epoch: int, time_s: float) -> Record:
    """Read a worker's line."""
    bare = _COLOURS.sub("", line)
    named = _LEVEL.match(bare)
    if named:
        level, text = named[1].lower().replace("critical", "error"), bare[named.end() :]
    else:
        level, text = "error" if looks_like_error(bare) else "info", bare
    about = _REQUEST.search(text)
    return Record(time_s, level, worker, epoch, text, about[1] if about else "")


def as_text(found: Record) -> str:
    """A line for people."""
    request = f" {found.request}:" if found.request and found.request not in found.text else ""
    return f"{_clock(found)} {found.level.upper():<7} {found.epoch} [{found.worker}]{request} {found.text}"


def as_json(found: Record) -> str:
    """A line for programs; ``request`` is there only if the line is about one."""
    fields = {"time": _clock(found), **found._asdict()}
    del fields["time_s"]
    if not found.request:
        del fields["request"]
    return json.dumps(fields)


FORMATS: Final[dict[str, Callable[[Record], str]]] = {"text": as_text, "json": as_json}


def _clock(found: Record) -> str:
    moment = datetime.fromtimestamp(found.time_s, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


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

    def __init__(self, fd: int, log_format: str = "text", clock: Callable[[], float] = time.time) -> None:
        """``log_format`` is one of FORMATS."""
        self._fd = fd
        self._format = FORMATS[log_format]
        self._clock = clock
        self._is_cut = False
        self.dropped = 0

    def write(self, source: str, lines: list[str], epoch: int = 0) -> None:
        """Write lines of a worker's, each with the time, its level, the worker and its epoch."""
        for line in lines:
            text = self._format(record(line, source, epoch, self._clock()))
            raw = f"{text}\n".encode("utf-8", "backslashreplace")
            if self._is_cut:  # the reader was slow in the middle of a line: this one is its own
                raw = b"\n" + raw
            for start in range(0, len(raw), _WRITE_BYTES):
                if not self._put(raw[start : start + _WRITE_BYTES]):
                    self.dropped += 1
                    self._is_cut = self._is_cut or start > 0
                    break
            else:
                self._is_cut = False

    def _put(self, piece: bytes) -> bool:
        with suppress(OSError):  # a reader that has gone away is no reason to end
            if _is_ready(self._fd, select.POLLOUT):
                os.write(self._fd, piece)
                return True
        return False


@contextmanager
def collected(write: Callable[[list[str]], None], line_bytes_max: int, fd: int = 2) -> Iterator[None]:
    """Give ``write`` what this process writes to ``fd`` within the block, as lines, when the block ends."""
    kept = os.dup(fd)
    memory = os.memfd_create("log")
    os.dup2(memory, fd)
    try:
        yield
    finally:
        os.dup2(kept, fd)
        os.close(kept)
        lines = Lines(line_bytes_max)
        text = os.pread(memory, os.fstat(memory).st_size, 0)
        os.close(memory)
        write([*lines.feed(text), *lines.end()])


def _is_ready(fd: int, events: int) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(0))
