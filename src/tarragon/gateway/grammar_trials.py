"""Is a request's grammar one that can be compiled? Asked before vLLM, or a worker, sees it.

Verdicts are remembered, good and bad ones: who repeats a schema waits once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import os
import signal
import socket
import time
from collections import OrderedDict
from contextlib import suppress
from typing import Any, Final

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from tarragon.config import GRAMMAR_HELPERS_TRIED_MAX, GRAMMAR_VERDICT_BYTES_MAX
from tarragon.gateway.client import RequestFailed
from tarragon.gateway.grammar_zygote import Trial, Verdict, frame
from tarragon.transport.sockets import check_same_user

VERDICTS_KEPT: Final = 1_024
_FIELDS: Final = [field.name for field in dataclasses.fields(StructuredOutputsParams) if field.init]


class GrammarTrials:
    """The gateway's side; lives in its event loop."""

    def __init__(self, door: socket.socket, silence_s_max: float) -> None:
        """Through ``door`` each process that begins to try grammars sends the socket that leads to it.

        One that is asked and says nothing for ``silence_s_max`` is killed.
        """
        door.setblocking(False)
        self._door = door
        self._sock = socket.socket()  # until the first is needed
        self._numbers = itertools.count(1)
        self._kept: OrderedDict[bytes, str] = OrderedDict()
        self._waiting: dict[int, asyncio.Future[Verdict]] = {}
        self._lock = asyncio.Lock()
        self._silence_s_max = silence_s_max
        self._heard_s = 0.0
        """When the one that serves gave a sign of life last, on the monotonic clock."""
        self._reader: asyncio.Task[None] | None = None

    async def check(self, params: Any) -> None:
        """Return if the request has no grammar, or one that compiles within the bounds.

        Raises VLLMValidationError (400) if it does not, RequestFailed (503) if nobody can say.
        """
        structured = getattr(params, "structured_outputs", None)
        if structured is None or structured.json_object or structured.all_constraints_none():
            return
        grammar = {name: getattr(structured, name) for name in _FIELDS}
        key = hashlib.sha256(msgspec.json.encode(grammar)).digest()
        if key not in self._kept:
            verdict = await self._ask(grammar)
            if verdict.overdue:
                raise RequestFailed("this host was too busy to try the request's grammar in time")
            self._kept[key] = verdict.reason
            if len(self._kept) > VERDICTS_KEPT:
                self._kept.popitem(last=False)
        if reason := self._kept[key]:
            raise VLLMValidationError(reason)

    async def _ask(self, grammar: dict[str, Any]) -> Verdict:
        """Ask whoever tries grammars now, and its standby if it dies over that. Raises RequestFailed."""
        for _ in range(GRAMMAR_HELPERS_TRIED_MAX):
            with suppress(ConnectionError):
                return await self._ask_once(grammar)
        raise RequestFailed("grammars cannot be tried: the gateway's helper processes are gone")

    async def _ask_once(self, grammar: dict[str, Any]) -> Verdict:
        # Shielded: after half a frame the other side would understand no other.
        future = await asyncio.shield(self._send(Trial(next(self._numbers), grammar)))
        while not (await asyncio.wait([future], timeout=self._silence_s_max))[0]:
            if time.monotonic() - self._heard_s >= self._silence_s_max:
                self._end_helper()
        return future.result()

    async def _send(self, trial: Trial) -> asyncio.Future[Verdict]:
        """Return what its verdict will be in; raises ConnectionError if whoever would give it is gone."""
        loop = asyncio.get_running_loop()
        async with self._lock:
            if self._reader is None or self._reader.done():
                self._sock.close()
                self._sock = await self._next_helper()
                self._reader = loop.create_task(self._read(self._sock))
            if not self._waiting:
                self._heard_s = time.monotonic()  # it had nothing to say
            future = self._waiting[trial.number] = loop.create_future()
            try:
                await loop.sock_sendall(self._sock, frame(trial))
            except ConnectionError:
                await self._reader  # which meets the end too
                raise
            return future

    def _end_helper(self) -> None:
        """Kill who says nothing; its standby has waited for that."""
        with suppress(ProcessLookupError):
            os.kill(check_same_user(self._sock), signal.SIGKILL)

    async def _next_helper(self) -> socket.socket:
        """The socket of the last one that has begun to serve; raises ConnectionError if nobody is left."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._door, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._door)
        newest = socket.socket()
        with suppress(BlockingIOError):
            while descriptors := socket.recv_fds(self._door, 1, 1)[1]:
                newest.close()  # its process has been succeeded already
                newest = socket.socket(fileno=descriptors[0])
            raise ConnectionResetError("all helpers have ended")
        newest.setblocking(False)
        return newest

    async def _read(self, sock: socket.socket) -> None:
        """Hand verdicts to those who wait for them, until their giver is gone."""
        loop = asyncio.get_running_loop()
        data = b""
        while True:
            try:
                chunk = await loop.sock_recv(sock, GRAMMAR_VERDICT_BYTES_MAX)
            except OSError:
                chunk = b""
            if not chunk:
                break
            self._heard_s = time.monotonic()
            data += chunk
            while len(data) >= 4 and len(data) >= (end := 4 + int.from_bytes(data[:4], "little")):
                verdict = msgspec.json.decode(data[4:end], type=Verdict)
                data = data[end:]
                future = self._waiting.pop(verdict.number, None)
                if future is not None and not future.done():
                    future.set_result(verdict)
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError())
