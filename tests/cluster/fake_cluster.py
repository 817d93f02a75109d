"""An orchestrator process with a fake node agent and fake workers, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
from safetensors.numpy import save_file
from tests.forkserver import Forked, the_forkserver

from tarragon.boot import Boot
from tarragon.cluster import free_ports
from tarragon.config import Config
from tarragon.messages import (
    Assign,
    Control,
    Hello,
    Ready,
    StartWorker,
    Stop,
    Table,
    TableAck,
    TableUpdate,
    Welcome,
    WorkerExited,
    WorkerStarted,
)
from tarragon.transport.local import AsyncConnection, dial_async

LIMIT_S = 60.0
HIDDEN, INTERMEDIATE, LAYERS, EXPERTS = 8, 16, 2, 4
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 2
FRAME_BYTES_MAX = 1 << 20


def make_model(folder: Path) -> str:
    """A Mixtral with tiny experts; returns its folder."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"w1": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE), "w3": (INTERMEDIATE, HIDDEN)}
    tensors = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight": np.zeros(shape, np.float16)
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


class Fake:
    """One fake worker: answers as a worker does, and remembers what it was sent."""

    def __init__(self, boot: Boot, connection: AsyncConnection) -> None:
        self.boot = boot
        self.connection = connection
        self.inbox: list[Control] = []
        self.table: Table | None = None
        self.task = asyncio.get_running_loop().create_task(self._live())

    async def say(self, message: Control) -> None:
        await self.connection.send_control(message)

    async def ready(self, **fields: Any) -> None:
        me = {"worker_id": self.boot.worker_id, "epoch": self.boot.epoch, "fingerprint": "same"}
        await self.say(Ready(**{**me, "exact": True, **fields}))

    async def _live(self) -> None:
        while (message := await self.connection.recv_control()) is not None:
            self.inbox.append(message)
            match message:
                case Welcome(table=table) | TableUpdate(table=table):
                    self.table = table
                    await self._obey(message)
                case Assign():
                    await self._obey(message)
                case Stop():
                    break
        self.connection.close()

    async def _obey(self, message: Welcome | TableUpdate | Assign) -> None:
        if self.boot.role == "expert" and isinstance(message, (Welcome, Assign)):
            experts = message.assigned if isinstance(message, Welcome) else message.experts
            await self.ready(resident=experts, order=message.order)
        if self.boot.role == "attention" and isinstance(message, (Welcome, TableUpdate)):
            version = message.table.version
            await self.say(TableAck(worker_id=self.boot.worker_id, epoch=self.boot.epoch, version=version))
        if self.boot.role != "expert" and isinstance(message, Welcome):
            await self.ready()

    def die(self) -> None:
        """As the kernel would: the connection ends, without a word."""
        self.task.cancel()
        self.connection.close()


class Cluster:
    """One orchestrator process, and this process as its node agent with fake workers."""

    def __init__(self, model: str, **settings: Any) -> None:
        defaults = {"attention_workers": 2, "expert_workers": 2, "admin_port": free_ports(1)[0]}
        self.boot = Boot(
            cluster=secrets.token_hex(8),
            secret=secrets.token_bytes(32),
            worker_id="orchestrator",
            role="orchestrator",
            epoch=1 << 20,
            model=model,
            config=Config(**{**defaults, **settings}).checked(),
        )
        self.fakes: dict[str, Fake] = {}
        self.orders: list[Control] = []
        self.silent: set[str] = set()
        """Workers that the agent does not start."""
        self.agent: AsyncConnection | None = None
        # A file and no pipe: nobody reads while the process runs.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = self.launch()
        self._tasks: list[asyncio.Task[None]] = []

    def launch(self) -> Forked:
        return the_forkserver().worker(self.boot, self.errors)

    async def dial(self, secret: bytes | None = None, address: str | None = None) -> AsyncConnection:
        return await dial_async(
            address or self.boot.orchestrator_address,
            secret or self.boot.secret,
            timeout_s=LIMIT_S,
            frame_bytes_max=FRAME_BYTES_MAX,
        )

    async def serve(self) -> None:
        """Be the node agent."""
        self.agent = await self.dial()
        await self.agent.send_control(
            Hello(
                worker_id="agent",
                role="orchestrator",
                epoch=self.boot.epoch,
                pid=os.getpid(),
                address="",
            )
        )
        self._tasks.append(asyncio.get_running_loop().create_task(self._obey(self.agent)))

    async def _obey(self, agent: AsyncConnection) -> None:
        while (message := await agent.recv_control()) is not None:
            self.orders.append(message)
            if isinstance(message, StartWorker) and message.worker_id not in self.silent:
                await self.start(message)

    async def start(self, order: StartWorker) -> Fake:
        assert self.agent is not None
        boot = msgspec.structs.replace(
            self.boot, worker_id=order.worker_id, role=order.role, epoch=order.epoch
        )
        await self.agent.send_control(
            WorkerStarted(worker_id=order.worker_id, epoch=order.epoch, pid=os.getpid())
        )
        fake = self.fakes[order.worker_id] = await self.join(boot)
        return fake

    async def join(self, boot: Boot, **fields: Any) -> Fake:
        """A worker dials and says hello."""
        connection = await self.dial()
        hello = Hello(
            worker_id=boot.worker_id,
            role=boot.role,
            epoch=boot.epoch,
            pid=os.getpid(),
            address=boot.address,
            **fields,
        )
        await connection.send_control(hello)
        return Fake(boot, connection)

    async def exited(self, fake: Fake, status: str = "killed by SIGKILL") -> None:
        assert self.agent is not None
        worker_id, epoch = fake.boot.worker_id, fake.boot.epoch
        await self.agent.send_control(
            WorkerExited(worker_id=worker_id, epoch=epoch, pid=os.getpid(), status=status)
        )

    async def request(
        self, method: str, path: str, body: Any = None, **options: Any
    ) -> tuple[int, dict[str, Any]]:
        url = f"http://127.0.0.1:{self.boot.config.admin_port}{path}"
        if body is not None:
            options["json"] = body
        async with aiohttp.ClientSession() as http, http.request(method, url, **options) as answer:
            assert answer.content_type == "application/json"
            return answer.status, await answer.json()

    async def status(self) -> dict[str, Any]:
        code, body = await self.request("GET", "/status")
        assert code == 200
        return body

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Poll the status until ``condition`` holds."""
        end_s = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                if condition(body := await self.status()):
                    return body
            assert time.monotonic() < end_s, body
            assert self.process.poll() is None, self.ended()
            await asyncio.sleep(0.02)

    async def full(self) -> dict[str, Any]:
        return await self.until(lambda status: status["ready"] and status["full_capacity"])

    def ended(self) -> tuple[int, str]:
        """Wait for the process; its exit code and what it said."""
        code = self.process.wait(LIMIT_S)
        self.errors.seek(0)
        return code, self.errors.read().decode()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for fake in self.fakes.values():
            fake.die()
        if self.agent is not None:
            self.agent.close()
        self.kill()

    def kill(self) -> None:
        """End the process, however it is."""
        self.process.kill()
        self.process.wait(LIMIT_S)
        self.errors.close()


@contextlib.asynccontextmanager
async def cluster_of(model: str, **settings: Any) -> AsyncIterator[Cluster]:
    cluster = Cluster(model, **settings)
    try:
        async with asyncio.timeout(3 * LIMIT_S):
            await cluster.serve()
            yield cluster
    finally:
        await cluster.close()


def run(test: Callable[[Cluster], Any], model: str, **settings: Any) -> None:
    async def body() -> None:
        async with cluster_of(model, **settings) as cluster:
            await test(cluster)

    asyncio.run(body())


def worker(status: dict[str, Any], worker_id: str) -> dict[str, Any]:
    found: dict[str, Any] = next(w for w in status["workers"] if w["id"] == worker_id)
    return found


async def wait_for(condition: Callable[[], Any], what: str) -> Any:
    end_s = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < end_s, what
        await asyncio.sleep(0.002)
    return found
