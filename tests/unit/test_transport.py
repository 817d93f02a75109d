"""Blocking connections between real processes: delivery, ends, time-outs, descriptors, leaks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time

import numpy as np
import pytest

from tarragon.messages import ProtocolError, Stop
from tarragon.testing.ends import (
    AT_ONCE_S,
    FRAME_BYTES_MAX,
    WAIT_S,
    call,
    connected,
    connection_pair,
    frame_bytes,
    listen,
    new_address,
    no_descriptor_left,
    no_leak,
    open_descriptors,
    process,
    raw_pair,
    thread,
)
from tarragon.transport.local import Connection, HandshakeError

pytestmark = pytest.mark.filterwarnings("error::ResourceWarning")

# ------------------------------------------------------------------ delivery


@no_leak()
def test_frames_arrive_whole_and_in_order() -> None:
    with connected() as (dialer, accepted):
        dialer.send(b"one")
        dialer.send(b"")
        dialer.send([b"two", memoryview(b"-"), b"", memoryview(bytearray(b"parts"))])
        dialer.send_control(Stop(reason="enough"))
        accepted.send(b"answer")
        assert [accepted.recv(WAIT_S) for _ in range(3)] == [b"one", b"", b"two-parts"]
        assert accepted.recv_control(WAIT_S) == Stop(reason="enough")
        assert dialer.recv(WAIT_S) == b"answer"
        assert dialer.peer_pid == accepted.peer_pid == os.getpid()


def test_a_frame_larger_than_the_socket_buffer_arrives() -> None:
    parts = [os.urandom(1_000) for _ in range(1_040)]  # more buffers than one system call takes
    with connected() as (dialer, accepted), thread(lambda: dialer.send(parts)):
        assert accepted.recv(WAIT_S) == b"".join(parts)


def test_arrays_of_numbers_are_sent_as_their_bytes() -> None:
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    with connected() as (dialer, accepted):
        dialer.send([b"head", memoryview(rows)])
        assert accepted.recv(WAIT_S) == b"head" + rows.tobytes()


def test_a_frame_beyond_the_bound_is_not_sent() -> None:
    with connected() as (dialer, accepted):
        with pytest.raises(ProtocolError, match="at most"):
            dialer.send([bytes(FRAME_BYTES_MAX), b"x"])
        dialer.send(b"fits")
        assert accepted.recv(WAIT_S) == b"fits"


def test_threads_that_send_at_once_do_not_mix_their_frames() -> None:
    with connected() as (dialer, accepted):

        def send_many(letter: bytes) -> None:
            for _ in range(20):
                dialer.send(letter * 100_000)

        with thread(lambda: send_many(b"a")), thread(lambda: send_many(b"b")):
            frames = sorted(accepted.recv(WAIT_S) or b"" for _ in range(40))
    assert frames == [b"a" * 100_000] * 20 + [b"b" * 100_000] * 20


# ------------------------------------------------------------------ dialling and listening


def test_an_address_leaves_no_file_and_is_free_again_after_close() -> None:
    address = new_address()
    for _ in range(2):
        listen(address).close()
    with contextlib.closing(listen(address)), pytest.raises(OSError, match="in use"):
        listen(address)


def test_an_address_that_would_leave_a_file_is_refused() -> None:
    for connect in (listen, call):
        with pytest.raises(ValueError, match="abstract"):
            connect("tarragon-test-socket")
    assert not os.path.exists("tarragon-test-socket")


def test_descriptors_do_not_survive_exec() -> None:
    with connected() as ends, contextlib.closing(listen(new_address())) as listener:
        for end in (*ends, listener):
            assert fcntl.fcntl(end.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@no_leak()
def test_dial_waits_for_the_listener_to_exist() -> None:
    address = new_address()
    with thread(lambda: call(address).close()) as dialled:
        time.sleep(0.1)
        with contextlib.closing(listen(address)) as listener:
            listener.accept(WAIT_S).close()
    assert dialled.error is None


@no_leak()
def test_dial_gives_up_where_nobody_listens() -> None:
    with pytest.raises(TimeoutError, match="nobody listens"):
        call(new_address(), timeout_s=0.1)


@no_leak()
def test_dial_gives_up_on_a_listener_that_never_answers() -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(address := new_address())
        silent.listen(1)
        with pytest.raises(TimeoutError):
            call(address, timeout_s=0.1)


@no_leak()
def test_dial_gives_up_on_a_listener_whose_queue_is_full() -> None:
    with socket.socket(socket.AF_UNIX) as silent, contextlib.ExitStack() as waiting:
        silent.bind(address := new_address())
        silent.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = waiting.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(address)
        with pytest.raises(TimeoutError):
            call(address, timeout_s=0.1)


@no_leak()
def test_a_closed_listener_wakes_the_threads_that_wait() -> None:
    listener = listen(new_address())
    with pytest.raises(TimeoutError):
        listener.accept(0.05)
    with thread(listener.accept) as one, thread(listener.accept) as two:
        time.sleep(0.05)
        listener.close()
    assert isinstance(one.error, ConnectionAbortedError)
    assert isinstance(two.error, ConnectionAbortedError)


def test_several_threads_may_accept() -> None:
    listener = listen(address := new_address())
    with thread(lambda: listener.accept(WAIT_S)) as one, thread(lambda: listener.accept(WAIT_S)) as two:
        dialers = [call(address) for _ in range(2)]
    for number, dialer in enumerate(dialers):
        dialer.send(b"%d" % number)
    accepted = [end for end in (one.value, two.value) if isinstance(end, Connection)]
    assert sorted(end.recv(WAIT_S) or b"" for end in accepted) == [b"0", b"1"]
    for end in (*dialers, *accepted, listener):
        end.close()


def test_the_listener_is_readable_when_a_dialer_comes() -> None:
    with contextlib.closing(listen(address := new_address())) as listener:
        poll = select.poll()
        poll.register(listener.fileno(), select.POLLIN)
        assert poll.poll(0) == []
        with thread(lambda: call(address).close()):
            assert poll.poll(WAIT_S * 1e3)
            listener.accept(WAIT_S).close()


@no_leak()
def test_a_listener_without_descriptors_lets_dialers_wait() -> None:
    with contextlib.closing(listen(address := new_address())) as listener:
        dialer = socket.socket(socket.AF_UNIX)
        dialer.connect(address)
        with no_descriptor_left(), pytest.raises(TimeoutError):
            listener.accept(0.2)
        dialer.send(b"not one of us".ljust(100))
        with pytest.raises(HandshakeError):  # it was not forgotten
            listener.accept(WAIT_S)
        dialer.close()


# ------------------------------------------------------------------ ends


def accept_then_sleep(address: str) -> None:
    connection = listen(address).accept(WAIT_S)
    connection.send(b"here")
    time.sleep(60)


@no_leak()
def test_a_killed_peer_is_an_end_of_file_at_once() -> None:
    with process(accept_then_sleep, address := new_address()) as child, call(address) as connection:
        assert connection.recv(WAIT_S) == b"here"
        assert connection.peer_pid == child.pid
        with thread(lambda: (connection.recv(), time.monotonic())) as seen:
            time.sleep(0.1)
            assert not seen.done
            os.kill(connection.peer_pid, signal.SIGKILL)
            killed_s = time.monotonic()
        assert isinstance(seen.value, tuple)
        payload, seen_s = seen.value
        assert payload is None
        assert seen_s - killed_s < AT_ONCE_S
        assert connection.torn == 0
        with pytest.raises(ConnectionError):
            connection.send(b"anybody?")


@no_leak()
def test_a_peer_killed_with_unread_bytes_is_an_end_of_file_too() -> None:
    # The kernel reports ECONNRESET then, instead of a plain end of file.
    with process(accept_then_sleep, address := new_address()) as child, call(address) as connection:
        assert connection.recv(WAIT_S) == b"here"
        connection.send(b"never read")
        child.kill()
        assert connection.recv(WAIT_S) is None


@no_leak()
@pytest.mark.parametrize("cut", [1, 7, 8, 11])
def test_a_frame_cut_in_two_is_an_end_of_file_and_counted(cut: int) -> None:
    bare, connection = raw_pair()
    bare.sendall(frame_bytes(b"payload")[:cut])
    bare.close()
    with connection:
        assert connection.recv(WAIT_S) is None
        assert connection.torn == 1


def test_a_receive_that_times_out_keeps_what_came() -> None:
    bare, connection = raw_pair()
    with bare, connection:
        wire = frame_bytes(b"payload")
        for place in range(len(wire)):
            with pytest.raises(TimeoutError):
                connection.recv(0.0)
            bare.sendall(wire[place : place + 1])
        assert connection.recv(0.0) == b"payload"


def test_a_stopped_peer_does_not_block_a_send_for_ever() -> None:
    bare, connection = raw_pair(send_timeout_s=0.2)
    with bare, connection:

        def send_for_ever() -> None:
            while True:
                connection.send(bytes(FRAME_BYTES_MAX))

        began_s = time.monotonic()
        with pytest.raises(ConnectionError, match="took no frame"):
            send_for_ever()
        assert 0.15 < time.monotonic() - began_s < WAIT_S
        # Half a frame may be out: the connection is over in both directions.
        with pytest.raises(ConnectionError):
            connection.send(b"more")
        assert connection.recv(WAIT_S) is None


def test_closing_wakes_the_thread_that_receives() -> None:
    with connected() as (dialer, accepted):
        with thread(dialer.recv) as received:
            time.sleep(0.05)
            dialer.close()
        assert received.error is None
        assert received.value is None
        assert dialer.recv() is None
        with pytest.raises(ConnectionError):
            dialer.send(b"late")
        assert accepted.recv(WAIT_S) is None


def test_a_forked_child_that_closes_what_it_inherited_cuts_nothing() -> None:
    with contextlib.closing(listen(address := new_address())) as listener, connected() as ends:

        def close_all() -> None:
            for end in (*ends, listener):
                end.close()

        with process(close_all) as child:
            child.join(WAIT_S)
            assert child.exitcode == 0
        ends[0].send(b"still here")
        assert ends[1].recv(WAIT_S) == b"still here"
        with thread(lambda: call(address).close()) as dialled:
            listener.accept(WAIT_S).close()
        assert dialled.error is None


# ------------------------------------------------------------------ descriptors


def send_rights(connection: Connection, count: int) -> None:
    """What an unfriendly peer may send: a good frame with any number of descriptors."""
    descriptor = os.eventfd(0)
    socket.send_fds(connection.sock, [frame_bytes(b"x")], [descriptor] * count)
    os.close(descriptor)


@no_leak()
def test_a_descriptor_travels_and_belongs_to_the_receiver() -> None:
    one, two = connection_pair()
    with one, two:
        reading, writing = os.pipe()
        one.send(b"before")
        one.send_with_fd(b"with", writing)
        one.send(b"after")
        os.close(writing)
        assert two.recv(WAIT_S) == b"before"
        payload, received = two.recv_with_fd(WAIT_S)
        assert payload == b"with"
        assert two.recv(WAIT_S) == b"after"
        assert fcntl.fcntl(received, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.write(received, b"through")
        assert os.read(reading, 100) == b"through"
        os.close(received)
        os.close(reading)


@no_leak()
@pytest.mark.parametrize("count", [0, 2, 3, 100])
def test_any_other_number_of_descriptors_is_refused_and_closed(count: int) -> None:
    one, two = connection_pair()
    with one, two:
        send_rights(one, count)
        with pytest.raises(ProtocolError, match="descriptors"):
            two.recv_with_fd(WAIT_S)


@no_leak()
def test_a_descriptor_that_nobody_asked_for_is_closed() -> None:
    one, two = connection_pair()
    with one, two:
        send_rights(one, 3)
        before = open_descriptors()
        assert two.recv(WAIT_S) == b"x"
        assert open_descriptors() == before


@no_leak()
@pytest.mark.parametrize("hangs_up", [True, False])
def test_descriptors_of_a_frame_that_never_completes_are_closed(hangs_up: bool) -> None:
    bare, connection = raw_pair()
    descriptor = os.eventfd(0)
    with bare, connection:
        socket.send_fds(bare, [frame_bytes(b"payload")[:5]], [descriptor])
        os.close(descriptor)
        if hangs_up:
            bare.close()
        with pytest.raises(ConnectionError if hangs_up else TimeoutError):
            connection.recv_with_fd(0.05)
