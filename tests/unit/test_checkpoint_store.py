"""The store as a process of its own, over real sockets: the test is node agent and orchestrator."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import secrets
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from tarragon.agent.log import LogWriter
from tarragon.agent.vault import Vault
from tarragon.boot import Boot, socket_address
from tarragon.checkpoint import messages, process
from tarragon.checkpoint.client import StoreClient
from tarragon.checkpoint.messages import FRAME_BYTES_MAX, Bucket, Deposit, Listed, OpenBucket, Returned, Stale
from tarragon.config import BUCKET_BYTES_MAX, Config
from tarragon.messages import Hello, Peer, Peers, ProtocolError, Ready, Report, Table, Welcome
from tarragon.testing.ends import connection_pair
from tarragon.transport.local import Connection, HandshakeError, Listener, dial

WAIT_S = 60.0
SIZE = 3 * mmap.PAGESIZE
_fork = multiprocessing.get_context("fork")


def wait(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"no {what} after {WAIT_S} s"
        time.sleep(0.005)


class Host:
    """A node agent's vault and an orchestrator in threads, and the store, which may die, as a process."""

    def __init__(self, **settings: Any) -> None:
        config = Config(**{"report_interval_ms": 20.0, "connect_timeout_s": 5.0, **settings})
        self.boot = Boot(
            cluster=secrets.token_hex(8),
            secret=secrets.token_bytes(32),
            worker_id="store",
            role="store",
            epoch=100,
            model="",
            config=config,
        )
        self.store: Any = None
        self._starting = threading.Lock()
        """Held until a started store's pid is known: the store may ask for its buckets before that."""
        self.living: list[Peer] = []
        self.reports: list[Report] = []
        self.hellos: list[Hello] = []
        self.readies: list[Ready] = []
        self._line: Connection | None = None
        self._selector = selectors.DefaultSelector()
        self._ending = threading.Event()
        self.vault = Vault(
            self._selector,
            socket_address(self.boot.cluster, "agent"),
            self.boot.secret,
            config,
            LogWriter(2),
            self._is_store,
        )
        self._orchestrator = Listener(
            self.boot.orchestrator_address, self.boot.secret, frame_bytes_max=1 << 20, handshake_timeout_s=5.0
        )
        self._threads = [threading.Thread(target=target) for target in (self._keep, self._orchestrate)]
        for thread in self._threads:
            thread.start()
        self.clients: list[Client] = []

    def _is_store(self, pid: int, worker_id: str, epoch: int) -> bool:
        with self._starting:
            return (pid, worker_id) == (self.store.pid, "store")

    def _keep(self) -> None:
        while not self._ending.is_set():
            for key, _ in self._selector.select(0.05):
                key.data()

    def _orchestrate(self) -> None:
        while not self._ending.is_set():
            with suppress(TimeoutError, ProtocolError, ConnectionError):
                line = self._orchestrator.accept(0.05)
                self._talk(line)
                line.close()

    def _talk(self, line: Connection) -> None:
        while not self._ending.is_set():
            try:
                message = line.recv_control(0.05)
            except TimeoutError:
                continue
            if isinstance(message, Hello):
                self.hellos.append(message)
                table = Table(version=0, workers=[], candidates=[])
                line.send_control(Welcome(table=table, peers=self.living))
                self._line = line
            elif isinstance(message, Report):
                self.reports.append(message)
            elif isinstance(message, Ready):
                self.readies.append(message)
            elif message is None:
                return

    def launch(self) -> None:
        """Start the next incarnation of the store and wait until it is ready."""
        self.boot = msgspec.structs.replace(self.boot, epoch=self.boot.epoch + 1)
        with self._starting:
            self.store = _fork.Process(target=process.main, args=(self.boot,), daemon=True)
            self.store.start()
        wait(lambda: self.readies and self.readies[-1].epoch == self.boot.epoch, "ready store")

    def kill(self) -> None:
        os.kill(self.store.pid, signal.SIGKILL)
        self.store.join(WAIT_S)

    def tell_living(self, *clients: Client) -> None:
        self.living = [
            Peer(worker_id=c.boot.worker_id, role="attention", epoch=c.boot.epoch, address="")
            for c in clients
        ]
        assert self._line is not None
        self._line.send_control(Peers(peers=self.living))

    def counter(self, name: str) -> float:
        """Of a report that was made after this call."""
        self.reports.clear()
        wait(lambda: len(self.reports) > 1, "report")
        return self.reports[-1].counters[name]

    def client(self, worker_id: str, epoch: int, total_bytes: int = SIZE) -> Client:
        boot = msgspec.structs.replace(self.boot, worker_id=worker_id, role="attention", epoch=epoch)
        self.clients.append(Client(boot, total_bytes))
        return self.clients[-1]

    def dial(self, name: str = "store", secret: bytes | None = None) -> Connection:
        return dial(
            socket_address(self.boot.cluster, name),
            secret or self.boot.secret,
            timeout_s=WAIT_S,
            frame_bytes_max=FRAME_BYTES_MAX + 10,
        )

    def end(self) -> None:
        for client in self.clients:
            client.client.close()
            client.client.join(WAIT_S)
            assert not client.client.is_alive()
            for memory in [*client.own, *client.peers.values()]:
                memory.close()
        if self.store is not None:
            self.kill()
        self._ending.set()
        for thread in self._threads:
            thread.join(WAIT_S)
        self.vault.close()
        self._selector.close()
        self._orchestrator.close()


class Client:
    """What an attention worker makes of its store client."""

    def __init__(self, boot: Boot, total_bytes: int) -> None:
        self.boot, self.total_bytes = boot, total_bytes
        self.own: list[mmap.mmap] = []
        self.peers: dict[tuple[str, int], mmap.mmap] = {}
        self.calls: list[str] = []
        self.client = StoreClient(
            boot,
            total_bytes,
            self._on_bucket,
            self._on_peer,
            lambda: self.calls.append("lost"),
            self._on_gone,
        )
        self.client.start()

    def _on_bucket(self, fd: int) -> None:
        self.calls.append("bucket")
        self.own.append(mmap.mmap(fd, self.total_bytes))

    def _on_peer(self, worker_id: str, epoch: int, fd: int) -> None:
        self.calls.append(f"peer {worker_id} {epoch}")
        self.peers[worker_id, epoch] = mmap.mmap(fd, 0)

    def _on_gone(self, worker_id: str, epoch: int) -> None:
        self.calls.append(f"gone {worker_id} {epoch}")
        del self.peers[worker_id, epoch]

    def connected(self) -> Client:
        wait(self.client.connected.is_set, "connection to the store")
        return self


@pytest.fixture
def make_host() -> Iterator[Callable[..., Host]]:
    hosts: list[Host] = []
    before = open_buckets()

    def make(**settings: Any) -> Host:
        hosts.append(Host(**settings))
        hosts[-1].launch()
        return hosts[-1]

    yield make
    for host in hosts:
        host.end()
    hosts.clear()
    assert open_buckets() == before, "a bucket's descriptor leaked"


def open_buckets() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of this very listing is gone already
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if "tarragon-bucket" in name)


# ------------------------------------------------------------------ buckets


def test_every_worker_gets_its_bucket_and_everybody_elses(make_host: Callable[..., Host]) -> None:
    host = make_host()
    one = host.client("aw-0", 1).connected()
    one.own[0][:5] = b"hello"
    two = host.client("aw-1", 2, 2 * SIZE).connected()
    wait(lambda: ("aw-1", 2) in one.peers, "bucket of the newcomer")
    assert one.calls == ["bucket", "peer aw-1 2"]
    assert two.calls == ["bucket", "peer aw-0 1"]
    assert two.peers["aw-0", 1][:5] == b"hello"
    assert (len(one.own[0]), len(two.own[0])) == (SIZE, 2 * SIZE)
    wait(lambda: len(host.vault.kept) == 2, "buckets at the agent")
    assert host.counter("buckets") == 2
    assert host.counter("bytes_reserved") == 3 * SIZE
    assert host.counter("bytes_touched") == mmap.PAGESIZE
    assert host.counter("clients") == 2


def test_buckets_outlive_the_store(make_host: Callable[..., Host]) -> None:
    host = make_host()
    one, two = host.client("aw-0", 1).connected(), host.client("aw-1", 2).connected()
    wait(lambda: len(one.calls) == 2, "bucket of the newcomer")
    host.kill()
    wait(lambda: one.calls[-1] == two.calls[-1] == "lost", "notice of the store's death")
    assert not one.client.connected.is_set()
    one.own[0][:5] = b"later"  # written while there is no store
    host.launch()
    one.connected()
    two.connected()
    assert one.calls == ["bucket", "peer aw-1 2", "lost", "bucket"]
    assert two.calls == ["bucket", "peer aw-0 1", "lost", "bucket"]
    assert one.own[1][:5] == b"later", "it is another memory"
    three = host.client("aw-2", 3).connected()
    assert three.peers["aw-0", 1][:5] == b"later"
    assert host.counter("restarts") == 1
    assert host.counter("buckets") == 3


def test_a_store_killed_again_and_again_loses_no_bucket(make_host: Callable[..., Host]) -> None:
    host = make_host()
    clients = [host.client(f"aw-{index}", index) for index in range(4)]
    for index, client in enumerate(clients):
        client.connected().own[0][:1] = bytes([65 + index])
    for pause_s in (0.0, 0.002, 0.01, 0.03, 0.1):
        time.sleep(pause_s)
        host.kill()
        host.launch()
    for client in clients:
        client.connected()
        wait(lambda client=client: len(client.peers) == 3, "all other buckets")  # type: ignore[misc]
        seen = {worker_id: chr(memory[0]) for (worker_id, _), memory in client.peers.items()}
        assert seen == {f"aw-{i}": chr(65 + i) for i in range(4) if f"aw-{i}" != client.boot.worker_id}
    assert host.counter("buckets") == 4
    assert host.counter("restarts") == 5


def test_a_dead_incarnations_bucket_goes_after_a_while(make_host: Callable[..., Host]) -> None:
    host = make_host(bucket_linger_s=0.5)
    one, two = host.client("aw-0", 1).connected(), host.client("aw-1", 2).connected()
    host.tell_living(one, two)
    time.sleep(0.6)
    assert host.counter("buckets") == 2
    host.reports.clear()
    host.tell_living(two)
    # Any report will do: the latest may be one of the time after it has gone.
    wait(
        lambda: any(report.counters["buckets_dead"] == 1 for report in host.reports),
        "report of a dead bucket",
    )
    wait(lambda: two.calls[-1] == "gone aw-0 1", "news that the bucket is gone")
    assert host.counter("buckets") == 1
    wait(lambda: host.vault.kept == [("aw-1", 2)], "the agent to let go")


def test_what_goes_while_a_worker_is_away_is_gone_for_it_when_it_is_back(
    make_host: Callable[..., Host],
) -> None:
    host = make_host(bucket_linger_s=0.2)
    one, two = host.client("aw-0", 1).connected(), host.client("aw-1", 2).connected()
    wait(lambda: one.peers and two.peers, "each other's buckets")
    host.kill()
    host.vault._let_go(("aw-0", 1))
    host.launch()
    two.connected()
    wait(lambda: "gone aw-0 1" in two.calls, "news that the bucket is gone")


def test_without_room_a_worker_goes_on_without_and_gets_its_bucket_when_there_is_some(
    make_host: Callable[..., Host], capfd: pytest.CaptureFixture[str]
) -> None:
    host = make_host(checkpoint_bytes_max=2 * SIZE, bucket_linger_s=0.2)
    one, two = host.client("aw-0", 1).connected(), host.client("aw-1", 2).connected()
    late = host.client("aw-2", 3).connected()
    assert late.calls == ["peer aw-0 1", "peer aw-1 2"]
    assert not late.own
    assert "checkpoint_bytes_max" in late.client.refusal
    assert host.counter("clients_waiting") == 1
    host.tell_living(two, late)
    wait(lambda: late.own, "bucket")
    wait(lambda: late.client.refusal == "", "end of the refusal")
    assert host.counter("bytes_reserved") == 2 * SIZE
    assert "no room for checkpoints" in capfd.readouterr().err
    wait(lambda: one.calls[-1] == f"peer aw-2 {late.boot.epoch}", "bucket of the latecomer")


def test_a_replaced_incarnation_is_refused_for_good(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host.client("aw-0", 7).connected()
    old = host.client("aw-0", 6)
    old.client.join(WAIT_S)
    assert not old.client.is_alive()
    assert "has been replaced" in old.client.refusal
    assert not old.own
    assert host.counter("refused_stale_epoch") == 1


def test_the_store_serves_without_an_orchestrator(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host._orchestrator.close()
    assert host._line is not None
    host._line.close()
    one, two = host.client("aw-0", 1).connected(), host.client("aw-1", 2).connected()
    wait(lambda: one.peers and two.peers, "each other's buckets")


# ------------------------------------------------------------------ who breaks the rules


def test_strangers_and_malformed_words_hurt_nobody(make_host: Callable[..., Host]) -> None:
    host = make_host()
    one = host.client("aw-0", 1).connected()
    before = host.counter("frames_malformed")  # of this whole process
    with pytest.raises(HandshakeError):
        host.dial(secret=b"x" * 32)
    for raw in (
        b"\xff\xff",
        b"",
        b"x" * (FRAME_BYTES_MAX + 1),
        messages.encode(Listed()),
        messages.encode(Deposit(worker_id="store", epoch=7)),
        msgspec.msgpack.encode({"type": "OpenBucket", "worker_id": "aw-1", "epoch": 2, "total_bytes": 0}),
        msgspec.msgpack.encode({"type": "OpenBucket", "worker_id": "aw-1", "epoch": -1, "total_bytes": 1}),
        msgspec.msgpack.encode({"type": "OpenBucket", "worker_id": "a" * 99, "epoch": 1, "total_bytes": 1}),
        msgspec.msgpack.encode(
            {"type": "OpenBucket", "worker_id": "aw-1", "epoch": 2, "total_bytes": BUCKET_BYTES_MAX + 1}
        ),
    ):
        with host.dial() as hostile:
            hostile.send(raw)
            assert hostile.recv(WAIT_S) is None
    two = host.client("aw-1", 2).connected()
    wait(lambda: one.peers and two.peers, "each other's buckets")
    assert host.counter("buckets") == 2
    assert host.counter("connections_refused") == 2, "without the secret; a first frame that is too long"
    assert host.counter("clients_refused") == 8
    assert host.counter("frames_malformed") == before, "its orchestrator has done nothing wrong"


def test_one_connection_has_one_incarnation(make_host: Callable[..., Host]) -> None:
    host = make_host()
    with host.dial() as rude:
        messages.send(rude, OpenBucket(worker_id="aw-0", epoch=1, total_bytes=SIZE))
        bucket = messages.receive(rude, WAIT_S)
        assert isinstance(bucket, Bucket)
        os.close(messages.take_bucket(rude, bucket, WAIT_S))
        assert messages.receive(rude, WAIT_S) == Listed()
        messages.send(rude, OpenBucket(worker_id="aw-1", epoch=2, total_bytes=SIZE))
        assert messages.receive(rude, WAIT_S) is None
    with host.dial() as other:
        messages.send(other, OpenBucket(worker_id="aw-0", epoch=1, total_bytes=2 * SIZE))
        assert isinstance(messages.receive(other, WAIT_S), Stale)
        assert messages.receive(other, WAIT_S) is None
    assert host.counter("buckets") == 1


def test_only_the_store_may_deposit(make_host: Callable[..., Host]) -> None:
    host = make_host()
    for message in (
        Deposit(worker_id="store", epoch=1000),  # says so, but is another process
        Returned(starts=1),
        Bucket(worker_id="aw-0", epoch=1, total_bytes=SIZE),
    ):
        with host.dial("agent") as stranger:
            messages.send(stranger, message)
            assert messages.receive(stranger, WAIT_S) is None
    host.client("aw-0", 1).connected()
    wait(lambda: host.vault.kept == [("aw-0", 1)], "bucket at the agent")


def test_who_only_connects_to_the_agent_makes_room_for_the_store(make_host: Callable[..., Host]) -> None:
    host = make_host()
    idle = [host.dial("agent") for _ in range(6)]
    host.kill()
    host.launch()
    host.client("aw-0", 1).connected()
    for connection in idle:
        connection.close()


@pytest.mark.parametrize(
    ("sealed", "size_bytes"), [(False, SIZE), (True, SIZE - 1), (True, SIZE + 1)], ids=str
)
def test_memory_that_is_not_as_announced_is_refused_and_closed(sealed: bool, size_bytes: int) -> None:
    one, two = connection_pair()
    if sealed:
        fd = messages.make_bucket("aw-0", size_bytes)
    else:
        fd = os.memfd_create("tarragon-bucket-open", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size_bytes)
    count = len(os.listdir("/proc/self/fd"))
    bucket = Bucket(worker_id="aw-0", epoch=1, total_bytes=SIZE)
    with one, two:
        messages.hand_over(one, bucket, fd)
        assert messages.receive(two, WAIT_S) == bucket
        with pytest.raises(ProtocolError):
            messages.take_bucket(two, bucket, WAIT_S)
        assert len(os.listdir("/proc/self/fd")) == count
    os.close(fd)


def test_a_bucket_cannot_be_resized_and_takes_memory_as_it_is_written() -> None:
    fd = messages.make_bucket("aw-0", 64 << 30)
    assert messages.touched_bytes(fd) == 0
    for size_bytes in (0, 65 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size_bytes)
    os.pwrite(fd, b"x", 32 << 30)
    assert messages.touched_bytes(fd) == mmap.PAGESIZE
    messages.check_bucket(fd, 64 << 30)
    os.close(fd)
