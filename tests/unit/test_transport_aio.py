"""The asyncio twins, against blocking ends and each other, on both event loops that are in use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from tarragon.messages import ProtocolError, Stop
from tarragon.testing.ends import (
    AT_ONCE_S,
    FRAME_BYTES_MAX,
    SECRET,
    WAIT_S,
    async_pair,
    call,
    call_async,
    echo,
    frame_bytes,
    listen,
    new_address,
    no_descriptor_left,
    no_leak,
    process,
    serving,
)
from tarragon.transport.local import (
    AsyncConnection,
    AsyncServer,
    HandshakeError,
    serve_async,
)

# A socket that only the garbage collector closes is a fault, even if its number is free again by then.
pytestmark = pytest.mark.filterwarnings("error::ResourceWarning")

Run = Callable[[Coroutine[None, None, None]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine to its end; nothing may be left open once its loop is closed."""

    def run_bounded(coroutine: Coroutine[None, None, None]) -> None:
        with no_leak(), asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(coroutine, 3 * WAIT_S))

    with asyncio.Runner(loop_factory=request.param) as first:
        first.run(asyncio.sleep(0))  # libuv keeps a descriptor of its own from its first loop on
    return run_bounded


async def refusals(server: AsyncServer, count: int) -> None:
    """Wait for the server to have refused ``count`` dialers."""
    while server.refused != count:  # noqa: ASYNC110 (a plain counter on purpose)
        await asyncio.sleep(0.001)


def test_frames_of_any_size_come_back_whole(run: Run) -> None:
    async def body() -> None:
        async with serving() as (address, server):
            connection = await call_async(address)
            assert connection.peer_pid == os.getpid()
            for payload in (b"", b"x", os.urandom(FRAME_BYTES_MAX)):
                await connection.send(payload)
                assert await connection.recv() == payload
            await connection.send([b"many"] * 2_000)
            assert await connection.recv() == b"many" * 2_000
            await connection.send_control(Stop(reason="enough"))
            assert await connection.recv_control() == Stop(reason="enough")
            with pytest.raises(ProtocolError, match="at most"):
                await connection.send(bytes(FRAME_BYTES_MAX + 1))
            connection.close()
            assert server.refused == 0

    run(body())


def test_blocking_and_async_ends_understand_each_other(run: Run) -> None:
    def talk(address: str) -> bytes | None:
        with call(address) as connection:
            connection.send(b"from a thread")
            return connection.recv(WAIT_S)

    async def body() -> None:
        async with serving() as (address, _):
            assert await asyncio.to_thread(talk, address) == b"from a thread"
        with contextlib.closing(listen(address := new_address())) as listener:
            accepting = asyncio.create_task(asyncio.to_thread(listener.accept, WAIT_S))
            dialler = await call_async(address)
            accepted = await accepting
            accepted.send(b"to the loop")
            assert await dialler.recv() == b"to the loop"
            dialler.close()
            assert await asyncio.to_thread(accepted.recv, WAIT_S) is None
            accepted.close()

    run(body())


def test_a_receive_that_is_cancelled_loses_nothing(run: Run) -> None:
    async def body() -> None:
        bare, connection = async_pair()
        wire = frame_bytes(b"payload")
        for place in range(len(wire)):
            receiving = asyncio.create_task(connection.recv())
            await asyncio.sleep(0)
            bare.send(wire[place : place + 1])
            await asyncio.sleep(0.001)
            if place < len(wire) - 1:
                receiving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await receiving
        assert await receiving == b"payload"
        bare.close()
        assert await connection.recv() is None
        assert connection.torn == 0
        connection.close()

    run(body())


def test_tasks_that_send_at_once_do_not_mix_their_frames(run: Run) -> None:
    async def body() -> None:
        async with serving() as (address, _):
            connection = await call_async(address)
            letters = [bytes([65 + number]) for number in range(20)]
            async with asyncio.TaskGroup() as group:
                for letter in letters:
                    group.create_task(connection.send(letter * 300_000))
                frames = sorted([await connection.recv() or b"" for _ in letters])
            assert frames == [letter * 300_000 for letter in letters]
            connection.close()

    run(body())


def test_a_peer_that_never_pauses_leaves_time_for_other_tasks(run: Run) -> None:
    async def body() -> None:
        bare, connection = async_pair()
        wire = frame_bytes(b"x")
        bare.send(wire * 200)
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(others())
        await asyncio.sleep(0)
        for _ in range(200):
            assert await connection.recv() == b"x"
        assert turns >= 5
        other.cancel()
        bare.close()
        connection.close()

    run(body())


@pytest.mark.parametrize("cut", [0, 3, 8, 10])
def test_the_end_of_file_is_none_and_half_a_frame_is_counted(run: Run, cut: int) -> None:
    async def body() -> None:
        bare, connection = async_pair()
        receiving = asyncio.create_task(connection.recv())
        await asyncio.sleep(0)
        bare.send(frame_bytes(b"payload")[:cut])
        bare.close()
        assert await receiving is None
        assert connection.torn == (cut > 0)
        with pytest.raises(ConnectionError):
            await connection.send(b"late")
        connection.close()

    run(body())


def test_closing_wakes_the_tasks_that_wait(run: Run) -> None:
    async def body() -> None:
        bare, connection = async_pair()
        receiving = asyncio.create_task(connection.recv())
        sending = asyncio.create_task(connection.send(bytes(FRAME_BYTES_MAX)))
        await asyncio.sleep(0.01)
        connection.close()
        connection.close()
        assert await receiving is None
        with pytest.raises(ConnectionError):
            await sending
        assert await connection.recv() is None
        with pytest.raises(ConnectionError):
            await connection.send(b"late")
        bare.close()

    run(body())


def test_a_stopped_peer_does_not_block_a_send_for_ever(run: Run) -> None:
    async def body() -> None:
        bare, connection = async_pair(send_timeout_s=0.1)
        with pytest.raises(ConnectionError, match="took no frame"):
            await connection.send(bytes(FRAME_BYTES_MAX))
        assert await connection.recv() is None
        bare.close()
        connection.close()

    run(body())


def test_a_send_cancelled_in_mid_frame_ends_the_connection(run: Run) -> None:
    async def body() -> None:
        bare, connection = async_pair()
        sending = asyncio.create_task(connection.send(bytes(FRAME_BYTES_MAX)))
        await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(ConnectionError):
            await connection.send(b"would be read as part of the first")
        bare.close()
        connection.close()

    run(body())


def accept_then_sleep(address: str) -> None:
    listen(address).accept(WAIT_S).send(b"here")
    time.sleep(60)


def test_a_killed_peer_is_an_end_of_file_at_once(run: Run) -> None:
    async def body() -> None:
        with process(accept_then_sleep, address := new_address()) as child:
            connection = await call_async(address)
            assert await connection.recv() == b"here"
            receiving = asyncio.create_task(connection.recv())
            await asyncio.sleep(0.05)
            child.kill()
            killed_s = time.monotonic()
            assert await receiving is None
            assert time.monotonic() - killed_s < AT_ONCE_S
            connection.close()

    run(body())


# ------------------------------------------------------------------ dialling and serving


def test_dialling_waits_and_gives_up(run: Run) -> None:
    async def body() -> None:
        with pytest.raises(TimeoutError, match="nobody listens"):
            await call_async(new_address(), timeout_s=0.05)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(address := new_address())
            silent.listen(1)
            with pytest.raises(TimeoutError):
                await call_async(address, timeout_s=0.05)
        dialling = asyncio.create_task(call_async(address))
        await asyncio.sleep(0.05)
        with contextlib.closing(listen(address)) as listener:
            (await asyncio.to_thread(listener.accept, WAIT_S)).close()
            (await dialling).close()

    run(body())


def test_another_secret_is_refused_on_both_sides(run: Run) -> None:
    async def body() -> None:
        async with serving() as (address, server):
            with pytest.raises(HandshakeError, match="secret"):
                await call_async(address, secret=b"w" * 32)
            await refusals(server, 1)
            (await call_async(address)).close()

    run(body())


def test_slow_and_silent_dialers_delay_nobody_and_are_cut(run: Run) -> None:
    async def body() -> None:
        async with serving(handshake_timeout_s=2.0) as (address, server):
            strangers = [socket.socket(socket.AF_UNIX) for _ in range(10)]
            for stranger in strangers:
                stranger.connect(address)
                stranger.send(b"T")
            began_s = time.monotonic()
            friend = await call_async(address)
            await friend.send(b"first")
            assert await friend.recv() == b"first"
            assert time.monotonic() - began_s < 1.5, "it waited for a stranger to be cut"
            await refusals(server, len(strangers))
            for stranger in strangers:
                assert await asyncio.to_thread(stranger.recv, 1) == b""
                stranger.close()
            friend.close()

    run(body())


def test_a_crowd_of_strangers_is_bounded(run: Run) -> None:
    async def body() -> None:
        async with serving() as (address, server):
            strangers = [socket.socket(socket.AF_UNIX) for _ in range(70)]
            for stranger in strangers:
                stranger.setblocking(False)
                stranger.connect(address)
            await refusals(server, 6)  # HANDSHAKES_PENDING_MAX of them may wait
            for stranger in strangers:
                stranger.close()
            await refusals(server, 70)

    run(body())


def test_a_server_without_descriptors_lets_dialers_wait(run: Run) -> None:
    async def body() -> None:
        async with serving() as (address, server):
            dialer = socket.socket(socket.AF_UNIX)
            with no_descriptor_left():
                dialer.connect(address)
                await asyncio.sleep(0.2)
            assert server.refused == 0
            dialer.close()
            await refusals(server, 1)  # it was not forgotten

    run(body())


def test_a_handler_that_fails_is_reported_and_its_connection_closed(run: Run) -> None:
    async def fail(connection: AsyncConnection) -> None:
        raise RuntimeError("on purpose")

    async def body() -> None:
        reported: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
        async with serving(fail) as (address, _):
            connection = await call_async(address)
            assert await connection.recv() is None
            connection.close()
            (await call_async(address)).close()  # the server goes on
        assert [str(error) for error in reported][:1] == ["on purpose"]

    run(body())


def test_closing_the_server_ends_its_handlers_and_frees_the_address(run: Run) -> None:
    async def body() -> None:
        async with serving() as (address, _):
            connection = await call_async(address)
            await connection.send(b"ping")
            assert await connection.recv() == b"ping"
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(address)
        assert await connection.recv() is None
        with pytest.raises(ConnectionResetError):  # it was never accepted
            stranger.recv(1)
        stranger.close()
        connection.close()
        listen(address).close()

    run(body())


@pytest.mark.parametrize("turns", range(4))
def test_a_server_closed_at_any_moment_of_an_accept_leaves_nothing(run: Run, turns: int) -> None:
    async def body() -> None:
        async with serving() as (address, _):
            dialer = socket.socket(socket.AF_UNIX)
            dialer.connect(address)
            for _ in range(turns):
                await asyncio.sleep(0)
        with contextlib.suppress(ConnectionResetError):
            assert dialer.recv(1) == b""
        dialer.close()

    run(body())


def test_an_unusable_secret_or_address_is_the_callers_fault(run: Run) -> None:
    async def body() -> None:
        for address, secret in ((new_address(), b""), ("file", SECRET)):
            with pytest.raises(ValueError, match=r"empty|abstract"):
                await call_async(address, secret=secret)
            with pytest.raises(ValueError, match=r"empty|abstract"):
                await serve_async(address, secret, echo, frame_bytes_max=1, handshake_timeout_s=1.0)

    run(body())
