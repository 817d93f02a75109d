"""Monolithic vLLM, at its defaults (compiled), as the peer to compare with."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tarragon.agent.process import die_with_parent

STARTUP_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
_LOG_BYTES: Final = 20_000
_ERROR: Final = re.compile(r"(?:\b\w*(?:Error|Exception): |Value error, )(?P<what>.*?)(?: \[type=.*)?$")
_OF_THE_PARENT: Final = "Engine core initialization failed"
"""What a server says when its engine's process has ended: the cause stands before it."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PeerError(RuntimeError):
    """vLLM does not come up; the first line is a sentence."""


def cause(log: str) -> str:
    """What the last error in a log says; without any, its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [found["what"] for line in lines if (found := _ERROR.search(line))]
    wanted = [what for what in named if _OF_THE_PARENT not in what]
    return (wanted or named or lines or ["its log is empty"])[-1][:300]


class MonolithicVllm:
    """vLLM's own API server with the same model on the same cores; a context manager.

    Raises PeerError when it does not come up: a sentence, and after it the end of its log.
    """

    model_name: Final = "model"

    def __init__(
        self,
        model: Path,
        *flags: str,
        kv_cache_bytes: int = 1 << 30,
        environ: Mapping[str, str] | None = None,
        startup_timeout_s: float = STARTUP_TIMEOUT_S,
    ) -> None:
        self._startup_timeout_s = startup_timeout_s
        self.model, self.flags, self.kv_cache_bytes = model, flags, kv_cache_bytes
        self._environ = dict(environ or {})
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        """Base of the OpenAI-compatible API, without ``/v1``."""
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
                f"--served-model-name={self.model_name}",
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
                **self._environ,
            },
        )
        while not self._healthy():
            ended, late = self._process.poll() is not None, time.monotonic() - start > self._startup_timeout_s
            if ended or late:
                self.__exit__(None, None, None)
                why = f": {cause(self._tail)}" if ended else f" within {self._startup_timeout_s:g} s"
                raise PeerError(f"vLLM did not come up{why}\n{self._tail}")
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
        self._tail = self._log.read()[-_LOG_BYTES:].decode(errors="replace")
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
