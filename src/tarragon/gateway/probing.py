"""Does an attention worker that owes tokens work? Its pulse tells, and if that stops, a probe (section 5).

A worker that dies closes its link; one that is stopped, hangs or is cut off does not. While all that owe
something work, this reads a number of each once per ``pulse_look_ms`` and asks nobody; it wakes for that only
if no token has come to wake the gateway for it. While nobody owes anything, no timer runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from tarragon.boot import Boot
from tarragon.config import WORKER_REDIAL_PAUSE_S_MAX, WORKER_REDIAL_PAUSE_S_MIN
from tarragon.liveness import NEVER_US, Failed, Probe, Verdict, WaitUntil, Watch
from tarragon.messages import Peer, ProtocolError
from tarragon.transport.probe import ProbeChannel
from tarragon.transport.probe_dial import close_late, open_in_thread


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
        self._early_us = int(boot.config.pulse_look_ms * 1e3) // 2
        self._timer: asyncio.TimerHandle | None = None
        self._due_us = NEVER_US

    @property
    def watched(self) -> list[str]:
        """Ids of the workers that can be probed."""
        return sorted(name for name, watched in self._watched.items() if watched.channel is not None)

    @property
    def is_idle(self) -> bool:
        """Whether nobody is waited for, and no timer runs."""
        return self._timer is None

    def link_up(self, peer: Peer) -> None:
        assert peer.worker_id not in self._watched, peer.worker_id
        owes = partial(self._owes, peer.worker_id)
        failed = partial(self._on_failed, peer.worker_id)
        self._watched[peer.worker_id] = _Watched(self._boot, peer, owes, failed, self.arm)

    def link_down(self, worker_id: str) -> None:
        watched = self._watched.pop(worker_id, None)
        if watched is not None:
            watched.close()

    def heard(self, worker_id: str) -> None:
        """The worker sent something over its link."""
        watched = self._watched.get(worker_id)
        if watched is None:
            return
        now = now_us()
        watched.watch.heard(now)
        if self._timer is not None and self._due_us < now + self._early_us:
            # A look costs a hundredth of what waking up for it costs, and we are awake.
            self._timer.cancel()
            self._on_time()

    def arm(self) -> None:
        """To be called after anything that may have made a worker owe outputs."""
        if self._enabled:
            self._look([watched for watched in self._watched.values() if not watched.is_waited_for])

    def enable(self, enabled: bool) -> None:
        """Whether silent workers are probed from now on."""
        self._enabled = enabled
        for watched in self._watched.values():
            watched.is_waited_for = False
        self.arm()

    def _on_time(self) -> None:
        self._timer, self._due_us = None, NEVER_US
        self._look([watched for watched in self._watched.values() if watched.is_waited_for])

    def _look(self, watched: list[_Watched]) -> None:
        """Look after these, and come back when the first of them asks for it."""
        due_us = min((one.look() for one in watched), default=NEVER_US)
        if due_us >= self._due_us:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due_us = due_us
        delay_s = max(0.0, (due_us - now_us()) / 1e6)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_time)


class _Watched:
    """One worker's incarnation: its channel, kept open in the background, and its watch."""

    def __init__(
        self,
        boot: Boot,
        peer: Peer,
        owes: Callable[[], bool],
        on_failed: Callable[[str], None],
        on_open: Callable[[], None],
    ) -> None:
        self.channel: ProbeChannel | None = None
        self.watch = Watch(boot.config, now_us(), boot.config.attention_step_ms_max)
        self.is_waited_for = False
        """Whether it owed something when it was last looked after."""
        self._boot = boot
        self._peer = peer
        self._owes = owes
        self._on_failed = on_failed
        self._on_open = on_open
        self._look_us = int(boot.config.pulse_look_ms * 1e3)
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._task = self._loop.create_task(self._keep_open(), name=f"probes {peer.worker_id}")

    def close(self) -> None:
        self._task.cancel()
        self._drop()

    # ------------------------------------------------------------------ the channel

    async def _keep_open(self) -> None:
        pause_s = WORKER_REDIAL_PAUSE_S_MIN
        while True:
            try:
                self.channel = await self._open()
                pause_s = WORKER_REDIAL_PAUSE_S_MIN
                self._ended.clear()
                self._loop.add_reader(self.channel.fileno(), self._take_answers)
                self._on_open()
                await self._ended.wait()
                self._drop()
            except (OSError, TimeoutError, ProtocolError):
                pass  # its link is what tells whether it is gone
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, WORKER_REDIAL_PAUSE_S_MAX)

    async def _open(self) -> ProbeChannel:
        """Dial, and wait until probes will be answered: in a thread, as it blocks. Raises as that does."""
        timeout_s = self._boot.config.probe_open_timeout_s
        opening = open_in_thread(self._boot, self._peer, timeout_s=timeout_s, pulse=True)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            close_late(opening)
            raise

    def _drop(self) -> None:
        self.is_waited_for = False
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

    def look(self) -> int:
        """See whether it works, ask it if that is due; returns when to look again (us)."""
        verdict = self._verdict(self._owes())
        wake_us = verdict.deadline_us if isinstance(verdict, WaitUntil) else NEVER_US
        self.is_waited_for = wake_us < NEVER_US
        if isinstance(verdict, Failed):
            # Not in this call: whatever comes of it shall not keep the others from being looked after.
            self._loop.call_soon(self._fail, verdict.cause)
        return wake_us

    def _fail(self, cause: str) -> None:
        if self.channel is not None:  # else it was given up meanwhile
            self._on_failed(cause)

    def _verdict(self, owes: bool) -> Verdict | None:
        """Send the probes that are due; None without a channel."""
        now = now_us()
        pulse = None if self.channel is None else self.channel.pulse
        if pulse is not None:
            self.watch.worked(pulse.at_us, now)
        if self.watch.is_asking:
            self._take_answers()
        while self.channel is not None and not self.channel.eof:
            verdict = self.watch.next(now, owes)
            if isinstance(verdict, WaitUntil) and pulse is not None and not self.watch.is_asking:
                return WaitUntil(max(verdict.deadline_us, now + self._look_us))
            if not isinstance(verdict, Probe):
                return verdict
            try:
                self.channel.send(verdict.sequence)
            except ConnectionError:
                self._ended.set()
        return None


def now_us() -> int:
    return time.monotonic_ns() // 1_000
