"""An attention worker without an engine: it speaks the gateway's protocol and makes up tokens.

Token ``i`` of a text depends on its prompt and seed only, so any two of these workers give the same text,
and one goes on behind the tokens that another has sent.
"""

from __future__ import annotations

import asyncio
import zlib
from contextlib import suppress

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats

from tarragon.gateway import wire
from tarragon.messages import ProbeAccepted, ProbeOpen
from tarragon.transport.local import AsyncConnection, AsyncServer, serve_async
from tarragon.transport.probe import ANSWER, PROBE_FRAME_BYTES, pack_probe, probe_open


def token(request: EngineCoreRequest, position: int, vocabulary: int) -> int:
    """Return token ``position`` of the text for ``request``: a number in ``range(3, vocabulary)``."""
    key = f"{request.prompt_token_ids} {request.sampling_params.seed} {position}"
    return 3 + zlib.crc32(key.encode()) % (vocabulary - 3)


class FakeAttention:
    """Serves one gateway at ``address``; ``step_s`` is the time between tokens of every request."""

    def __init__(
        self, worker_id: str, epoch: int, *, max_model_len: int, vocabulary: int, step_s: float = 0.002
    ) -> None:
        self.facts = wire.Facts(worker_id, epoch, max_model_len, num_gpu_blocks=100, block_size=16)
        self.vocabulary = vocabulary
        self.step_s = step_s
        self.added: list[wire.Add] = []
        self.aborted: dict[str, int] = {}
        self.attached: list[wire.Attach] = []
        self.frozen = False
        """While set, no tokens come; requests are taken all the same."""
        self.stopped = False
        """While set, probes are not answered either."""
        self.progress = 0
        """What probes are told."""
        self.probes = 0
        self.probers: list[AsyncConnection] = []
        self.connection: AsyncConnection | None = None
        self._codec = wire.Codec(wire.FROM_GATEWAY)
        self._running: dict[str, tuple[wire.Add, int]] = {}
        self._server: AsyncServer | None = None

    async def listen(self, address: str, secret: bytes) -> None:
        self._server = await serve_async(
            address, secret, self._serve, frame_bytes_max=1 << 24, handshake_timeout_s=5.0
        )

    def close(self) -> None:
        """Vanish, as a process that is killed does."""
        assert self._server is not None
        self._server.close()
        for connection in (self.connection, *self.probers):
            if connection is not None:
                connection.close()

    async def send(self, message: wire.Message) -> None:
        assert self.connection is not None
        await self.connection.send(self._codec.encode(message))

    async def _serve(self, connection: AsyncConnection) -> None:
        frame = await connection.recv()
        opened = None if frame is None else probe_open(frame)
        if opened is not None:
            with suppress(OSError):
                await self._answer_probes(connection, opened)
            return
        self.connection = connection
        steps = asyncio.get_running_loop().create_task(self._step_forever())
        try:
            while frame is not None:
                await self._take(self._codec.decode(frame))
                frame = await connection.recv()
        finally:
            steps.cancel()
            self._running.clear()

    async def _answer_probes(self, connection: AsyncConnection, opened: ProbeOpen) -> None:
        assert opened.receiver_epoch == self.facts.epoch
        self.probers.append(connection)
        await connection.send_control(ProbeAccepted(epoch=self.facts.epoch))
        loop = asyncio.get_running_loop()
        while raw := await loop.sock_recv(connection.sock, PROBE_FRAME_BYTES):
            self.probes += 1
            if not self.stopped:
                sequence = int.from_bytes(raw[16:24], "little")
                answer = pack_probe(ANSWER, self.facts.epoch, sequence, self.progress)
                await loop.sock_sendall(connection.sock, answer)

    async def _take(self, message: wire.Message) -> None:
        match message:
            case wire.Attach():
                self.attached.append(message)
                await self.send(self.facts)
            case wire.Add(request=request):
                self.added.append(message)
                self._running[request.request_id] = (message, len(message.sent))
            case wire.Hold(attempts=attempts):
                for request_id in attempts:
                    self._running.pop(request_id, None)
            case wire.Abort(attempts=attempts):
                self.aborted.update(attempts)
                for request_id in attempts:
                    self._running.pop(request_id, None)
            case wire.Utility(call_id=call_id):
                await self.send(wire.UtilityResult(call_id, result=True))

    async def _step_forever(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if self._running and not self.frozen:
                try:
                    await self.step()
                except OSError:
                    return

    async def step(self) -> None:
        """Send the next token of every request."""
        outputs = [self._next(add, position) for add, position in self._running.values()]
        attempts = {output.request_id: self._running[output.request_id][0].attempt for output in outputs}
        for output in outputs:
            add, position = self._running.pop(output.request_id)
            if output.finish_reason is None:
                self._running[output.request_id] = (add, position + 1)
        stats = SchedulerStats(num_running_reqs=len(self._running), kv_cache_usage=0.5)
        await self.send(wire.Outputs(attempts, EngineCoreOutputs(outputs=outputs, scheduler_stats=stats)))

    def _next(self, add: wire.Add, position: int) -> EngineCoreOutput:
        request = add.request
        last = position + 1 >= (request.sampling_params.max_tokens or 16)
        prompt_tokens = len(request.prompt_token_ids)
        return EngineCoreOutput(
            request.request_id,
            [token(request, position, self.vocabulary)],
            finish_reason=FinishReason.LENGTH if last else None,
            prefill_stats=PrefillStats(prompt_tokens, prompt_tokens) if position == len(add.sent) else None,
        )
