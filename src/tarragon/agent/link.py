"""The agent's link to the orchestrator, dialled again whenever it breaks, and the budget of restarts."""

from __future__ import annotations

import os
import selectors
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Literal

from tarragon.agent.log import LogWriter
from tarragon.config import AGENT_DIAL_SLICE_S, AGENT_HANDSHAKE_S, AGENT_UNSENT_MAX, Config
from tarragon.messages import Alive, Control, Hello, ProtocolError
from tarragon.transport.local import Connection, dial

_WATCH_TURNS: Final = 5
"""The agent looks so often within the time of silence that it allows: an agent that was itself paused, with
all the host perhaps, then accuses nobody, because one look is not enough."""

Dialled = Literal["connected", "not yet", "given up"]


class OrchestratorLink:
    """Owns the connection and its place in the selector; what cannot be sent waits for the next one."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        on_readable: Callable[[], None],
        address: str,
        secret: bytes,
        config: Config,
        log: LogWriter,
    ) -> None:
        self._selector = selector
        self._on_readable = on_readable
        self._address = address
        self._secret = secret
        self._config = config
        self._log = log
        self._connection: Connection | None = None
        self._unsent: deque[Control] = deque(maxlen=AGENT_UNSENT_MAX)
        self._dial_until_s: float | None = None
        self._known_epoch = 0
        self._silent_turns = 0
        self.watch_at_s: float | None = None
        """When ``is_silent`` is to be asked next; None before the first sign of life."""

    @property
    def is_dialling(self) -> bool:
        return self._dial_until_s is not None

    @property
    def was_ever_up(self) -> bool:
        return self._known_epoch > 0

    def begin(self) -> None:
        """Drop the connection and dial from the next ``turn`` on, for ``orchestrator_start_timeout_s``."""
        self.end()
        self._dial_until_s = time.monotonic() + self._config.orchestrator_start_timeout_s

    def end(self) -> None:
        """Drop the connection and stop dialling."""
        self._dial_until_s = None
        self.watch_at_s = None
        if self._connection is not None:
            self._selector.unregister(self._connection)
            self._connection.close()
            self._connection = None

    def release(self) -> None:
        """In a forked child: close the inherited descriptor, and nothing else."""
        if self._connection is not None:
            self._connection.close()

    def turn(self, epoch: int, living: Callable[[], Sequence[Control]]) -> Dialled:
        """Try once to reach the orchestrator of ``epoch``.

        The first words are our Hello. An orchestrator of a new generation then
        hears of ``living``, the workers that it has to adopt; one that we have
        lost for a moment hears what it missed.
        """
        assert self._dial_until_s is not None
        try:
            connection = dial(
                self._address,
                self._secret,
                timeout_s=AGENT_DIAL_SLICE_S,
                # Cut off in mid-handshake again and again, it would never come up on a busy host.
                handshake_timeout_s=AGENT_HANDSHAKE_S,
                frame_bytes_max=self._config.control_frame_bytes_max,
            )
        except (TimeoutError, ProtocolError, OSError):
            if time.monotonic() < self._dial_until_s:
                return "not yet"
            self._dial_until_s = None
            return "given up"
        self._dial_until_s = None
        self._silent_turns = 0
        self._connection = connection
        self._selector.register(connection, selectors.EVENT_READ, self._on_readable)
        missed = list(self._unsent) if epoch == self._known_epoch else list(living())
        self._unsent.clear()
        self._known_epoch = epoch
        for message in [
            Hello(worker_id="agent", role="orchestrator", epoch=epoch, pid=os.getpid(), address=""),
            *missed,
        ]:
            self.send(message)
        return "connected"

    def send(self, message: Control) -> None:
        """Send ``message`` now, or keep it for the next connection."""
        if self._connection is not None:
            try:
                self._connection.send_control(message)
                return
            except ConnectionError:
                self.begin()
        if not isinstance(message, Hello):
            self._unsent.append(message)

    def receive(self) -> Control | None:
        """Next message if one is complete; a broken link is dialled again."""
        if self._connection is None:
            return None
        try:
            message = self._connection.recv_control(timeout_s=0)
        except TimeoutError:  # part of a frame: the rest will wake us again
            return None
        except ProtocolError as error:
            self._log.write("agent", [f"the link to the orchestrator broke: {error}"])
            message = None
        if message is None:
            self.begin()
        elif isinstance(message, Alive):
            self._silent_turns = 0
            if self.watch_at_s is None:
                self.watch_at_s = time.monotonic() + self._watch_interval_s
        return message

    def is_silent(self, now_s: float) -> bool:
        """Whether the orchestrator, which gave signs of life, has given none for too long.

        Call it when what has arrived was received.
        """
        if self.watch_at_s is None or now_s < self.watch_at_s:
            return False
        self.watch_at_s = now_s + self._watch_interval_s
        self._silent_turns += 1
        if self._silent_turns < _WATCH_TURNS:
            return False
        self.watch_at_s = None
        return True

    @property
    def _watch_interval_s(self) -> float:
        return self._config.orchestrator_silence_s / _WATCH_TURNS


class RestartBudget:
    """At most so many restarts within a sliding window. Pure: the time comes in."""

    def __init__(self, restarts_max: int, window_s: float) -> None:
        self._restarts_max = restarts_max
        self._window_s = window_s
        self._spent_s: deque[float] = deque()

    def spend(self, now_s: float) -> bool:
        """Take one restart; false if none is left."""
        while self._spent_s and self._spent_s[0] <= now_s - self._window_s:
            self._spent_s.popleft()
        if len(self._spent_s) >= self._restarts_max:
            return False
        self._spent_s.append(now_s)
        return True
