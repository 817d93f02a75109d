"""The checkpoint store's process: it hands out buckets, and nothing more (6.1).

Attention workers write their buckets one-sidedly and read each other's; this process is in no data path, so
its death stops nobody. The node agent keeps a descriptor of every bucket: a restarted store gets them back.
One thread does all of it; the control thread beside it talks to the orchestrator and accepts connections.
"""

from __future__ import annotations

import errno
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tarragon.boot import Boot, socket_address
from tarragon.checkpoint import messages
from tarragon.checkpoint.ledger import Fenced, Granted, Incarnation, Ledger, Waits
from tarragon.checkpoint.messages import (
    FRAME_BYTES_MAX,
    Bucket,
    Deposit,
    Dropped,
    Listed,
    NoRoom,
    OpenBucket,
    Returned,
    Stale,
    StoreMessage,
)
from tarragon.config import BUCKETS_MAX, STORE_BIND_PAUSE_S, STORE_SEND_TIMEOUT_S
from tarragon.control import WorkerControl
from tarragon.messages import Control, Peer, Peers, ProtocolError, Ready, Report, Welcome
from tarragon.transport.local import Connection, dial


def main(boot: Boot) -> None:
    """Run the store until it is told to stop. Raises SystemExit if the node agent is gone."""
    control = _listen(boot)
    agent = dial(
        socket_address(boot.cluster, "agent"),
        boot.secret,
        timeout_s=boot.config.connect_timeout_s,
        frame_bytes_max=FRAME_BYTES_MAX,
    )
    store = Store(boot, agent)
    store.recover()
    control.counters = store.counters
    control.start()
    control.send(Ready(worker_id=boot.worker_id, epoch=boot.epoch, fingerprint="", exact=True))
    store.serve(control)


def _listen(boot: Boot) -> StoreControl:
    """Take the store's address; a predecessor that is being killed may hold it for a moment yet."""
    deadline_s = time.monotonic() + boot.config.shutdown_grace_s + boot.config.connect_timeout_s
    while True:
        try:
            return StoreControl(boot)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline_s:
                raise
        time.sleep(STORE_BIND_PAUSE_S)


class StoreControl(WorkerControl):
    """``mail`` delivers accepted connections, and whom the orchestrator names as living."""

    def __init__(self, boot: Boot) -> None:
        super().__init__(
            boot,
            frame_bytes_max=FRAME_BYTES_MAX,
            address=socket_address(boot.cluster, "store"),
            send_timeout_s=STORE_SEND_TIMEOUT_S,
        )
        self.mail: queue.SimpleQueue[tuple[Connection, bytes] | list[Peer]] = queue.SimpleQueue()
        self.counters: Callable[[], dict[str, float]] = dict

    def handle(self, message: Control) -> None:
        if isinstance(message, (Welcome, Peers)):
            self.mail.put(message.peers)
            self.wake()

    def report(self) -> None:
        boot = self.boot
        self.send(Report(worker_id=boot.worker_id, epoch=boot.epoch, counters=self.counters()))

    def admit(self, connection: Connection, first: bytes, descriptors: list[int]) -> bool:
        for descriptor in descriptors:
            os.close(descriptor)
        self.mail.put((connection, first))
        return True


@dataclass(eq=False)
class _Client:
    connection: Connection
    incarnation: Incarnation | None = None


class Store:
    """Owns the descriptors of all buckets and the connections of the attention workers."""

    def __init__(self, boot: Boot, agent: Connection) -> None:
        config = boot.config
        self._boot, self._agent = boot, agent
        self._ledger = Ledger(
            bytes_max=config.checkpoint_bytes_max,
            linger_s=config.bucket_linger_s,
            linger_min_s=config.bucket_linger_min_s,
        )
        self._memory: dict[Incarnation, int] = {}
        self._clients: dict[int, _Client] = {}
        self._refused = 0
        self._starts = 1
        self._lock = threading.Lock()
        """Held while anything changes: the control thread reads the counters."""
        self._poll = select.poll()
        self._poll.register(agent.fileno(), select.POLLIN)

    def counters(self) -> dict[str, float]:
        with self._lock:
            ledger = self._ledger
            return {
                "buckets": float(len(ledger.entries)),
                "buckets_dead": float(ledger.dead),
                "bytes_reserved": float(ledger.reserved_bytes),
                "bytes_touched": float(sum(messages.touched_bytes(fd) for fd in self._memory.values())),
                "clients": float(len(self._clients)),
                "clients_waiting": float(len(ledger.waiting)),
                "clients_refused": float(self._refused),
                **{f"refused_{name}": float(count) for name, count in ledger.refused.items()},
                "restarts": float(self._starts - 1),
            }

    def recover(self) -> None:
        """Take back from the node agent what former incarnations have handed out."""
        boot, timeout_s = self._boot, self._boot.config.connect_timeout_s
        messages.send(self._agent, Deposit(worker_id=boot.worker_id, epoch=boot.epoch))
        while True:
            match messages.receive(self._agent, timeout_s):
                case Bucket() as bucket:
                    self._memory[bucket.worker_id, bucket.epoch] = messages.take_bucket(
                        self._agent, bucket, timeout_s
                    )
                    self._ledger.returned(bucket.worker_id, bucket.epoch, bucket.total_bytes)
                case Returned(starts=starts):
                    self._starts = starts
                    return
                case _:
                    raise SystemExit("the node agent does not give the buckets back")

    def serve(self, control: StoreControl) -> None:
        self._poll.register(control.wake_fd, select.POLLIN)
        while not control.stopping.is_set():
            events = self._poll.poll(self._wait_ms())
            with self._lock:
                for fd, _ in events:
                    if fd == control.wake_fd:
                        self._take_mail(control)
                    elif fd == self._agent.fileno():
                        self._on_agent()
                    elif fd in self._clients:
                        self._on_client(self._clients[fd])
                self._on_time(time.monotonic())

    # ------------------------------------------------------------------ events

    def _wait_ms(self) -> float | None:
        due_s = self._ledger.next_due_s()
        return None if due_s is None else max(0.0, (due_s - time.monotonic()) * 1e3) + 1.0

    def _take_mail(self, control: StoreControl) -> None:
        os.eventfd_read(control.wake_fd)
        while not control.mail.empty():
            entry = control.mail.get_nowait()
            if isinstance(entry, list):
                living = [(peer.worker_id, peer.epoch) for peer in entry if peer.role == "attention"]
                self._ledger.living(living, time.monotonic())
                continue
            connection, first = entry
            if len(self._clients) >= BUCKETS_MAX:
                self._refused += 1
                connection.close()
                continue
            client = self._clients[connection.fileno()] = _Client(connection)
            self._poll.register(connection.fileno(), select.POLLIN)
            self._on_message(client, partial(messages.decode, first))

    def _on_agent(self) -> None:
        """It says nothing after it gave the buckets back: whatever comes is the end."""
        raise SystemExit("the link to the node agent ended")

    def _on_client(self, client: _Client) -> None:
        self._on_message(client, lambda: messages.receive(client.connection, timeout_s=0))

    def _on_message(self, client: _Client, read: Callable[[], StoreMessage | None]) -> None:
        try:
            message = read()
        except TimeoutError:  # part of a frame
            return
        except ProtocolError:
            self._refused += 1
            message = None
        if isinstance(message, OpenBucket):
            self._open(client, message)
        elif message is None:
            self._drop_client(client)
        else:
            self._refused += 1
            self._drop_client(client)

    def _on_time(self, now_s: float) -> None:
        for worker_id, epoch in self._ledger.due(now_s):
            gone = Dropped(worker_id=worker_id, epoch=epoch)
            os.close(self._memory.pop((worker_id, epoch)))
            self._tell_agent(gone)
            for client in list(self._clients.values()):
                if client.incarnation is not None:
                    self._tell(client, gone)
        while (next_one := self._ledger.next_waiting()) is not None:
            (worker_id, epoch), total_bytes = next_one
            found = [c for c in self._clients.values() if c.incarnation == (worker_id, epoch)]
            asked = OpenBucket(worker_id=worker_id, epoch=epoch, total_bytes=total_bytes)
            if not found or not self._grant(found[0], asked):
                self._ledger.left(worker_id, epoch)

    # ------------------------------------------------------------------ buckets

    def _open(self, client: _Client, asked: OpenBucket) -> None:
        incarnation = (asked.worker_id, asked.epoch)
        if client.incarnation not in (None, incarnation):
            self._refused += 1
            self._drop_client(client)
            return
        for former in [c for c in self._clients.values() if c.incarnation == incarnation and c is not client]:
            self._drop_client(former)
        client.incarnation = incarnation
        self._grant(client, asked)
        for other in self._memory:
            if other != incarnation:
                self._hand(client, other)
        self._tell(client, Listed())

    def _grant(self, client: _Client, asked: OpenBucket) -> bool:
        """Give a worker its bucket, or say why not; whether it has one."""
        incarnation = (asked.worker_id, asked.epoch)
        match self._ledger.open(asked.worker_id, asked.epoch, asked.total_bytes):
            case Fenced(reason):
                self._tell(client, Stale(reason=reason))
                self._drop_client(client)
                return False
            case Waits(reason):
                self._tell(client, NoRoom(reason=reason))
                return False
            case Granted(is_new=True):
                try:
                    self._memory[incarnation] = messages.make_bucket(asked.worker_id, asked.total_bytes)
                except OSError as error:
                    self._ledger.failed(*incarnation)
                    self._tell(client, NoRoom(reason=f"no memory for a bucket: {error.strerror}"))
                    return False
                # The agent first: what a worker writes to must outlive us from its first byte on.
                self._tell_agent(self._bucket(incarnation), self._memory[incarnation])
                for other in list(self._clients.values()):
                    if other is not client and other.incarnation is not None:
                        self._hand(other, incarnation)
        self._hand(client, incarnation)
        return True

    def _bucket(self, incarnation: Incarnation) -> Bucket:
        worker_id, epoch = incarnation
        total_bytes = self._ledger.entries[incarnation].total_bytes
        return Bucket(worker_id=worker_id, epoch=epoch, total_bytes=total_bytes)

    def _hand(self, client: _Client, incarnation: Incarnation) -> None:
        self._tell(client, self._bucket(incarnation), self._memory[incarnation])

    # ------------------------------------------------------------------ connections

    def _tell(self, client: _Client, message: StoreMessage, fd: int = -1) -> None:
        """Send to a worker; one that is gone or does not listen is dropped."""
        if client.connection.fileno() < 0:
            return
        try:
            _send(client.connection, message, fd)
        except ConnectionError:
            self._drop_client(client)

    def _tell_agent(self, message: StoreMessage, fd: int = -1) -> None:
        try:
            _send(self._agent, message, fd)
        except ConnectionError as error:
            raise SystemExit(f"the node agent takes no bucket: {error}") from error

    def _drop_client(self, client: _Client) -> None:
        fd = client.connection.fileno()
        if fd >= 0 and self._clients.get(fd) is client:
            del self._clients[fd]
            self._poll.unregister(fd)
        client.connection.close()
        if client.incarnation is not None:
            self._ledger.left(*client.incarnation)
            client.incarnation = None


def _send(connection: Connection, message: StoreMessage, fd: int) -> None:
    if isinstance(message, Bucket):
        messages.hand_over(connection, message, fd)
    else:
        messages.send(connection, message)
