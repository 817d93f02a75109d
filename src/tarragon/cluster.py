"""A whole cluster as a Python object: started as its own process, and gone without a trace afterwards.

::

    with Cluster("demo", attention_workers=2, expert_workers=2) as cluster:
        httpx.post(f"{cluster.url}/v1/completions", json=...)
        cluster.kill("ew-0")
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from tarragon import config as config_module
from tarragon.admin import AdminClient, AdminError, base_url
from tarragon.agent.environment import STOP_WITH_PID

MARK: Final = "TARRAGON_CLUSTER_MARK"
"""Environment variable that every process of a cluster inherits, and nobody else has."""
_POLL_S: Final = 0.05
_EXIT_MARGIN_S: Final = 10.0
"""Beyond the grace time, before the node agent itself is killed."""
_GONE_TIMEOUT_S: Final = 5.0
"""Between the node agent's end and the last of its processes'."""
_LOG_TAIL_LINES: Final = 20
_PORTS: Final = range(10_000, 32_000)
"""Below the range of outgoing connections, 32768 to 60999 by default."""


class ClusterError(RuntimeError):
    """The cluster did not become ready, or left something behind; the text ends with its last log lines."""


class Cluster:
    """Runs ``tarragon serve`` in a session of its own on free ports; a context manager.

    ``model`` is a checkpoint's folder or the word "demo"; ``settings`` are
    fields of Config; ``engine_args`` are vLLM flags.
    """

    def __init__(
        self,
        model: str | Path,
        attention_workers: int = 2,
        expert_workers: int = 2,
        *,
        engine_args: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        ready_timeout_s: float = 600.0,
        **settings: Any,
    ) -> None:
        self._settings = {
            **dict(zip(("port", "admin_port"), free_ports(2), strict=True)),
            "attention_workers": attention_workers,
            "expert_workers": expert_workers,
            **{name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        }
        self._mark = secrets.token_hex(8)
        self._environ = {
            **os.environ,
            **(environ or {}),
            MARK: self._mark,
            STOP_WITH_PID: str(os.getpid()),
        }
        flags = [_flag(name, value) for name, value in self._settings.items()]
        self._command = [sys.executable, "-m", "tarragon", "serve", str(model), *flags, *engine_args]
        self._ready_timeout_s = ready_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._kept_logs = ""
        self.ready_line = ""

    # ------------------------------------------------------------------ addresses

    @property
    def url(self) -> str:
        """Base of the OpenAI-compatible API, without ``/v1``."""
        return base_url("127.0.0.1", int(self._settings["port"]), bool(self._settings.get("ssl_certfile")))

    @property
    def admin_url(self) -> str:
        is_tls = bool(self._settings.get("admin_ssl_certfile"))
        return base_url("127.0.0.1", int(self._settings["admin_port"]), is_tls)

    @property
    def admin(self) -> AdminClient:
        return AdminClient.of(config_module.load(None, self._environ, self._settings), self._environ)

    @property
    def agent_pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except ClusterError as left:
            if error is None:
                raise
            error.add_note(str(left))

    def start(self) -> None:
        """Start the cluster and wait until it is ready; raises ClusterError if it ends or takes too long."""
        self._process = self._launch()
        try:
            self._wait_ready(time.monotonic() + self._ready_timeout_s)
        except BaseException:
            with suppress(ClusterError):
                self.stop()
            raise

    def _launch(self) -> subprocess.Popen[bytes]:
        """Begin the first process; our own tests have a quicker way to."""
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._log,
            env=self._environ,
            start_new_session=True,
        )

    def _wait_ready(self, deadline_s: float) -> None:
        assert self._process is not None
        while True:
            lines = _text(self._out).splitlines(keepends=True)
            ready = [line for line in lines if line.startswith("ready:") and line.endswith("\n")]
            if ready:
                self.ready_line = ready[0].strip()
                return
            code = self._process.poll()
            if code is not None:
                raise ClusterError(
                    f"the cluster ended with exit code {code} before it was ready\n{self.log_tail()}"
                )
            if time.monotonic() > deadline_s:
                raise ClusterError(
                    f"the cluster was not ready after {self._ready_timeout_s:g} s\n{self.log_tail()}"
                )
            time.sleep(_POLL_S)

    def stop(self) -> int:
        """End the cluster as Ctrl-C does; return its exit code.

        Raises ClusterError if it had to be killed or if any process of it is
        left (which is then killed). Stopping twice is harmless.
        """
        if self._process is None or self._out.closed:
            return 0
        grace_s = float(self._settings.get("shutdown_grace_s", 5.0))
        faults = []
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(grace_s + _EXIT_MARGIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
            faults.append("the node agent did not end by itself")
        left = self._wait_gone(time.monotonic() + _GONE_TIMEOUT_S)
        if left:
            faults.append(f"processes are left: {left}")
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        tail = self.log_tail()
        self._kept_logs = self.logs()
        self._out.close()
        self._log.close()
        if faults:
            raise ClusterError(f"{'; '.join(faults)}\n{tail}")
        return code

    def _wait_gone(self, deadline_s: float) -> list[int]:
        while left := self.processes():
            if time.monotonic() > deadline_s:
                return left
            time.sleep(_POLL_S)
        return []

    # ------------------------------------------------------------------ what is asked of it

    def status(self) -> dict[str, Any]:
        """The contract of ``tarragon status --json``; raises AdminError."""
        return self.admin.status()

    def pids(self) -> dict[str, int]:
        """Map worker ids to pids; raises AdminError."""
        return {str(worker["id"]): int(worker["pid"]) for worker in self.status()["workers"]}

    def kill(self, worker_id: str, signal: str = "SIGKILL") -> None:
        """Send a signal to one worker through the admin API; raises AdminError."""
        self.admin.kill(worker_id, signal)

    def drain(self, worker_id: str) -> None:
        """Move one worker's work to the others, then stop it; returns at once. Raises AdminError."""
        self.admin.drain(worker_id)

    def add(self, role: str) -> str:
        """Start one more "attention" or "expert" worker; return its id. Raises AdminError."""
        return str(self.admin.add(role)["worker_id"])

    def wait_for(self, what: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until ``what`` ("full_capacity", "exact"...) is true in the status; return the status.

        Raises ClusterError after ``timeout_s``.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            with suppress(AdminError):
                status = self.status()
                if status.get(what):
                    return status
            if time.monotonic() > deadline_s:
                raise ClusterError(f"{what} was not true after {timeout_s:g} s\n{self.log_tail()}")
            time.sleep(_POLL_S)

    def logs(self) -> str:
        """What the cluster has written to stderr, workers' lines with their ids; also after its end."""
        return self._kept_logs if self._log.closed else _text(self._log)

    def log_tail(self) -> str:
        return "\n".join(self.logs().splitlines()[-_LOG_TAIL_LINES:])

    def processes(self) -> list[int]:
        """Pids of all living processes of this cluster, whoever their parent is (zombies do not live)."""
        mark = f"{MARK}={self._mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # it ended while we looked, or is another user's
                    if mark in (entry / "environ").read_bytes().split(b"\0") and not _is_zombie(entry):
                        found.append(int(entry.name))
        return sorted(found)


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback that are free now, of those that the system gives to nobody by itself.

    They are bound a while later, and until then an outgoing connection must not get one.
    """
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(_PORTS)
        if port not in found:
            with suppress(OSError), socket.create_server(("127.0.0.1", port)):
                found.append(port)
    return found


def _flag(name: str, value: Any) -> str:
    """The command-line flag that sets a setting."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"


def _is_zombie(folder: Path) -> bool:
    return (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"


def _text(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode("utf-8", "replace")
