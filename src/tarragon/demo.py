"""`tarragon demo`: the five-minute proof. Two workers die in the midst of an answer; who can tell?"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from tarragon.admin import AdminError
from tarragon.cluster import Cluster, ClusterError
from tarragon.display import Bars, summary
from tarragon.observability.proof import Answer, Kill, report

QUESTION: Final = "Explain how a spice garden works, from the seed to the kitchen. Be thorough."
EXPERT_DIES_AFTER: Final = 40
"""Pieces of the answer (mostly one token each)."""
ATTENTION_DIES_AFTER: Final = 110
BODY: Final[dict[str, Any]] = {
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 200,
    "temperature": 0.0,
    "stream": True,
}
"""What is asked, with the deaths and without."""
_KV_CACHE_BYTES: Final = 256 << 20
_CONTEXT_TOKENS_MAX: Final = 2_048
_ANSWER_TIMEOUT_S: Final = 120.0
_OWNER_TIMEOUT_S: Final = 10.0
"""Until the workers' reports say which attention worker writes the answer (they report once a second)."""
_RECOVERY_TIMEOUT_S: Final = 120.0
_PROTECTION_TIMEOUT_S: Final = 20.0
_POLL_S: Final = 0.02


class DemoError(RuntimeError):
    """The demo could not show what it is for; the text is one sentence."""


def main(args: Sequence[str]) -> int:
    """Run the demo; 0 if both answers are equal. Raises DemoModelError if the model cannot be made."""
    notes = Console(stderr=True, highlight=False)
    folder = make_model(notes)
    cluster = Cluster(
        folder,
        attention_workers=2,
        expert_workers=2,
        # Compiling would make answers a third faster and the first start minutes longer.
        engine_args=(f"--max-model-len={_CONTEXT_TOKENS_MAX}",),
        kv_cache_bytes=_KV_CACHE_BYTES,
    )
    code = 1
    try:
        code = _prove(cluster, notes)
    except (ClusterError, AdminError, DemoError, httpx.HTTPError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
    finally:
        try:
            cluster.stop()
        except ClusterError as left:
            print(f"tarragon: {left}", file=sys.stderr)
            code = 1
    return code


def make_model(notes: Console) -> Path:
    """Folder of the demo model, made first if need be, with a progress bar."""
    from tarragon.models.demo import ensure_demo_model

    with Progress(console=notes, transient=True) as progress:
        return Path(ensure_demo_model(progress=Bars(progress)))


def _prove(cluster: Cluster, notes: Console) -> int:
    console = Console(highlight=False)
    began_s = time.monotonic()
    with notes.status("starting a gateway, 2 attention workers, 2 expert workers, a store"):
        cluster.start()
    restart_s = time.monotonic() - began_s
    notes.print(cluster.ready_line)
    cluster.wait_for("full_capacity", _RECOVERY_TIMEOUT_S)
    with suppress(ClusterError):  # then the line below says that it is unprotected, and why
        cluster.wait_for("protected", _PROTECTION_TIMEOUT_S)
    notes.print(summary(cluster.status()))

    console.print(f"\n> {QUESTION}\n", style="bold")
    murderer = Murderer(cluster, console)
    disturbed = ask(cluster.url, murderer.piece)
    murderer.finish()
    console.print("\n")
    with notes.status("waiting until the cluster is whole again, then the same question without a death"):
        cluster.wait_for("full_capacity", _RECOVERY_TIMEOUT_S)
        back_s = [_back_after_s(cluster, kill, murderer.epochs[kill.worker_id]) for kill in murderer.kills]
        undisturbed = ask(cluster.url, lambda _piece: None)
    console.print(report(disturbed, undisturbed, murderer.kills, back_s))
    console.print(
        f"Restarting instead, as others do: {restart_s:.0f} s, which is what this cluster's own start took "
        "just now; every stream would have ended, and every token been computed again.\n"
    )
    return 0 if disturbed.same_as(undisturbed) else 1


class Murderer:
    """Counts the pieces of an answer as they come, and kills when it is time: in a thread, so that no piece
    waits for it."""

    def __init__(self, cluster: Cluster, console: Console) -> None:
        self.kills: list[Kill] = []
        self.epochs = {worker["id"]: int(worker["epoch"]) for worker in cluster.status()["workers"]}
        """Of the incarnations before the first kill."""
        self._cluster = cluster
        self._console = console
        self._pieces = 0
        self._over = False
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="kills", daemon=True)
        self._thread.start()

    def piece(self, piece: str) -> None:
        """Show one more piece of the answer."""
        self._pieces += 1
        self._console.print(Text(piece), end="", soft_wrap=True)

    def finish(self) -> None:
        """The answer is over. Raises DemoError if anybody who should have died in it did not."""
        self._over = True
        self._thread.join(_ANSWER_TIMEOUT_S)
        if self._fault is not None:
            raise DemoError(f"the demo could not kill a worker: {self._fault}") from self._fault
        if len(self.kills) < 2:
            raise DemoError(
                f"the answer was over after {self._pieces} pieces, before both workers were killed"
            )

    def _run(self) -> None:
        try:
            self._kill_after(EXPERT_DIES_AFTER, lambda: "ew-0")
            self._kill_after(ATTENTION_DIES_AFTER, self._writer)
        except (AdminError, DemoError) as error:
            self._fault = error

    def _kill_after(self, pieces: int, choose: Callable[[], str]) -> None:
        while self._pieces < pieces and not self._over:
            time.sleep(_POLL_S)
        if self._over:
            return
        victim = choose()
        if not self._over:
            self.kills.append(Kill(victim, time.monotonic(), self._pieces))
            self._cluster.kill(victim)
            self._console.print(Text(f" [✕ {victim} killed] ", style="bold red"), end="", soft_wrap=True)

    def _writer(self) -> str:
        """The attention worker that computes the answer: the busiest one. Raises DemoError."""
        deadline_s = time.monotonic() + _OWNER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            samples = self._cluster.admin.request("GET", "/history")["samples"]
            rates: dict[str, float] = samples[-1]["rows_per_s"] if samples else {}
            busy = {worker_id: rate for worker_id, rate in rates.items() if worker_id.startswith("aw-")}
            if any(busy.values()):
                return max(busy, key=lambda worker_id: busy[worker_id])
            time.sleep(_POLL_S)
        raise DemoError("no attention worker has reported any work")


def _back_after_s(cluster: Cluster, kill: Kill, epoch: int) -> float:
    """From a worker's death to the readiness of its replacement, by the orchestrator's own clock.

    Raises DemoError if the worker did not die: a fault that did not happen proves nothing.
    """
    events: list[dict[str, Any]] = cluster.admin.request("GET", "/events")["events"]
    mine = [event for event in events if event["worker_id"] == kill.worker_id]
    died = [event["time_s"] for event in mine if event["kind"] == "dead" and event["epoch"] == epoch]
    if not died:
        raise DemoError(f"{kill.worker_id} was to be killed, but did not die")
    back = [event["time_s"] for event in mine if event["kind"] == "healthy" and event["time_s"] > died[0]]
    return float(back[0] - died[0]) if back else float("nan")


def ask(url: str, show: Callable[[str], None]) -> Answer:
    """Stream the answer to QUESTION; ``show`` gets every piece. Raises httpx.HTTPError.

    A stream that breaks off, or ends with an error, is an answer without finish_reason.
    """
    answer = Answer()
    for choice in _choices(url):
        piece = choice.get("delta", {}).get("content") or ""
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        if piece:
            answer.take(piece, time.monotonic())
            show(piece)
    return answer


def _choices(url: str) -> Iterator[dict[str, Any]]:
    with (
        httpx.Client(timeout=_ANSWER_TIMEOUT_S, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=BODY) as response,
    ):
        response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data != line and data != "[DONE]":
                message = json.loads(data)
                if "error" in message:
                    print(f"\ntarragon: the stream ended with: {message['error']}", file=sys.stderr)
                    return
                yield from message.get("choices", [])
