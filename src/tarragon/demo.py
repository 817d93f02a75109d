"""`tarragon demo`: the demo model on 2 + 2 workers, two answers as they are written, and who did what."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import httpx
from rich.console import Console
from rich.progress import Progress

from tarragon.admin import AdminError
from tarragon.cluster import Cluster, ClusterError
from tarragon.display import Bars, summary, workers_table

_QUESTIONS: Final = (
    "What is tarragon, and what is it good with? Answer in two sentences.",
    "Tell me in three sentences why a team can do more than one person.",
)
_KV_CACHE_BYTES: Final = 256 << 20
_TOKENS_MAX: Final = 96
_ANSWER_TIMEOUT_S: Final = 120.0


def main(args: Sequence[str]) -> int:
    """Run the demo; return the exit code. Raises DemoModelError if the model cannot be made."""
    notes = Console(stderr=True)
    folder = make_model(notes)
    cluster = Cluster(folder, attention_workers=2, expert_workers=2, kv_cache_bytes=_KV_CACHE_BYTES)
    try:
        with notes.status("starting 2 attention and 2 expert workers"):
            cluster.start()
        notes.print(cluster.ready_line, highlight=False)
        for question in _QUESTIONS:
            show_answer(cluster.url, question)
        status = cluster.status()
        console = Console()
        console.print(workers_table(status))
        console.print(summary(status), highlight=False)
    except (ClusterError, AdminError, httpx.HTTPError) as error:
        print(f"tarragon: {error}", file=sys.stderr)
        return 1
    finally:
        cluster.stop()
    return 0


def make_model(notes: Console) -> Path:
    """Folder of the demo model, made first if need be, with a progress bar."""
    from tarragon.models.demo import ensure_demo_model

    with Progress(console=notes, transient=True) as progress:
        return Path(ensure_demo_model(progress=Bars(progress)))


def show_answer(url: str, question: str) -> None:
    """Print a question and its answer, piece by piece as it arrives; raises httpx.HTTPError."""
    print(f"\n> {question}", flush=True)
    for piece in stream_answer(url, question):
        print(piece, end="", flush=True)
    print("\n", flush=True)


def stream_answer(url: str, question: str) -> Iterator[str]:
    """Yield the text of a streamed chat completion; raises httpx.HTTPError."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": _TOKENS_MAX,
        "temperature": 0.0,
        "stream": True,
    }
    with (
        httpx.Client(timeout=_ANSWER_TIMEOUT_S, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data != line and data != "[DONE]":
                for choice in json.loads(data).get("choices", []):
                    yield choice.get("delta", {}).get("content") or ""
