"""A process that tries grammars in children of its own, each with a bound on its time and memory.

Compiling a schema or a regular expression is work of a native library that nothing can interrupt: some
grammars of a few bytes take hours. In a worker, that would take a core from everybody's tokens; in the
gateway, which parses them first, it would stop every stream. So each is tried here before.

This process has one thread and forks once per grammar. A child leaves its verdict in its exit code and a
pipe; the kernel ends one that takes too much. Who takes over when this process dies: grammar_standby.py.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, NoReturn, Protocol

import msgspec

from tarragon.agent.process import die_with_parent
from tarragon.config import GRAMMAR_REASON_BYTES_MAX, GRAMMAR_SIGN_INTERVAL_S, Config

TRIALS_AT_ONCE: Final = 2
"""Further ones wait in the socket."""
SIGN_OF_LIFE: Final = 0


class Trial(msgspec.Struct):
    """Gateway -> zygote, as JSON in a frame of its length (u32, little endian)."""

    number: int
    grammar: dict[str, Any]
    """Fields of vLLM's StructuredOutputsParams."""


class Verdict(msgspec.Struct):
    """Zygote -> gateway, in the same form. ``reason`` is "" for a grammar that compiles."""

    number: int
    """Of the trial; SIGN_OF_LIFE while trials run that have no verdict yet."""
    reason: str = ""
    overdue: bool = False
    """The host was too busy to say."""


class _Child(NamedTuple):
    number: int
    pid: int
    pidfd: int
    pipe: int
    deadline_s: float

    def close(self) -> None:
        """Close what this process holds of it."""
        os.close(self.pidfd)
        os.close(self.pipe)


Compile = Callable[[dict[str, Any]], None]
"""Compiles a grammar; raises an exception whose text says why it cannot be."""


def die_with(parent: int) -> None:
    """Be killed when ``parent``, which has forked this process, ends."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(0)


class Standby(Protocol):
    """A process that has to be there, and is forked anew by ``renew`` where it is not."""

    pidfd: int

    def renew(self) -> None: ...


class Zygote:
    """The loop of the process."""

    def __init__(
        self,
        sock: socket.socket,
        config: Config,
        make_compiler: Callable[[], Compile],
        standby: Standby,
    ) -> None:
        self._sock = sock
        self._standby = standby
        self._config = config
        self._make_compiler = make_compiler
        self._compile: Compile | None = None
        self._children: list[_Child] = []

    def run(self) -> None:
        """Serve until the gateway closes its end."""
        try:
            self._serve()
        finally:
            for child in self._children:
                child.close()

    def _serve(self) -> None:
        while True:
            self._wait()
            self._standby.renew()
            if self._children:
                send_frame(self._sock, Verdict(SIGN_OF_LIFE))
            for child in list(self._children):
                self._look_at(child)
            if len(self._children) < TRIALS_AT_ONCE and _is_readable(self._sock):
                raw = _recv_frame(self._sock)
                if raw is None:
                    return
                self._start(msgspec.json.decode(raw, type=Trial))

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._standby.pidfd, select.POLLIN)
        if len(self._children) < TRIALS_AT_ONCE:
            poll.register(self._sock, select.POLLIN)
        for child in self._children:
            poll.register(child.pidfd, select.POLLIN)
        poll.poll(GRAMMAR_SIGN_INTERVAL_S * 1e3 if self._children else None)

    def _start(self, trial: Trial) -> None:
        if self._compile is None:
            self._compile = self._make_compiler()
        read_end, write_end = os.pipe()
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            die_with(zygote)
            self._sock.close()
            _try(self._compile, trial.grammar, self._config, write_end)
        os.close(write_end)
        deadline_s = time.monotonic() + self._config.grammar_compile_timeout_s
        self._children.append(_Child(trial.number, pid, os.pidfd_open(pid), read_end, deadline_s))

    def _look_at(self, child: _Child) -> None:
        overdue = child.deadline_s <= time.monotonic()
        if overdue:
            os.kill(child.pid, signal.SIGKILL)
        pid, status = os.waitpid(child.pid, 0 if overdue else os.WNOHANG)
        if pid == 0:
            return
        self._children.remove(child)
        reason = os.read(child.pipe, GRAMMAR_REASON_BYTES_MAX).decode("utf-8", "replace")
        child.close()
        if status and not reason:
            reason = (
                f"the grammar takes more than {self._config.grammar_compile_cpu_s_max} s of computing time "
                f"or {self._config.grammar_memory_bytes_max >> 20} MiB of memory to compile: make it simpler"
            )
        send_frame(self._sock, Verdict(child.number, reason, overdue))


def _try(compile_: Compile, grammar: dict[str, Any], config: Config, pipe: int) -> NoReturn:
    """In a child: compile within bounds, say what is wrong with the grammar, and end."""
    try:
        cpu_s = config.grammar_compile_cpu_s_max
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        with open("/proc/self/statm") as file:
            used_bytes = int(file.read().split()[0]) * resource.getpagesize()
        memory_bytes = used_bytes + config.grammar_memory_bytes_max
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # what the native library has to say when it fails
            os.dup2(null, descriptor)
        compile_(grammar)
    except MemoryError:
        os._exit(1)
    except BaseException as error:
        os.write(pipe, (str(error) or type(error).__name__).encode()[:GRAMMAR_REASON_BYTES_MAX])
        os._exit(1)
    os._exit(0)


def _is_readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def send_frame(sock: socket.socket, message: Trial | Verdict) -> None:
    sock.sendall(frame(message))


def frame(message: Trial | Verdict) -> bytes:
    raw = msgspec.json.encode(message)
    return len(raw).to_bytes(4, "little") + raw


def _recv_frame(sock: socket.socket) -> bytes | None:
    """The next frame; None at the end."""
    head = _recv_all(sock, 4)
    return None if head is None else _recv_all(sock, int.from_bytes(head, "little"))


def _recv_all(sock: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        if not chunk:
            return None
        data += chunk
    return data


def vllm_compiler(vllm_config: Any) -> Compile:
    """Compile as the attention workers do, with the model's tokenizer and the configured backend."""
    from types import SimpleNamespace

    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output.request import StructuredOutputRequest

    from tarragon.attention.grammars import FIRST_CHOICE, Grammars, compile_with

    grammars = Grammars(vllm_config)
    grammars.backend_of(FIRST_CHOICE)  # made once, here; another backend is made by each child that needs it

    def compile_(grammar: dict[str, Any]) -> None:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**grammar))
        params._validate_structured_outputs(
            vllm_config.model_config, vllm_config.structured_outputs_config, grammars.tokenizer
        )
        structured = StructuredOutputRequest.from_sampling_params(params)
        request = SimpleNamespace(sampling_params=params, structured_output_request=structured)
        compile_with(grammars.backend_of(params.structured_outputs._backend), request)

    return compile_
