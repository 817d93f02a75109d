"""What a worker process is handed when the node agent forks it."""

from __future__ import annotations

import msgspec

from tarragon.config import Config
from tarragon.experts.memory import HostMemory
from tarragon.messages import Role


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """Identity, secret and settings of one worker incarnation.

    It reaches the worker through the fork itself: the secret is never on a
    command line, in the environment or in a file.
    """

    cluster: str
    """Random name of this cluster, the first part of every socket address."""
    secret: bytes
    """32 random bytes; whoever dials any internal socket proves that it knows them."""
    worker_id: str
    """"aw-0", "ew-1", "gateway", "orchestrator", "store"."""
    role: Role
    epoch: int
    """Incarnation number, given by the orchestrator; every message carries it."""
    model: str
    """Folder of the checkpoint in Hugging Face form."""
    config: Config
    engine_args: tuple[str, ...] = ()
    """vLLM flags that the user passed through, for attention workers and the gateway."""
    threads: int = 1
    expert_memory: HostMemory | None = None
    """Where the host's expert workers share packed experts; None: each has copies of its own."""

    @property
    def orchestrator_address(self) -> str:
        return socket_address(self.cluster, "orchestrator")

    @property
    def address(self) -> str:
        """Where this incarnation listens."""
        return socket_address(self.cluster, f"{self.worker_id}.{self.epoch}")


def socket_address(cluster: str, name: str) -> str:
    """Abstract Unix socket address (leading NUL): it leaves no file and dies with its process."""
    return f"\0tarragon/{cluster}/{name}"
