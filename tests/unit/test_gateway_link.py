"""An attention worker reads its gateway's link while the engine computes, and begins restorations at once."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest
from tests.unit.test_gateway_wire import WORKER, request

from tarragon.attention.gateway_link import Ended, GatewayLink, Mail
from tarragon.attention.resume import Foreseen
from tarragon.gateway.wire import Abort, Add, Facts, Message, Origin
from tarragon.transport.local import Connection

WAIT_S = 10.0
FRAME_BYTES_MAX = 1 << 20


class Link:
    """A link over a socket pair: ``gateway`` is the far end, ``foreseen`` what was begun, in order."""

    def __init__(self) -> None:
        near, far = socket.socketpair()
        self.gateway = Connection(far, frame_bytes_max=FRAME_BYTES_MAX)
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.foreseen: list[str] = []
        self.link = GatewayLink(
            Connection(near, frame_bytes_max=FRAME_BYTES_MAX), self.wake_fd, self._foresee
        )

    def _foresee(self, message: Add) -> Foreseen:
        self.foreseen.append(message.request.request_id)
        if message.request.request_id == "bad":
            raise RuntimeError("nobody expects this")
        return Foreseen((), None)

    def send(self, message: Message) -> None:
        self.gateway.send(WORKER.encode(message))

    def next(self) -> Mail | Ended:
        return self.link.mail.get(timeout=WAIT_S)

    def close(self) -> None:
        self.gateway.close()
        self.link.close()
        while not isinstance(self.next(), Ended):
            pass
        os.close(self.wake_fd)


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    yield made
    made.close()


def test_messages_come_in_order_and_only_requests_from_elsewhere_are_foreseen(link: Link) -> None:
    origin = Origin("aw-1", 7, 1)
    sent = [
        Add(1, request(request_id="new")),
        Add(2, request(request_id="moved"), sent=[5], origins=[origin]),
        Abort({"new": 1}),
    ]
    for message in sent:
        link.send(message)
    came = [link.next() for _ in sent]
    assert [type(mail.message) for mail in came if isinstance(mail, Mail)] == [Add, Add, Abort]
    assert [mail.foreseen for mail in came if isinstance(mail, Mail)] == [None, Foreseen((), None), None]
    assert link.foreseen == ["moved"]


def test_an_engine_that_waits_is_woken(link: Link) -> None:
    link.send(Abort({"r": 1}))
    assert select.select([link.wake_fd], [], [], WAIT_S)[0] == [link.wake_fd]
    assert isinstance(link.next(), Mail)


def test_what_no_gateway_sends_ends_the_link_and_is_counted_as_malformed(link: Link) -> None:
    link.send(Facts("aw-0", 1, 8, 8, 8, 8, 8, 8))
    ended = link.next()
    assert isinstance(ended, Ended)
    assert ended.malformed
    assert "does not belong" in ended.cause
    link.link.mail.put(ended)  # for ``close``


def test_a_gateway_that_goes_ends_the_link(link: Link) -> None:
    link.gateway.close()
    assert link.next() == Ended("the gateway closed its link")
    link.link.mail.put(Ended(""))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_fails_ends_the_link_too(link: Link) -> None:
    """Else requests would wait for ever in a socket that nobody reads."""
    link.send(Add(2, request(request_id="bad"), sent=[5], origins=[Origin("aw-1", 7, 1)]))
    assert link.next() == Ended("its reader failed")
    link.link.mail.put(Ended(""))
