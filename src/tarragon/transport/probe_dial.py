"""Opens the probe channel from one process to another, beside an event loop too: dialling blocks, for as long
as a worker hangs."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

from tarragon.boot import Boot
from tarragon.messages import Peer
from tarragon.transport.probe import ProbeChannel


def open_channel(boot: Boot, peer: Peer, *, timeout_s: float, pulse: bool = False) -> ProbeChannel:
    """Open a channel from ``boot``'s process to ``peer``. Raises as ``ProbeChannel.open``."""
    return ProbeChannel.open(
        peer.address,
        boot.secret,
        sender_id=boot.worker_id,
        sender_epoch=boot.epoch,
        receiver_epoch=peer.epoch,
        timeout_s=timeout_s,
        pulse=pulse,
    )


def open_in_thread(
    boot: Boot, peer: Peer, *, timeout_s: float, pulse: bool = False
) -> asyncio.Future[ProbeChannel]:
    """As ``open_channel``, in a thread that no end of a process awaits.

    The result is the channel, or what that raises. Who does not want it any more hands the
    future to ``close_late``.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ProbeChannel] = loop.create_future()

    def finish(outcome: ProbeChannel | Exception) -> None:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def run() -> None:
        outcome: ProbeChannel | Exception
        try:
            outcome = open_channel(boot, peer, timeout_s=timeout_s, pulse=pulse)
        except Exception as error:
            outcome = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, outcome)

    threading.Thread(target=run, name="probe-dial", daemon=True).start()
    return future


def close_late(opening: asyncio.Future[ProbeChannel]) -> None:
    """Close the channel as soon as it is open."""

    def close(done: asyncio.Future[ProbeChannel]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().close()

    opening.add_done_callback(close)
