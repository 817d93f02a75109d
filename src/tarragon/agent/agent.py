"""The node agent: what `tarragon serve` becomes (5.4).

It stays single-threaded and runs no parallel region, so that a forked worker
finds torch and vLLM imported and healthy. It decides nothing about workers:
the orchestrator says what to start and what to signal, the agent does it and
tells what ended, and how. If the orchestrator itself ends, the agent starts
the next generation of it.
"""

from __future__ import annotations

import importlib
import os
import secrets
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Final

from tarragon.agent import preload, process
from tarragon.agent.children import CONSOLE, ORCHESTRATOR, STORE, Child, Children
from tarragon.agent.link import OrchestratorLink, RestartBudget
from tarragon.agent.log import LogPipe, LogWriter, collected
from tarragon.agent.preload import PRELOAD_MODULES, WORKER_MODULES
from tarragon.agent.priority import Politeness
from tarragon.agent.signals import STOP_SIGNALS, Interrupted, SignalInbox
from tarragon.agent.vault import Vault
from tarragon.boot import Boot, socket_address
from tarragon.config import Config
from tarragon.experts.memory import HostMemory
from tarragon.messages import Alive, Role, SignalWorker, StartWorker, Stop, WorkerExited, WorkerStarted

GENERATION_BITS: Final = 20
"""An epoch is generation << GENERATION_BITS | counter; the agent counts the orchestrator's generations."""
GENERATION_MAX: Final = (1 << 32 - GENERATION_BITS) - 1
"""Data frames carry epochs in 32 bits."""
USAGE_EXIT_CODE: Final = 2
_USAGE: Final = f"exit code {USAGE_EXIT_CODE}: tarragon: "
"""How an ended child says that the user has to change something."""


class NodeAgent:
    """Forks, watches, signals and reaps the processes of one host. Make one, call ``run`` once."""

    def __init__(
        self,
        config: Config,
        model: str,
        *,
        engine_args: Sequence[str] = (),
        modules: Mapping[str, str] = WORKER_MODULES,
        preload_modules: Sequence[str] = PRELOAD_MODULES,
        console: Callable[[], None] | None = None,
        check: Callable[[], None] | None = None,
        stop_with_pid: int = 0,
        expert_memory: HostMemory | None = None,
    ) -> None:
        """``console`` runs in a child of its own and returns once the cluster is ready.

        ``check`` runs after the imports and before any worker is forked: for what
        only vLLM can judge. Its ValueError ends the start with exit code 2.

        ``modules`` maps each role to the module whose ``main(boot)`` it runs. With
        ``stop_with_pid`` the cluster ends when that process does. ``expert_memory`` is taken over: expert
        workers share it.
        """
        self._config = config
        self._polite = Politeness(config.replacement_nice, config.replacement_idle_s)
        self._model = model
        self._engine_args = tuple(engine_args)
        self._modules = modules
        self._preload_names = preload_modules
        self._console = console
        self._check = check
        self._expert_memory = expert_memory
        self._cluster = secrets.token_hex(8)
        self._secret = secrets.token_bytes(32)
        self._cores = len(os.sched_getaffinity(0))

        self._children = Children()
        self._newest_epoch: dict[str, int] = {}
        self._start_failures: dict[str, int] = {}
        self._generation = 0
        self._restarts = RestartBudget(config.orchestrator_restarts_max, config.orchestrator_restart_window_s)
        self._was_ready = console is None
        self._is_preloaded = False
        self._is_stopping = False
        self._exit_code = 0
        self._failure = ""

        self._writer = LogWriter(2, config.log_format)
        self._selector = selectors.DefaultSelector()
        self._signals = SignalInbox()
        self._selector.register(self._signals, selectors.EVENT_READ, self._on_signals)
        self._starter_fd = os.pidfd_open(stop_with_pid) if stop_with_pid else -1
        if self._starter_fd >= 0:
            self._selector.register(self._starter_fd, selectors.EVENT_READ, self._on_starter_gone)
        address = socket_address(self._cluster, ORCHESTRATOR)
        self._link = OrchestratorLink(
            self._selector, self._on_orchestrator, address, self._secret, config, self._writer
        )
        vault_address = socket_address(self._cluster, "agent")
        self._vault = Vault(
            self._selector, vault_address, self._secret, config, self._writer, self._children.is_store
        )

    def run(self) -> int:
        """Start the cluster, obey the orchestrator until it is over, leave nothing; return the exit code."""
        process.become_subreaper()
        if self._console is not None:
            self._fork(CONSOLE, CONSOLE, 0, self._console, piped=False)
        self._start_orchestrator()
        while not self._is_stopping or self._children:
            for key, _ in self._selector.select(self._wait_s()):
                key.data()
            self._on_time(time.monotonic())
        self._leave_nothing()
        return self._exit_code

    # ------------------------------------------------------------------ time

    def _wait_s(self) -> float | None:
        """Seconds until something is due; None if only events can change anything."""
        if self._link.is_dialling:
            return 0.0  # an attempt to dial waits by itself
        due_s = self._children.due_s()
        if self._link.watch_at_s is not None:
            due_s.append(self._link.watch_at_s)
        return max(0.0, min(due_s) - time.monotonic()) if due_s else None

    def _on_time(self, now_s: float) -> None:
        for child in self._children.values():
            if child.kill_at_s is not None and child.kill_at_s <= now_s:
                child.kill_at_s = now_s + self._config.shutdown_grace_s
                self._log(f"{child.name} (pid {child.pid}) did not end in time: SIGKILL")
                self._signal(child, signal.SIGKILL)
        if self._is_stopping:
            self._link.end()
        elif self._link.is_dialling:
            self._dial()
        elif self._link.is_silent(now_s):
            self._log(f"the orchestrator hangs: no sign of life for {self._config.orchestrator_silence_s} s")
            self._kill_orchestrator()

    # ------------------------------------------------------------------ the orchestrator

    @property
    def _orchestrator_epoch(self) -> int:
        return self._generation << GENERATION_BITS

    def _start_orchestrator(self) -> None:
        self._generation += 1
        self._start(ORCHESTRATOR, ORCHESTRATOR, self._orchestrator_epoch)
        self._link.begin()

    def _dial(self) -> None:
        """Try to reach the orchestrator; the first success is followed by the heavy imports."""
        outcome = self._link.turn(self._orchestrator_epoch, self._children.to_adopt)
        if outcome == "connected" and not self._is_preloaded:
            self._preload()
        elif outcome == "given up":
            self._log("the orchestrator does not answer: SIGKILL")
            self._kill_orchestrator()

    def _kill_orchestrator(self) -> None:
        """The next generation follows when this one is reaped."""
        for child in self._children.named(ORCHESTRATOR):
            self._signal(child, signal.SIGKILL)

    def _on_orchestrator(self) -> None:
        message = self._link.receive()
        if isinstance(message, StartWorker):
            self._on_start_worker(message)
        elif isinstance(message, SignalWorker):
            self._on_signal_worker(message)
        elif isinstance(message, Stop):
            self._stop(message.reason or "the orchestrator says so", code=0 if self._was_ready else 1)
        elif message is not None and not isinstance(message, Alive):
            self._log(f"refused a message that is not for a node agent: {type(message).__name__}")

    def _on_orchestrator_exit(self, why: str) -> None:
        self._link.end()
        if self._is_stopping:
            return
        if not self._link.was_ever_up and why.startswith(_USAGE):
            self._fail(why.removeprefix(_USAGE), code=USAGE_EXIT_CODE)
        elif not self._link.was_ever_up:
            self._fail(f"the orchestrator could not start: {why}")
        elif self._generation == GENERATION_MAX or not self._restarts.spend(time.monotonic()):
            self._fail(f"the orchestrator ended too often: {why}")
        else:
            self._start_orchestrator()
            self._log(f"the orchestrator is started again as generation {self._generation}")

    # ------------------------------------------------------------------ workers

    def _preload(self) -> None:
        """Import what workers need, once, before the first of them is forked."""
        self._is_preloaded = True
        try:
            with self._own_words(), self._signals.raising():
                preload.import_all(self._preload_names)
                if self._check is not None:
                    self._check()
        except Interrupted:
            pass  # the inbox has the signal too: the loop meets it next
        except preload.PreloadError as error:
            self._fail(str(error))
        except ValueError as error:
            self._fail(" ".join(str(error).split()), code=USAGE_EXIT_CODE)
        if (threads := preload.settle()) > 1:
            self._log(f"{threads} threads run after the imports: a worker may hang in what those held")

    def _own_words(self) -> AbstractContextManager[None]:
        """Programs that read the log want no line of another form; people want what is said at once."""
        if self._config.log_format == "text":
            return nullcontext()
        return collected(lambda lines: self._writer.write("agent", lines), self._config.log_line_bytes_max)

    def _on_start_worker(self, order: StartWorker) -> None:
        if self._is_stopping:
            return
        if order.role not in self._modules or order.role == ORCHESTRATOR:
            return self._refuse(order, f"no module for the role {order.role}")
        if order.epoch <= self._newest_epoch.get(order.worker_id, -1):
            return self._refuse(order, f"stale epoch {order.epoch}")
        is_replacement = self._was_ready and order.worker_id in self._newest_epoch
        self._newest_epoch[order.worker_id] = order.epoch
        for older in self._children.named(order.worker_id):
            self._end_child(older)
            if older.role == STORE:  # it has nothing to finish, and an address that its successor needs
                self._signal(older, signal.SIGKILL)
        try:
            child = self._start(order.worker_id, order.role, order.epoch, is_replacement=is_replacement)
        except OSError as error:
            return self._refuse(order, f"cannot be forked: {error.strerror}")
        self._link.send(WorkerStarted(worker_id=child.name, epoch=child.epoch, pid=child.pid))

    def _refuse(self, order: StartWorker, why: str) -> None:
        self._log(f"{order.worker_id} is not started: {why}")
        self._link.send(
            WorkerExited(
                worker_id=order.worker_id, epoch=order.epoch, pid=0, status="not started", detail=why
            )
        )

    def _on_signal_worker(self, order: SignalWorker) -> None:
        if order.signal not in signal.valid_signals():
            self._log(f"refused signal {order.signal} for {order.worker_id}: there is no such signal")
            return
        for child in self._children.named(order.worker_id):
            if child.epoch != order.epoch:
                continue
            if order.signal == signal.SIGTERM:
                self._end_child(child)
            else:
                self._signal(child, order.signal)

    def _start(self, name: str, role: Role, epoch: int, *, is_replacement: bool = False) -> Child:
        """Fork one worker; raises OSError."""
        boot = Boot(
            cluster=self._cluster,
            secret=self._secret,
            worker_id=name,
            role=role,
            epoch=epoch,
            model=self._model,
            config=self._config,
            engine_args=self._engine_args,
            threads=self._config.threads(role, self._cores) if role in ("attention", "expert") else 1,
            expert_memory=self._expert_memory if role == "expert" else None,
        )
        module = self._modules[role]
        computes = role in ("attention", "expert")
        polite = self._polite if is_replacement and computes else None
        return self._fork(name, role, epoch, lambda: importlib.import_module(module).main(boot), polite)

    def _fork(
        self,
        name: str,
        role: str,
        epoch: int,
        body: Callable[[], None],
        polite: Politeness | None = None,
        *,
        piped: bool = True,
    ) -> Child:
        release = partial(self._release, keeps_experts=role == "expert")
        pid, log_fd = process.fork_child(f"tarragon: {name}", body, release, polite, piped=piped)
        log = LogPipe(log_fd, self._config.log_line_bytes_max) if piped else None
        child = self._children[pid] = Child(name, role, epoch, pid, log)
        if log is not None:
            self._selector.register(log, selectors.EVENT_READ, lambda: self._on_log(child))
        return child

    def _release(self, *, keeps_experts: bool) -> None:
        """In a forked child: close what the agent owns, so that no object of it closes a reused number."""
        if self._expert_memory is not None and not keeps_experts:
            self._expert_memory.close()
        self._link.release()
        self._vault.release()
        for child in self._children.values():
            if child.log is not None:
                child.log.close()
        self._selector.close()
        self._signals.release()
        if self._starter_fd >= 0:
            os.close(self._starter_fd)

    def _on_log(self, child: Child) -> None:
        if child.log is None or not child.log.is_open:
            return
        self._writer.write(child.name, child.log.read(), child.epoch)
        if not child.log.is_open:
            self._selector.unregister(child.log)

    def _signal(self, child: Child, number: int) -> None:
        # Only this process reaps, so the pid of a child that is still in the table cannot be another's.
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)

    def _end_child(self, child: Child) -> None:
        """SIGTERM now, SIGKILL after the grace time."""
        self._signal(child, signal.SIGTERM)
        if child.kill_at_s is None:
            child.kill_at_s = time.monotonic() + self._config.shutdown_grace_s

    # ------------------------------------------------------------------ signals and ends

    def _on_signals(self) -> None:
        asked = [signal.Signals(number).name for number in self._signals.take() if number in STOP_SIGNALS]
        if asked and self._is_stopping:  # asked twice: no more grace
            for child in self._children.values():
                self._signal(child, signal.SIGKILL)
        elif asked:
            self._stop(asked[0])
        self._reap()

    def _on_starter_gone(self) -> None:
        self._selector.unregister(self._starter_fd)
        self._stop("the process that started this cluster has ended")

    def _reap(self) -> None:
        """Take note of every child that has ended. Orphans of dead workers are ours too (subreaper)."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            child = self._children.pop(ended.si_pid, None)
            if child is not None:
                # What it has forked ends too. It is not reaped yet, so its group's number is still its own.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)
            os.waitpid(ended.si_pid, 0)
            process.remove_openmp_mark(ended.si_pid)
            if child is not None:
                self._on_exit(child, ended.si_code, ended.si_status)

    def _on_exit(self, child: Child, code: int, status: int) -> None:
        words = process.exit_words(code, status)
        if child.role == CONSOLE:
            self._was_ready = self._was_ready or words == "exit code 0"
            return
        detail = self._close_log(child)
        why = f"{words}: {detail}" if detail else words
        if not self._is_stopping:
            self._log(f"{child.name} (pid {child.pid}) ended: {why}")
        if child.role == ORCHESTRATOR:
            self._on_orchestrator_exit(why)
            return
        self._link.send(
            WorkerExited(worker_id=child.name, epoch=child.epoch, pid=child.pid, status=words, detail=detail)
        )
        # Somebody's SIGKILL or SIGTERM says nothing about the worker; what it does by itself does.
        if not self._was_ready and words not in ("exit code 0", "killed by SIGKILL", "killed by SIGTERM"):
            self._start_failures[child.name] = self._start_failures.get(child.name, 0) + 1
            if self._start_failures[child.name] >= self._config.start_failures_max:
                self._fail(f"{child.name} could not start: {why}")

    def _close_log(self, child: Child) -> str:
        """Pass on an ended child's last words and return the one that names an error, if any."""
        if child.log is None:
            return ""
        if child.log.is_open:
            self._selector.unregister(child.log)
            self._writer.write(child.name, child.log.drain(), child.epoch)
        child.log.close()
        return child.log.last_error

    def _stop(self, reason: str, *, code: int = 0) -> None:
        """Begin the end: SIGTERM to all, SIGKILL to those that are left after the grace time."""
        if self._is_stopping:
            return
        if not self._failure:  # which is told at the very end
            self._log(f"stopping: {reason}")
        self._is_stopping = True
        self._exit_code = code
        for child in self._children.values():
            self._end_child(child)

    def _fail(self, why: str, *, code: int = 1) -> None:
        if not self._is_stopping:
            self._failure = why
            self._stop(why, code=code)

    def _leave_nothing(self) -> None:
        process.end_children()
        self._link.end()
        self._vault.close()
        if self._expert_memory is not None:
            self._expert_memory.close()
        self._selector.close()
        self._signals.close()
        if self._failure:
            print(f"tarragon: {self._failure}", file=sys.stderr)

    def _log(self, text: str) -> None:
        self._writer.write("agent", [text])
