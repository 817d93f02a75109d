"""`tarragon demo`: the demo model on 2 + 2 workers, two answers as they are written, and who did what."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tarragon.admin import AdminError
from tarragon.cluster import Cluster, ClusterError
from tarragon.display import Bars, number, state_text, summary
from tarragon.models.shape import DTYPE_BYTES, MoeModel, read_model

_QUESTIONS: Final = (
    "What is tarragon, and what is it good with? Answer in two sentences.",
    "Tell me in three sentences why a team can do more than one person.",
)
_KV_CACHE_BYTES: Final = 256 << 20
_CONTEXT_TOKENS_MAX: Final = 2_048
_TOKENS_MAX: Final = 96
_ANSWER_TIMEOUT_S: Final = 120.0
_REPORT_WAIT_S: Final = 2.0
"""Until the workers have reported what they did (twice their default interval)."""


def main(args: Sequence[str]) -> int:
    """Run the demo; return the exit code. Raises DemoModelError if the model cannot be made."""
    notes = Console(stderr=True)
    folder = make_model(notes)
    cluster = Cluster(
        folder,
        attention_workers=2,
        expert_workers=2,
        # Compiling would make answers a third faster and the first start minutes longer.
        engine_args=(f"--max-model-len={_CONTEXT_TOKENS_MAX}",),
        kv_cache_bytes=_KV_CACHE_BYTES,
    )
    try:
        with notes.status("starting 2 attention and 2 expert workers"):
            cluster.start()
        notes.print(cluster.ready_line, highlight=False)
        show_answers(cluster.url, _QUESTIONS)
        time.sleep(_REPORT_WAIT_S)
        status = cluster.status()
        console = Console()
        console.print(work_table(status, read_model(folder)))
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


def work_table(status: Mapping[str, Any], model: MoeModel) -> Table:
    """Who did what: per worker the tokens, the (token, expert) pairs, the bytes of their rows."""
    table = Table(title="Who did what", box=SIMPLE)
    for title in ("worker", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("tokens", "pairs", "bytes moved", "experts held"):
        table.add_column(title, justify="right", no_wrap=True)
    # Every token passes every MoE layer, and there the experts that its gate selects.
    pairs_per_token = len(model.moe_layers) * model.top_k
    row_bytes = model.hidden * DTYPE_BYTES[model.dtype]
    for worker in status["workers"]:
        pairs = worker.get("counters", {}).get("pairs")
        is_attention = worker["role"] == "attention" and pairs is not None
        table.add_row(
            worker["id"],
            state_text(worker),
            number(pairs / pairs_per_token if is_attention else None),
            number(pairs),
            number(None if pairs is None else 2 * pairs * row_bytes),
            number(worker.get("experts_resident")),
        )
    return table


def show_answers(url: str, questions: Sequence[str]) -> None:
    """Ask all questions at once; print the answers in order, the first as it is written.

    Raises httpx.HTTPError.
    """
    with ThreadPoolExecutor(len(questions)) as pool:
        others = [pool.submit(lambda q: list(stream_answer(url, q)), question) for question in questions[1:]]
        for question in questions:
            pieces = stream_answer(url, question) if question == questions[0] else others.pop(0).result()
            print(f"\n> {question}", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)


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
