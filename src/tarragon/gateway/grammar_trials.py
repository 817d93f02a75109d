"""Is a request's grammar one that can be compiled? Asked before vLLM, or a worker, sees it.

Verdicts are remembered, good and bad ones: who repeats a schema waits once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import socket
from collections import OrderedDict
from typing import Any, Final

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from tarragon.gateway.client import RequestFailed
from tarragon.gateway.grammar_zygote import Trial, Verdict, frame

VERDICTS_KEPT: Final = 1_024
VERDICT_BYTES_MAX: Final = 16 << 10
_FIELDS: Final = [field.name for field in dataclasses.fields(StructuredOutputsParams) if field.init]


class GrammarTrials:
    """The gateway's side; lives in its event loop."""

    def __init__(self, sock: socket.socket) -> None:
        """``sock`` leads to the zygote."""
        sock.setblocking(False)
        self._sock = sock
        self._numbers = itertools.count(1)
        self._kept: OrderedDict[bytes, str] = OrderedDict()
        self._waiting: dict[int, asyncio.Future[Verdict]] = {}
        self._lock = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        self._gone = False

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
        if self._reader is None:
            self._reader = asyncio.get_running_loop().create_task(self._read())
        number = next(self._numbers)
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            # Shielded: after half a frame the other side would understand no other.
            await asyncio.shield(self._send(frame(Trial(number, grammar))))
            return await future
        except OSError as error:
            raise RequestFailed("grammars cannot be tried: the gateway's helper process is gone") from error
        finally:
            self._waiting.pop(number, None)

    async def _send(self, raw: bytes) -> None:
        async with self._lock:
            if self._gone:
                raise ConnectionResetError
            await asyncio.get_running_loop().sock_sendall(self._sock, raw)

    async def _read(self) -> None:
        """Hand verdicts to those who wait for them, until the zygote is gone."""
        loop = asyncio.get_running_loop()
        data = b""
        while True:
            try:
                chunk = await loop.sock_recv(self._sock, VERDICT_BYTES_MAX)
            except OSError:
                chunk = b""
            if not chunk:
                break
            data += chunk
            while len(data) >= 4 and len(data) >= (end := 4 + int.from_bytes(data[:4], "little")):
                verdict = msgspec.json.decode(data[4:end], type=Verdict)
                data = data[end:]
                future = self._waiting.get(verdict.number)
                if future is not None and not future.done():
                    future.set_result(verdict)
        self._gone = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError())
