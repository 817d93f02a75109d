"""The processes that try grammars: one serves, its standby takes over when it ends.

They must come from the gateway's beginning, when it has one thread, and may die at any moment like every
other process. So each that serves forks its own standby, and another when that one dies; a standby does
nothing but wait. Only if both die at once is the gateway left without.

Whoever begins to serve sends the gateway, through one door that all of them inherit, a socket of its own:
what its predecessor was in the middle of saying confuses nobody.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from tarragon.agent.process import set_title
from tarragon.config import Config
from tarragon.gateway.grammar_zygote import Compile, Zygote

NICE: Final = 10
"""Streams go on while a grammar is tried."""
TITLE: Final = "tarragon: grammars"


def fork(config: Config, make_compiler: Callable[[], Compile]) -> socket.socket:
    """Start them; return the gateway's end of the door. Call it before any thread is started."""
    ours, door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    between = os.fork()
    if between == 0:
        try:
            ours.close()
            if os.fork():  # an orphan's end is taken note of by the node agent, as that of all later ones
                os._exit(0)
            set_title(TITLE)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.nice(NICE)
            logging.disable(logging.CRITICAL)  # a client's bad grammar is no line in our log
            serve_in_turn(door, config, make_compiler)
        finally:
            os._exit(0)
    os.waitpid(between, 0)
    door.close()
    return ours


def serve_in_turn(door: socket.socket, config: Config, make_compiler: Callable[[], Compile]) -> None:
    """Serve until the gateway is gone; a standby returns from its fork in here, waits, then serves."""
    while True:
        trials, theirs = socket.socketpair()
        with theirs, suppress(OSError):  # the gateway is gone: the first look at ``trials`` says so
            socket.send_fds(door, [b"\0"], [theirs.fileno()])
        try:
            with trials:
                Zygote(trials, config, make_compiler, Standby()).run()
            return
        except Forked as standby:
            if not _stand_by(door, standby.predecessor):
                return


class Forked(Exception):
    """Raised in a process that has just been forked: it leaves what its predecessor was doing."""

    def __init__(self, predecessor: int) -> None:
        self.predecessor = predecessor
        """Pid descriptor of who serves."""


class Standby:
    """Whoever stands by, as its predecessor sees it."""

    def __init__(self) -> None:
        self.pid = 0
        self.pidfd = -1
        self.renew()

    def renew(self) -> None:
        """Fork one unless one could take over now. Raises Forked in the child, OSError if none can be."""
        if self.pid:
            ended, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if not ended:
                return
            if os.WIFSTOPPED(status):  # it could not take over
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            os.close(self.pidfd)
        myself = os.pidfd_open(os.getpid())
        self.pid = os.fork()
        if self.pid == 0:
            raise Forked(myself)
        os.close(myself)
        self.pidfd = os.pidfd_open(self.pid)


def _stand_by(door: socket.socket, predecessor: int) -> bool:
    """Wait for the predecessor's end; False if the gateway's came first."""
    poll = select.poll()
    poll.register(predecessor, select.POLLIN)
    poll.register(door, 0)  # the end of the gateway is always told
    happened = dict(poll.poll())
    os.close(predecessor)
    return door.fileno() not in happened
