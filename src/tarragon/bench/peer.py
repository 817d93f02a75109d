"""Monolithic vLLM, at its defaults (compiled), as the peer to compare with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from tarragon.agent.process import die_with_parent

STARTUP_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MonolithicVllm:
    """vLLM's own API server with the same model on the same cores; a context manager.

    Raises RuntimeError with the end of its log when it does not come up.
    """

    def __init__(self, model: Path, *flags: str, kv_cache_bytes: int = 1 << 30) -> None:
        self.model, self.flags, self.kv_cache_bytes = model, flags, kv_cache_bytes
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.startup_s = 0.0

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        start = time.monotonic()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                f"--model={self.model}",
                "--served-model-name=model",
                f"--port={self.port}",
                "--host=127.0.0.1",
                f"--kv-cache-memory-bytes={self.kv_cache_bytes}",
                *self.flags,
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,  # a benchmark that is killed must not leave a server behind
            env={
                **os.environ,
                "VLLM_LOGGING_LEVEL": "WARNING",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        )
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() - start > STARTUP_TIMEOUT_S:
                self.__exit__(None, None, None)
                raise RuntimeError(f"vLLM did not come up:\n{self._tail}")
            time.sleep(0.2)
        self.startup_s = time.monotonic() - start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        if self._log.closed:
            return
        self._log.seek(0)
        self._tail = self._log.read()[-2000:].decode(errors="replace")
        self._log.close()

    def kill(self) -> None:
        """SIGKILL the server and its engine at once; it can be entered again afterwards."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self.__exit__(None, None, None)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False
