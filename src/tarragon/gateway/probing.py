"""Does an attention worker that owes tokens still work? A probe channel beside its link tells (section 5).

A worker that dies closes its link; one that is stopped, hangs or is cut off does not. While it owes nothing,
nothing is asked and no timer runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tarragon.boot import Boot
from tarragon.config import WORKER_REDIAL_PAUSE_S_MAX, WORKER_REDIAL_PAUSE_S_MIN
from tarragon.liveness import Failed, Probe, Verdict, WaitUntil, Watch
from tarragon.messages import Peer, ProbeAccepted, ProbeOpen, ProtocolError
from tarragon.transport.local import dial_async
from tarragon.transport.probe import PROBE_OPEN_BYTES_MAX, ProbeChannel, ProbeRefused


class Prober:
    """One per gateway; watches the attention workers whose links are up."""

    def __init__(
        self, boot: Boot, owes: Callable[[str], bool], on_failed: Callable[[str, str], None]
    ) -> None:
        """``owes`` says of a worker's id whether outputs are waited for; ``on_failed`` gets id and cause."""
        self._boot = boot
        self._owes = owes
        self._on_failed = on_failed
        self._watched: dict[str, _Watched] = {}
        self._enabled = True

    @property
    def watched(self) -> list[str]:
        """Ids of the workers that can be probed."""
        return sorted(name for name, watched in self._watched.items() if watched.channel is not None)

    def link_up(self, peer: Peer) -> None:
        assert peer.worker_id not in self._watched, peer.worker_id
        self._watched[peer.worker_id] = _Watched(self._boot, peer, self._owes, self._on_failed)

    def link_down(self, worker_id: str) -> None:
        watched = self._watched.pop(worker_id, None)
        if watched is not None:
            watched.close()

    def heard(self, worker_id: str) -> None:
        """The worker sent something over its link."""
        watched = self._watched.get(worker_id)
        if watched is not None:
            watched.watch.heard(now_us())

    def arm(self) -> None:
        """To be called after anything that may have made a worker owe outputs."""
        if self._enabled:
            for watched in self._watched.values():
                watched.arm()

    def enable(self, enabled: bool) -> None:
        """Whether silent workers are probed from now on."""
        self._enabled = enabled
        for watched in self._watched.values():
            watched.rest()
        self.arm()


class _Watched:
    """One worker's incarnation: its channel, kept open in the background, and its watch."""

    def __init__(
        self, boot: Boot, peer: Peer, owes: Callable[[str], bool], on_failed: Callable[[str, str], None]
    ) -> None:
        self.channel: ProbeChannel | None = None
        self.watch = Watch(boot.config, now_us(), boot.config.attention_step_ms_max)
        self._boot = boot
        self._peer = peer
        self._owes = owes
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()
        self._task = self._loop.create_task(self._keep_open(), name=f"probes {peer.worker_id}")

    def close(self) -> None:
        self._task.cancel()
        self._drop()

    def arm(self) -> None:
        """Start the timer if there is something to wait for; it stops by itself."""
        if self._timer is None and self.channel is not None and self._owes(self._peer.worker_id):
            self._ask()

    def rest(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ------------------------------------------------------------------ the channel

    async def _keep_open(self) -> None:
        pause_s = WORKER_REDIAL_PAUSE_S_MIN
        while True:
            try:
                self.channel = await self._open()
                pause_s = WORKER_REDIAL_PAUSE_S_MIN
                self._ended.clear()
                self._loop.add_reader(self.channel.fileno(), self._take_answers)
                self.arm()
                await self._ended.wait()
                self._drop()
            except (OSError, TimeoutError, ProtocolError):
                pass  # its link is what tells whether it is gone
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, WORKER_REDIAL_PAUSE_S_MAX)

    async def _open(self) -> ProbeChannel:
        """Dial, and wait until probes will be answered; raises as the transport does, and ProbeRefused."""
        boot, peer = self._boot, self._peer
        async with asyncio.timeout(boot.config.probe_open_timeout_s):
            connection = await dial_async(
                peer.address,
                boot.secret,
                timeout_s=boot.config.probe_open_timeout_s,
                frame_bytes_max=PROBE_OPEN_BYTES_MAX,
            )
            try:
                await connection.send_control(
                    ProbeOpen(sender_id=boot.worker_id, sender_epoch=boot.epoch, receiver_epoch=peer.epoch)
                )
                reply = await connection.recv_control()
                if reply != ProbeAccepted(epoch=peer.epoch):
                    raise ProbeRefused("it hung up" if reply is None else f"it answered {reply}")
            except BaseException:
                connection.close()
                raise
        return ProbeChannel(connection.sock, peer.epoch)

    def _drop(self) -> None:
        self.rest()
        if self.channel is not None:
            if self.channel.fileno() >= 0:
                self._loop.remove_reader(self.channel.fileno())
            self.channel.close()
            self.channel = None

    def _take_answers(self) -> None:
        channel = self.channel
        if channel is None:
            return
        now = now_us()
        for answer in channel.recv_ready():
            self.watch.answered(answer.sequence, answer.progress, now)
        if channel.eof:
            self._loop.remove_reader(channel.fileno())
            self._ended.set()

    # ------------------------------------------------------------------ the question

    def _ask(self) -> None:
        """Ask the watch what to do, do it, and come back when it says so."""
        self._timer = None
        verdict = self._verdict()
        if isinstance(verdict, Failed):
            self._on_failed(self._peer.worker_id, verdict.cause)
        elif isinstance(verdict, WaitUntil) and self._owes(self._peer.worker_id):
            delay_s = max(0.0, (verdict.deadline_us - now_us()) / 1e6)
            self._timer = self._loop.call_later(delay_s, self._ask)

    def _verdict(self) -> Verdict | None:
        """Send the probes that are due; None once the channel is over."""
        now = now_us()
        self._take_answers()
        while self.channel is not None and not self.channel.eof:
            verdict = self.watch.next(now, self._owes(self._peer.worker_id))
            if not isinstance(verdict, Probe):
                return verdict
            try:
                self.channel.send(verdict.sequence)
            except ConnectionError:
                self._ended.set()
        return None


def now_us() -> int:
    return time.monotonic_ns() // 1_000
