"""`tarragon bench sametext`: is every text the same wherever and with whomever it is computed? (exactness)

Prompts of mixed length, greedy and sampled in turn, some longer than a prefill chunk, sent at once to
clusters of different shapes and one by one to the first of them. Tokens, log-probs, alternatives, finish
reasons and usage must be identical bit for bit. `make test` runs a part of it on four layers; the whole
takes a while, so that it can be run in pieces: answers are kept in a folder, and compared when all are there.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import aiohttp

from tarragon.bench import output
from tarragon.bench.load import REQUEST_TIMEOUT_S
from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model

SHAPES: Final = ("1+1", "2+2", "2+4")
ALONE: Final = "one by one"
LENGTHS: Final = (1, 3, 9, 17, 40, 90, 150)
CHUNK_TOKENS: Final = 256
LONG_TOKENS: Final = 600
LONG_EVERY: Final = 16
VOCABULARY: Final = 40_000
"""Prompts are drawn from the first so many tokens."""
TOKENIZER_SIZE: Final = 49_152
RANDOM_LAYERS: Final = 4
REPORT_S: Final = 15.0
"""After this, the workers' reports know of the last answer."""
LOGPROBS: Final = 2


def parser() -> argparse.ArgumentParser:
    options = output.parser("sametext", __doc__)
    options.add_argument(
        "--shapes", nargs="+", default=SHAPES, help="attention+expert workers, first: reference"
    )
    options.add_argument("--prompts", type=int, default=64)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--kind", help="random weights of this architecture in place of the demo model")
    options.add_argument("--only", nargs="+", help=f'run only these pieces: shapes, "{ALONE}"')
    options.add_argument("--answers", type=Path, help="folder that keeps answers between pieces")
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or (
            _random_weights(options, Path(scratch))
            if options.kind
            else ensure_demo_model(layers=options.layers)
        )
        answers = options.answers or Path(scratch) / "answers"
        answers.mkdir(parents=True, exist_ok=True)
        for piece in options.only or [*options.shapes, ALONE]:
            run_piece(piece, model, options, answers)
        found = compare([*options.shapes, ALONE], model.name, answers)
    settings = {
        "model": model.name,
        "prompts": options.prompts,
        "output_tokens": options.tokens,
        "chunk_tokens": CHUNK_TOKENS,
        "long_tokens": LONG_TOKENS,
    }
    output.write(output.result("sametext", settings, found), options.json)
    print(report(found))
    output.plot(options.plot, lambda axes: draw(axes, found))
    return 0 if not found["missing"] and found["all_identical"] else 1


def _random_weights(options: argparse.Namespace, folder: Path) -> Path:
    """A random checkpoint of ``options.kind`` with the demo model's tokenizer and vocabulary."""
    from tarragon.testing.checkpoints import make_checkpoint

    tokenizer = ensure_demo_model(layers=RANDOM_LAYERS)
    made = make_checkpoint(options.kind, folder / options.kind, layers=RANDOM_LAYERS, vocab=TOKENIZER_SIZE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, made / name)
    return made


def requests(count: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """``count`` bodies of /v1/completions: greedy, seeded sampling, and sampling with penalties in turn."""
    rng = random.Random(seed)
    bodies = []
    for index in range(count):
        length = LONG_TOKENS if index % LONG_EVERY == LONG_EVERY // 2 else rng.choice(LENGTHS)
        body: dict[str, Any] = {
            "prompt": [rng.randrange(5, VOCABULARY) for _ in range(length)],
            "max_tokens": tokens,
            "ignore_eos": True,
            "logprobs": LOGPROBS,
            "return_token_ids": True,
            "temperature": 0,
        }
        if index % 2:
            body |= {"temperature": 0.8, "top_p": 0.95, "seed": index}
        if index % 4 == 3:
            body |= {"top_k": 40, "presence_penalty": 0.4, "repetition_penalty": 1.1}
        bodies.append(body)
    return bodies


def run_piece(piece: str, model: Path, options: argparse.Namespace, answers: Path) -> None:
    """Serve one shape, ask everything, keep the answers as JSON."""
    attention, expert = map(int, (options.shapes[0] if piece == ALONE else piece).split("+"))
    flags = [f"--max-num-batched-tokens={CHUNK_TOKENS}", "--max-model-len=2048"]
    bodies = requests(options.prompts, options.tokens, options.seed)
    with Cluster(model, attention, expert, engine_args=flags) as cluster:
        start_s = time.monotonic()
        given = asyncio.run(ask(cluster.url, model.name, bodies, 1 if piece == ALONE else len(bodies)))
        took_s = time.monotonic() - start_s
        status = reported(cluster)
    if not status["exact"]:
        raise RuntimeError(f"the cluster does not claim to be exact: {status['exact_reason']}")
    idle = [w["id"] for w in status["workers"] if w.get("counters", {}).get("pairs") == 0]
    if idle and piece != ALONE:
        raise RuntimeError(f"{piece} proves nothing: {idle} did no work")
    print(f"{piece}: {len(given)} answers in {took_s:.0f} s", file=sys.stderr)
    kept = {"model": model.name, "answers": given, "seconds": took_s}
    (answers / f"{piece}.json").write_text(json.dumps(kept))


def reported(cluster: Cluster) -> dict[str, Any]:
    """The status once every worker has said that it did something, or after REPORT_S."""
    deadline_s = time.monotonic() + REPORT_S
    while True:
        status = cluster.status()
        counters = [w.get("counters", {}) for w in status["workers"] if w["role"] in ("attention", "expert")]
        if all(found.get("pairs") for found in counters) or time.monotonic() > deadline_s:
            return status
        time.sleep(0.1)


async def ask(url: str, model: str, bodies: list[dict[str, Any]], concurrency: int) -> list[dict[str, Any]]:
    """Send all bodies, at most ``concurrency`` at a time; what must be equal of each answer, in order."""
    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(body: dict[str, Any]) -> dict[str, Any]:
            post = session.post(f"{url}/v1/completions", json={"model": model, **body})
            async with gate, post as response:
                if response.status != 200:
                    raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:500]}")
                whole = await response.json()
            choice, usage = whole["choices"][0], whole["usage"]
            return {
                "tokens": choice["token_ids"],
                "logprobs": choice["logprobs"]["token_logprobs"],
                "alternatives": choice["logprobs"]["top_logprobs"],
                "finish_reason": choice["finish_reason"],
                "usage": {name: value for name, value in usage.items() if isinstance(value, int)},
            }

        return list(await asyncio.gather(*(one(body) for body in bodies)))


def compare(pieces: list[str], model: str, answers: Path) -> dict[str, Any]:
    """Which answers differ from those of the first piece, of those pieces that have been run."""
    kept = {}
    for piece in pieces:
        file = answers / f"{piece}.json"
        if file.exists() and (read := json.loads(file.read_text()))["model"] == model:
            kept[piece] = read
    reference = kept.get(pieces[0], {}).get("answers")
    found: dict[str, Any] = {
        "missing": [piece for piece in pieces if piece not in kept],
        "seconds": {piece: round(read["seconds"], 1) for piece, read in kept.items()},
        "digest": {piece: _digest(read["answers"]) for piece, read in kept.items()},
        "differing": {},
    }
    for piece, read in kept.items():
        if reference is not None:
            found["differing"][piece] = differing(read["answers"], reference)
    found["all_identical"] = bool(kept) and len(set(found["digest"].values())) == 1
    return found


def differing(a: list[Any], b: list[Any]) -> list[int]:
    """Numbers of the answers that are not identical, or that only one of them has."""
    common = min(len(a), len(b))
    return [index for index in range(max(len(a), len(b))) if index >= common or a[index] != b[index]]


def _digest(answers: list[Any]) -> str:
    return hashlib.sha256(json.dumps(answers, sort_keys=True).encode()).hexdigest()[:16]


def report(found: dict[str, Any]) -> str:
    rows = [
        [piece, found["digest"][piece], len(found["differing"].get(piece, [])), seconds]
        for piece, seconds in found["seconds"].items()
    ]
    lines = [output.table(["workers (attention+expert)", "digest", "differing", "seconds"], rows)]
    if found["missing"]:
        lines.append(f"not run yet: {', '.join(found['missing'])}")
    lines.append("identical, bit for bit" if found["all_identical"] else "NOT identical")
    return "\n".join(lines)


def draw(axes: Any, found: dict[str, Any]) -> None:
    """Answers that differ from the reference, by piece: flat at zero if all is well."""
    counts = {piece: len(numbers) for piece, numbers in found["differing"].items()}
    axes.bar(list(counts), list(counts.values()))
    axes.set_ylabel("answers that differ from the first")
    axes.set_ylim(0, max(1, *counts.values()) if counts else 1)
