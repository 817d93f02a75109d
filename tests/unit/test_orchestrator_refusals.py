"""What the orchestrator's transport refuses is in its status and its metrics, whoever it comes from."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from tarragon.boot import Boot
from tarragon.cluster import free_ports
from tarragon.config import Config
from tarragon.messages import Alive, Hello, encode_control
from tarragon.observability.metrics import exposition
from tarragon.orchestrator.line import Line
from tarragon.orchestrator.planning import ExpertShape
from tarragon.orchestrator.process import AGENT, Orchestrator
from tarragon.testing.ends import WAIT_S, async_pair, frame_bytes
from tarragon.transport.local import AsyncConnection, HandshakeError, dial_async


def boot() -> Boot:
    return Boot(
        cluster=secrets.token_hex(8),
        secret=secrets.token_bytes(32),
        worker_id="orchestrator",
        role="orchestrator",
        epoch=1 << 20,
        model="",
        config=Config(admin_port=free_ports(1)[0], connect_timeout_s=WAIT_S),
    )


async def call(at: Boot, secret: bytes | None = None) -> AsyncConnection:
    return await dial_async(
        at.orchestrator_address, secret or at.secret, timeout_s=WAIT_S, frame_bytes_max=1 << 20
    )


async def stranger(at: Boot) -> None:
    """Dial without the secret; the orchestrator may learn of it a little later."""
    with pytest.raises(HandshakeError):
        await call(at, b"another secret")


def test_strangers_and_malformed_messages_are_counted_by_reason() -> None:
    async def main() -> None:
        at = boot()
        orchestrator = Orchestrator(at, ExpertShape(layers=2, experts=4, expert_bytes=1_000), top_k=2)
        running = asyncio.ensure_future(orchestrator.run())

        def refused(reason: str) -> int:
            found: int = orchestrator.status()["refused"].get(reason, 0)
            return found

        agent = await call(at)
        await agent.send_control(
            Hello(worker_id=AGENT, role="orchestrator", epoch=at.epoch, pid=1, address="")
        )
        assert [refused(reason) for reason in ("handshake", "no_hello", "malformed_frame")] == [0, 0, 0]
        async with asyncio.timeout(WAIT_S):
            while refused("handshake") == 0:
                await stranger(at)
        rude = await call(at)
        await rude.send(b"\xff no message")
        assert await rude.recv() is None
        assert refused("no_hello") == 1
        await agent.send(b"\xff no message")
        assert await asyncio.wait_for(running, WAIT_S) == 0, "without an agent it ends"
        assert refused("malformed_frame") == 1
        page = exposition(orchestrator.status()).decode()
        for reason in ("no_hello", "malformed_frame"):
            assert f'tarragon_refused_total{{reason="{reason}"}} 1.0' in page
        assert f'tarragon_refused_total{{reason="handshake"}} {refused("handshake")}.0' in page
        for connection in (agent, rude):
            connection.close()

    asyncio.run(main())


def with_line(test: Callable[[Callable[[bytes], None], Line, Counter[str]], Awaitable[None]]) -> None:
    """Run ``test(send, line, refused)``; ``send`` writes to the line's other end, b"" closes it."""

    async def main() -> None:
        bare, connection = async_pair()
        refused: Counter[str] = Counter()
        line = Line(connection, 8, refused)

        def send(raw: bytes) -> None:
            if raw:
                bare.sendall(raw)
            else:
                bare.close()

        try:
            await asyncio.wait_for(test(send, line, refused), WAIT_S)
        finally:
            line.close()
            bare.close()

    asyncio.run(main())


GOOD = frame_bytes(encode_control(Alive()))


@pytest.mark.parametrize(
    "raw", [b"\xff" * 8, frame_bytes(b"\xff no message")], ids=["no frame", "no message"]
)
def test_a_line_that_brings_no_message_is_cut_and_counted(raw: bytes) -> None:
    async def test(send: Callable[[bytes], None], line: Line, refused: Counter[str]) -> None:
        send(GOOD + raw)
        assert await line.receive() == Alive()
        assert await line.receive() is None
        assert refused == {"malformed_frame": 1}
        assert line.cause.startswith("protocol error")

    with_line(test)


@pytest.mark.parametrize(("left", "count"), [(0, 0), (3, 1), (len(GOOD) - 1, 1)])
def test_a_line_that_ends_within_a_frame_is_counted(left: int, count: int) -> None:
    async def test(send: Callable[[bytes], None], line: Line, refused: Counter[str]) -> None:
        send(GOOD + GOOD[:left])
        send(b"")
        assert await line.receive() == Alive()
        assert await line.receive() is None
        assert refused["malformed_frame"] == count

    with_line(test)
