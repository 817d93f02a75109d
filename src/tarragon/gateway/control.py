"""The gateway's link to the orchestrator: who the attention workers are, and when to stop.

The orchestrator's absence is not the gateway's failure: requests flow on over the workers it knows.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

from tarragon.boot import Boot
from tarragon.config import ORCHESTRATOR_REDIAL_PAUSE_S
from tarragon.gateway.client import Client
from tarragon.gateway.metrics import counters
from tarragon.messages import (
    Control as ControlMessage,
)
from tarragon.messages import (
    Drain,
    Hello,
    Peer,
    Peers,
    Probing,
    ProtocolError,
    Ready,
    Refused,
    Report,
    Stop,
    Suspicion,
    Welcome,
)
from tarragon.transport.local import AsyncConnection, dial_async


class Control:
    """Keeps a connection to the orchestrator for the life of the process."""

    def __init__(self, boot: Boot, http_address: str, client: Client, on_stop: Callable[[str], None]) -> None:
        self._boot = boot
        self._http_address = http_address
        self._client = client
        self._on_stop = on_stop
        self._connection: AsyncConnection | None = None
        self._serving = False
        self._tasks: set[asyncio.Task[None]] = set()
        client.on_link_lost = self._suspect
        client.on_drained = lambda worker_id: self._spawn(self._send(Drain(worker_id=worker_id)))

    async def run(self, started: Awaitable[None]) -> None:
        """Dial, and dial again; ``started`` ends when the server accepts connections."""
        self._spawn(self._announce(started))
        self._spawn(self._report_forever())
        while True:
            try:
                if not await self._talk():
                    return
            except ProtocolError:
                self._client.streams.counters.frames_malformed += 1
            except (OSError, TimeoutError):
                pass  # it restarts, or is not up yet
            self._connection = None
            await asyncio.sleep(ORCHESTRATOR_REDIAL_PAUSE_S)

    async def _talk(self) -> bool:
        """One connection, from Hello to its end; False if there shall be no other."""
        boot = self._boot
        connection = await dial_async(
            boot.orchestrator_address,
            boot.secret,
            timeout_s=boot.config.connect_timeout_s,
            frame_bytes_max=boot.config.control_frame_bytes_max,
        )
        try:
            await connection.send_control(
                Hello(
                    worker_id=boot.worker_id,
                    role=boot.role,
                    epoch=boot.epoch,
                    pid=os.getpid(),
                    address=self._http_address,
                )
            )
            self._connection = connection
            if self._serving:
                await self._send(self._ready())
            while (message := await connection.recv_control()) is not None:
                if not self._take(message):
                    return False
            return True
        finally:
            connection.close()

    def _take(self, message: ControlMessage) -> bool:
        match message:
            case Welcome(peers=peers):
                # Adds only: an orchestrator that restarted may not know all workers yet.
                self._client.add_peers(peers)
            case Peers(peers=peers):
                self._client.set_peers(peers)
            case Drain(worker_id=worker_id):
                self._client.drain(worker_id)
            case Probing(enabled=enabled):
                self._client.prober.enable(enabled)
            case Stop(reason=reason):
                self._on_stop(f"told to stop: {reason}" if reason else "told to stop")
                return False
            case Refused(reason=reason):
                self._on_stop(f"refused by the orchestrator: {reason}")
                return False
            case _:
                pass  # the table and its like are not the gateway's concern
        return True

    async def _announce(self, started: Awaitable[None]) -> None:
        await started
        self._serving = True
        await self._send(self._ready())

    def _ready(self) -> Ready:
        # The gateway computes nothing, so it is exact; tokens are the workers' matter.
        return Ready(worker_id=self._boot.worker_id, epoch=self._boot.epoch, fingerprint="", exact=True)

    async def _report_forever(self) -> None:
        while True:
            await asyncio.sleep(self._boot.config.report_interval_ms / 1e3)
            pace = self._client.pace.gauges(self._client.streams.live, time.monotonic())
            await self._send(
                Report(
                    worker_id=self._boot.worker_id,
                    epoch=self._boot.epoch,
                    counters={**counters(self._client), **pace},
                )
            )

    def _suspect(self, peer: Peer, cause: str) -> None:
        self._spawn(
            self._send(
                Suspicion(
                    reporter_id=self._boot.worker_id,
                    suspect_id=peer.worker_id,
                    suspect_epoch=peer.epoch,
                    cause=cause,
                )
            )
        )

    async def _send(self, message: ControlMessage) -> None:
        """Send if the orchestrator is there; what it misses it learns from the next report."""
        if self._connection is not None:
            try:
                await self._connection.send_control(message)
            except OSError:
                self._connection = None

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
