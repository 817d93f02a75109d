"""Tiny workers for the node agent's tests: every role runs ``main``, which does what the worker's id says.

The fake orchestrator relays between the agent and the test, so that the test
itself is the orchestrator. Nothing here imports torch.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time

from tarragon.boot import Boot, socket_address
from tarragon.checkpoint import messages
from tarragon.transport.local import Connection, Listener, dial

RELAY_SECRET = b"r" * 32
FRAME_BYTES_MAX = 1 << 20
_links: list[Connection] = []
"""Connections that stay open for the life of the process."""


def relay_address() -> str:
    return "\0" + os.environ["TEST_RELAY"]


def main(boot: Boot) -> None:
    if boot.role == "orchestrator":
        orchestrate(boot)
    if boot.role == "store":
        keep(boot)
    act(boot)


def keep(boot: Boot) -> None:
    """Take buckets back from the agent, say what is in them, deposit one more."""
    agent = dial(
        socket_address(boot.cluster, "agent"), boot.secret, timeout_s=10, frame_bytes_max=FRAME_BYTES_MAX
    )
    messages.send(agent, messages.Deposit(worker_id=boot.worker_id, epoch=boot.epoch))
    found = []
    while isinstance(bucket := messages.receive(agent, 10), messages.Bucket):
        found.append(os.pread(messages.take_bucket(agent, bucket, 10), 100, 0).rstrip(b"\0").decode())
    assert isinstance(bucket, messages.Returned)
    print(f"incarnation {bucket.starts} got back {found}", flush=True)
    new = messages.Bucket(worker_id="aw-1", epoch=bucket.starts, total_bytes=1 << 16)
    fd = messages.make_bucket("aw-1", new.total_bytes)
    messages.hand_over(agent, new, fd)
    os.pwrite(fd, f"bucket {bucket.starts}".encode(), 0)
    _links.append(agent)


def orchestrate(boot: Boot) -> None:
    """Accept the agent, dial the test, copy frames both ways until either is gone."""
    if os.environ.get("TEST_ORCHESTRATOR") == "broken":
        raise RuntimeError("no orchestrator today")
    if os.environ.get("TEST_ORCHESTRATOR") == "refuses":
        print("tarragon: the experts do not fit", file=sys.stderr)
        sys.exit(2)
    listener = Listener(
        boot.orchestrator_address, boot.secret, frame_bytes_max=FRAME_BYTES_MAX, handshake_timeout_s=5
    )
    test = dial(relay_address(), RELAY_SECRET, timeout_s=10, frame_bytes_max=FRAME_BYTES_MAX)
    agent = listener.accept(10)
    threading.Thread(target=copy, args=(test, agent), daemon=True).start()
    copy(agent, test)
    sys.exit(0)


def copy(source: Connection, target: Connection) -> None:
    while (frame := source.recv()) is not None:
        target.send(frame)


def act(boot: Boot) -> None:
    """Behave as the worker id says: "aw-<behaviour>"."""
    behaviour = boot.worker_id.partition("-")[2]
    print(
        f"I am {boot.worker_id} at {boot.epoch}, threads {boot.threads}, dice {random.random()}", flush=True
    )
    if behaviour == "exits":
        print("ValueError: this worker has no wish to live", file=sys.stderr)
        sys.exit(3)
    if behaviour == "raises":
        raise ValueError("the model does not fit")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "parent":
        # One child in the worker's own process group, one in a session of its own.
        for session in (False, True):
            subprocess.Popen(["sleep", "600"], start_new_session=session)
    if behaviour == "computes":
        import torch

        torch.set_num_threads(2)
        # Two parallel regions: in a fork of a process that had run one, the first would hang.
        total = (torch.ones(1000, 1000) @ torch.eye(1000)).sum()
        engine = "vllm.v1.engine.core" in sys.modules
        print(f"sum {total} with {torch.get_num_threads()} threads, engine {engine}", flush=True)
    print("ready", flush=True)
    while True:
        time.sleep(60)
