"""The orchestrator's process: sockets and timers. Recovery decides; nothing is decided here.

The node agent dials first and is told what to start; workers dial and are welcomed. When the agent's
connection ends, so does this process: the agent starts the next generation.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from tarragon.boot import Boot
from tarragon.messages import (
    Alive,
    Control,
    Failpoint,
    Hello,
    Peer,
    ProtocolError,
    Refused,
    Report,
    SignalWorker,
    WorkerExited,
    WorkerStarted,
)
from tarragon.models.shape import ModelError, read_model
from tarragon.observability.history import History
from tarragon.orchestrator.actions import Action, Disconnect, Note, SendTo, ToAgent, Verify
from tarragon.orchestrator.adoption import Adoption
from tarragon.orchestrator.commands import Commands
from tarragon.orchestrator.events import Events
from tarragon.orchestrator.line import Line
from tarragon.orchestrator.membership import EPOCH_COUNTER_BITS
from tarragon.orchestrator.planning import ExpertShape
from tarragon.orchestrator.probing import Prober
from tarragon.orchestrator.recovery import PREFIXES, Recovery
from tarragon.orchestrator.snapshot import faults, routes, status
from tarragon.orchestrator.status import AddressError, StatusServer
from tarragon.routing.placement import PlacementError
from tarragon.transport.local import AsyncConnection, AsyncServer, serve_async
from tarragon.transport.probe import ProbeChannel

AGENT: Final = "agent"
ALARMING: Final = frozenset({"suspect", "dead", "given up", "backoff", "refused", "placement"})
"""Kinds of notes that are logged as warnings."""
BEATS: Final = 10
"""Signs of life within the time of silence after which the node agent replaces us."""
EXIT_USAGE: Final = 2
"""Exit code for what the user has to change: a port in use, a model that does not fit."""


def main(boot: Boot) -> None:
    """Run the orchestrator until the node agent leaves. Raises SystemExit unless it ended well."""
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        code = runner.run(_run(boot))
    if code:
        raise SystemExit(code)


async def _run(boot: Boot) -> int:
    try:
        model = read_model(boot.model)
        shape = ExpertShape(len(model.moe_layers), model.experts, model.expert_bytes)
        return await Orchestrator(boot, shape, model.top_k).run()
    except (ModelError, PlacementError, AddressError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return EXIT_USAGE


class Orchestrator:
    """Carries events to recovery and its actions to the world."""

    def __init__(self, boot: Boot, shape: ExpertShape, top_k: int) -> None:
        """Raises PlacementError if the experts do not fit on the configured workers."""
        generation = boot.epoch >> EPOCH_COUNTER_BITS
        self._boot, self._config = boot, boot.config
        self._recovery = Recovery(boot.config, shape, generation)
        self._commands = Commands(self._recovery)
        self._events = Events(boot.config.events_max)
        self._history = History(
            samples_max=boot.config.history_samples_max,
            report_interval_s=boot.config.report_interval_ms / 1e3,
            layers=shape.layers,
            top_k=top_k,
        )
        self._adoption = Adoption(generation) if generation > 1 else None
        self._prober = Prober(boot, self._on_probe_answered, self._on_probe_failed)
        self._lines: dict[str, Line] = {}
        self._agent: Line | None = None
        self._server: AsyncServer | None = None
        self._has_begun = asyncio.Event()
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """Serve until the end; return the exit code. Raises AddressError."""
        loop, config = asyncio.get_running_loop(), self._config
        loop.set_exception_handler(self._on_broken_invariant)
        loop.add_signal_handler(signal.SIGTERM, self._finish, 0)
        api = StatusServer(self, config)
        await api.start()
        try:
            server = self._server = await serve_async(
                self._boot.orchestrator_address,
                self._boot.secret,
                self._on_connection,
                frame_bytes_max=config.control_frame_bytes_max,
                handshake_timeout_s=config.handshake_timeout_s,
            )
            loop.call_later(config.connect_timeout_s, self._give_up_without_agent)
            self._tick()
            self._beat()
            self._sample()
            code = await self._end
            server.close()
            await server.wait_closed()
            return code
        except OSError as error:
            raise AddressError(f"the orchestrator's socket cannot be opened: {error}") from error
        finally:
            self._prober.close()
            for line in [*self._lines.values(), *([self._agent] if self._agent else [])]:
                line.close()
            await api.close()

    # ------------------------------------------------------------------ connections

    async def _on_connection(self, connection: AsyncConnection) -> None:
        try:
            async with asyncio.timeout(self._config.handshake_timeout_s):
                first = await connection.recv_control()
        except (TimeoutError, ProtocolError, OSError):
            first = None
        if not isinstance(first, Hello):
            self._recovery.membership.refused["no_hello"] += 1
        elif first.worker_id == AGENT:
            await self._serve_agent(connection)
        else:
            await self._serve_worker(connection, first)

    async def _serve_agent(self, connection: AsyncConnection) -> None:
        if self._agent is not None:
            self._recovery.membership.refused["second_agent"] += 1
            await connection.send_control(Refused(reason="this cluster has a node agent already"))
            return
        self._agent = self._line_on(connection)
        asyncio.get_running_loop().call_later(
            0.0 if self._adoption is None else self._config.adoption_window_s, self._begin
        )
        while (message := await self._agent.receive()) is not None:
            if not isinstance(message, (WorkerStarted, WorkerExited)):
                self._recovery.membership.refused["unexpected_message"] += 1
            elif not self._has_begun.is_set():
                if self._adoption is not None:
                    self._adoption.agent_says(message)
            else:
                self._carry_out(self._recovery.agent_says(message, self._now_s()))
        if not self._end.done():
            print("the node agent has left", file=sys.stderr)
            self._finish(0)

    def _begin(self) -> None:
        if not self._end.done():
            adopted = [] if self._adoption is None else self._adoption.result()
            self._carry_out(self._recovery.begin(self._now_s(), adopted))
            self._has_begun.set()

    async def _serve_worker(self, connection: AsyncConnection, hello: Hello) -> None:
        line = self._line_on(connection, hello.epoch)
        try:
            if not await self._welcome(line, hello):
                return
            while (message := await line.receive()) is not None:
                known = self._recovery.membership.is_connected(hello.worker_id, hello.epoch)
                if known and isinstance(message, Report):
                    self._history.report(hello.worker_id, hello.epoch, message.counters, self._now_s())
                actions = self._recovery.receive(hello.worker_id, hello.epoch, message, self._now_s())
                self._carry_out(actions)
        finally:
            line.close()
            if self._lines.get(hello.worker_id) is line:
                del self._lines[hello.worker_id]
                if not self._end.done():
                    lost = self._recovery.connection_lost(
                        hello.worker_id, hello.epoch, line.cause, self._now_s()
                    )
                    self._carry_out(lost)

    def _line_on(self, connection: AsyncConnection, epoch: int = 0) -> Line:
        return Line(connection, self._config.control_queue_max, self._recovery.membership.refused, epoch)

    async def _welcome(self, line: Line, hello: Hello) -> bool:
        """Admit a worker, or say why not."""
        if not self._has_begun.is_set() and self._adoption is not None:
            self._adoption.hello(hello)
            self._lines[hello.worker_id] = line
            await self._has_begun.wait()
            if self._recovery.membership.is_connected(hello.worker_id, hello.epoch):
                return True
            if self._lines.get(hello.worker_id) is line:
                del self._lines[hello.worker_id]
        answer = self._recovery.hello(hello, self._now_s())
        if isinstance(answer, Refused):
            self._note(Note("refused", hello.worker_id, hello.epoch, answer.reason))
            with suppress(OSError):
                await line.connection.send_control(answer)
            return False
        self._lines[hello.worker_id] = line
        self._carry_out(answer)
        return True

    # ------------------------------------------------------------------ actions

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Note():
                    self._note(action)
                case ToAgent(message):
                    self._tell_agent(message)
                case SendTo(worker_id, epoch, message):
                    if (line := self._line(worker_id, epoch)) is not None:
                        line.send(message)
                case Verify(worker_id, epoch):
                    self._prober.verify(worker_id, epoch)
                case Disconnect(worker_id, epoch):
                    if (line := self._line(worker_id, epoch)) is not None:
                        line.close()

    def _line(self, worker_id: str, epoch: int) -> Line | None:
        line = self._lines.get(worker_id)
        return line if line is not None and line.epoch == epoch else None

    def _tell_agent(self, message: Control) -> None:
        if self._agent is not None:
            self._agent.send(message)

    def _note(self, note: Note) -> None:
        self._events.add(note)
        level = "WARNING " if note.kind in ALARMING else ""
        print(f"{level}{note.worker_id} ({note.epoch}) {note.kind}: {note.text}", file=sys.stderr)

    # ------------------------------------------------------------------ time and end

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _tick(self) -> None:
        if self._end.done():
            return  # the loop is being wound up: nothing new may begin
        if self._has_begun.is_set():
            self._carry_out(self._recovery.tick(self._now_s()))
            workers = self._recovery.membership.workers.values()
            self._prober.tick([worker.peer for worker in workers if worker.serving and worker.connected])
        asyncio.get_running_loop().call_later(self._config.orchestrator_tick_ms / 1e3, self._tick)

    def _on_probe_answered(self, worker_id: str, epoch: int) -> None:
        """A suspect is well, as far as we can see: who suspects it goes on without it, and nobody else."""
        moved = self._recovery.membership.heard(worker_id, epoch, self._now_s())
        self._carry_out(self._recovery.moved(moved, "it answers the orchestrator"))

    def _on_probe_failed(self, worker_id: str, epoch: int, cause: str) -> None:
        moved = self._recovery.membership.unresponsive(worker_id, epoch, cause)
        self._carry_out(self._recovery.died(moved, self._now_s()))

    def _beat(self) -> None:
        """Give the node agent a sign of life, again and again; one that is busy gets them later, not all."""
        if self._agent is not None and self._agent.is_idle:
            self._agent.send(Alive())
        interval_s = self._config.orchestrator_silence_s / BEATS
        asyncio.get_running_loop().call_later(interval_s, self._beat)

    def _sample(self) -> None:
        """Take a sample for /history, again and again."""
        live = [worker for worker in self._recovery.membership.workers.values() if worker.serving]
        self._history.sample(
            [worker.worker_id for worker in live if worker.role == "attention"],
            [worker.worker_id for worker in live if worker.role == "expert"],
            self._now_s(),
            time.time(),
        )
        asyncio.get_running_loop().call_later(self._config.history_interval_ms / 1e3, self._sample)

    def _finish(self, code: int) -> None:
        if not self._end.done():
            self._end.set_result(code)

    def _give_up_without_agent(self) -> None:
        if self._agent is None:
            print("tarragon: no node agent has come", file=sys.stderr)
            self._finish(1)

    def _on_broken_invariant(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An error that nobody expected: better a new orchestrator than one that knows wrong things."""
        loop.default_exception_handler(context)
        if not isinstance(context.get("exception"), (OSError, type(None))):
            self._finish(1)

    # ------------------------------------------------------------------ operations (admin API)

    def status(self) -> dict[str, Any]:
        found = status(self._recovery, self._me, self._now_s())
        # What the transport refused never came as far as the membership.
        transport = {
            "handshake": 0 if self._server is None else self._server.refused,
            "malformed_probe_answer": ProbeChannel.malformed,
        }
        return {**found, "refused": transport | found["refused"]}

    def table(self) -> dict[str, Any]:
        return routes(self._recovery.residency.table)

    def events(self, limit: int, after: int) -> dict[str, Any]:
        return {"events": self._events.latest(limit, after)}

    def history(self, after: int) -> dict[str, Any]:
        return {
            "interval_ms": self._config.history_interval_ms,
            "samples_max": self._config.history_samples_max,
            "samples": self._history.latest(after),
        }

    def faults(self) -> dict[str, Any]:
        return faults(self._recovery)

    def kill(self, worker_id: str, number: int) -> dict[str, Any]:
        if worker_id == self._boot.worker_id:
            me = self._me
            self._tell_agent(SignalWorker(worker_id=me.worker_id, epoch=me.epoch, signal=number))
            pid, epoch = me.pid, me.epoch
        else:
            worker, actions = self._commands.kill(worker_id, number)
            self._carry_out(actions)
            pid, epoch = worker.pid, worker.epoch
        name = signal.Signals(number).name
        return {"worker_id": worker_id, "epoch": epoch, "pid": pid, "signal": name}

    def drain(self, worker_id: str) -> dict[str, Any]:
        self._carry_out(self._commands.drain(worker_id, self._now_s()))
        return {"worker_id": worker_id, "state": "draining"}

    def add(self, role: str) -> dict[str, Any]:
        assert role in PREFIXES
        worker_id, actions = self._commands.add(role, self._now_s())
        self._carry_out(actions)
        return {"worker_id": worker_id, "state": "starting"}

    def checkpointing(self, mode: str, reprotect: bool) -> dict[str, Any]:
        self._carry_out(self._commands.checkpointing(mode, reprotect))
        return {"mode": mode, "reprotect": reprotect}

    def protection(self, probing: bool, shadow_replicas: int) -> dict[str, Any]:
        self._carry_out(self._commands.protection(probing, shadow_replicas, self._now_s()))
        self._prober.enabled = probing
        return {"probing": probing, "shadow_replicas": shadow_replicas}

    def inject(self, worker_id: str, order: Failpoint) -> dict[str, Any]:
        self._carry_out(self._commands.failpoint(worker_id, order))
        return {
            "worker_id": worker_id,
            "failpoint": order.name,
            "after": order.after,
            "effect": order.effect,
        }

    def apply(self, instruction: str, worker_ids: list[str]) -> dict[str, Any]:
        """A fault-tolerance instruction: what of it was possible has begun when this returns."""
        now_s = self._now_s()
        if instruction == "retry":
            worker_ids = self._commands.dead()
        act = self._commands.remove if instruction == "scale_down" else self._commands.restart
        for worker_id in worker_ids:
            self._recovery.membership.known(worker_id)
        for worker_id in worker_ids:
            self._carry_out(act(worker_id, now_s))
        message = "accepted; GET /fault_tolerance/status says how it goes"
        return {"message": message, "request_id": str(uuid.uuid4()), "worker_ids": worker_ids}

    @property
    def _me(self) -> Peer:
        boot = self._boot
        return Peer(
            worker_id=boot.worker_id,
            role=boot.role,
            epoch=boot.epoch,
            address=boot.orchestrator_address,
            pid=os.getpid(),
        )
