"""`tarragon bench fidelity`: is the text ours as much as vLLM's own? (against monolithic vLLM, same weights)

Two bfloat16 engines that add in different orders never agree to the last bit, and neither does vLLM with
itself: its log-probs move with the batch a request is in. So that is the measure.

* Teacher-forced: the log-probs of given texts (`prompt_logprobs`). vLLM is asked one by one, all at once,
  in reverse order, in small chunks, and token by token (as it computes what it has generated itself); the
  spread of these among themselves is compared with the distance of ours from each of them. A position whose
  rows went through the same kernels in both batchings does not move at all, which on a CPU without AMX is
  most of them; the positions that do move are what is compared.
* vLLM in float32 stands for the model's own values: are we as near to them as vLLM is?
* Greedy: 64 tokens after each of the same texts' beginnings: how far do two runs agree, and with float32?
* With --compiled: vLLM as it compiles itself by default, against itself as it runs eagerly. It is the same
  engine with the same weights, so this too is how far apart two correct runs may be.

Otherwise the peer runs eagerly: compiling it takes minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from tarragon.bench import output
from tarragon.bench.load import REQUEST_TIMEOUT_S
from tarragon.bench.peer import MonolithicVllm
from tarragon.bench.stats import judge, paired_ratio, percentile
from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model

QUICK_LAYERS: Final = 4
LENGTHS: Final = (40, 150, 300, 700)
"""Tokens of the texts, in turn."""
PIECE_CHARACTERS: Final = 8_000
"""More than the longest text needs."""
BEGINNING_TOKENS: Final = 32
"""Tokens of a text that its greedy continuation starts from; those of LENGTHS[1] start from all of it."""
CONTINUED_TOKENS: Final = 64
CHUNK_TOKENS: Final = 256
MAX_MODEL_LEN: Final = 2_048
OURS: Final = "Tarragon"
OURS_ALONE: Final = "Tarragon, one by one"
ALONE: Final = "vLLM, one by one"
TOGETHER: Final = "vLLM, all at once"
REVERSED: Final = "vLLM, in reverse"
REFERENCE: Final = "vLLM in float32"
SMALL_CHUNKS: Final = f"vLLM, chunks of {CHUNK_TOKENS}"
AS_DECODED: Final = "vLLM, token by token"
COMPILED: Final = "vLLM, compiled"
QUANTILES: Final = {"median": 0.5, "p99": 0.99, "max": 1.0}
FARTHER_MAX: Final = 1.1
"""So many times as far from float32 as vLLM may we be, with the whole interval."""


class Text(msgspec.Struct, frozen=True):
    """What an engine said about a text: of each token but the first, its log-prob and the likeliest token."""

    logprobs: tuple[float, ...]
    likeliest: tuple[int, ...]
    continued: tuple[int, ...]
    """Tokens that it goes on with, greedily."""


def parser() -> argparse.ArgumentParser:
    options = output.parser("fidelity", __doc__)
    options.add_argument("--quick", action="store_true", help=f"{QUICK_LAYERS} layers, large chunks only")
    options.add_argument("--texts", type=int, default=32)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--compiled", action="store_true", help="ask vLLM in its compiled mode too")
    options.add_argument("--no-reference", action="store_true", help="leave vLLM in float32 out")
    options.add_argument(
        "--answers", type=Path, help="folder that keeps answers: a run that was broken off goes on from there"
    )
    return options


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    layers = options.layers or (QUICK_LAYERS if options.quick else None)
    model = options.model or ensure_demo_model(layers=layers)
    with tempfile.TemporaryDirectory() as scratch:
        runs = collect(model, options, options.answers or Path(scratch))
    found = output.result(
        "fidelity",
        {
            "model": model.name,
            "texts": options.texts,
            "lengths": LENGTHS,
            "continued_tokens": CONTINUED_TOKENS,
        },
        compare(runs),
    )
    output.write(found, options.json)
    print(report(found["metrics"]))
    output.plot(options.plot, lambda axes: draw(axes, found["metrics"]))
    return 0 if found["metrics"]["verdict"]["all"] else 1


# ------------------------------------------------------------------ asking


def collect(model: Path, options: argparse.Namespace, answers: Path) -> dict[str, list[Text]]:
    """Ask every engine in every batching; servers run one after the other.

    What ``answers`` holds already is not asked again: keep one folder for one model and one --seed.
    """
    answers.mkdir(parents=True, exist_ok=True)
    texts = english(model, options.texts, options.seed)
    runs: dict[str, list[Text]] = {}

    def wanted(*names: str) -> bool:
        """Take up these runs' kept answers; whether any is missing."""
        for name in names:
            file = answers / f"{name}.json"
            if file.exists():
                kept = msgspec.json.decode(file.read_bytes(), type=list[Text])
                if [len(text.logprobs) + 1 for text in kept] == [len(text) for text in texts]:
                    runs[name] = kept
        return not runs.keys() >= set(names)

    def ask(name: str, url: str, served: str, concurrency: int, order: int = 1) -> None:
        if name in runs:
            return
        start_s = time.monotonic()
        runs[name] = asyncio.run(everything(url, served, texts[::order], concurrency))[::order]
        (answers / f"{name}.json").write_bytes(msgspec.json.encode(runs[name]))
        print(f"{name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr)

    if wanted(OURS, OURS_ALONE):
        with Cluster(model, 2, 2, engine_args=[f"--max-model-len={MAX_MODEL_LEN}"]) as cluster:
            ask(OURS, cluster.url, model.name, len(texts))
            ask(OURS_ALONE, cluster.url, model.name, 1)
    if wanted(ALONE, TOGETHER, REVERSED):
        with vllm(model) as url:
            ask(ALONE, url, "model", 1)
            ask(TOGETHER, url, "model", len(texts))
            ask(REVERSED, url, "model", len(texts), -1)
    if not options.quick and wanted(SMALL_CHUNKS):
        with vllm(model, f"--max-num-batched-tokens={CHUNK_TOKENS}") as url:
            ask(SMALL_CHUNKS, url, "model", len(texts))
    if not options.quick and wanted(AS_DECODED):
        with vllm(model, "--max-num-batched-tokens=1", "--max-num-seqs=1") as url:
            ask(AS_DECODED, url, "model", 1)
    if options.compiled and wanted(COMPILED):
        with vllm(model, eager=False) as url:
            ask(COMPILED, url, "model", 1)
    if not options.no_reference and wanted(REFERENCE):
        with vllm(model, "--dtype=float32") as url:
            ask(REFERENCE, url, "model", 1)
    return runs


@contextlib.contextmanager
def vllm(model: Path, *flags: str, eager: bool = True) -> Iterator[str]:
    """Monolithic vLLM without prefix caching; yields its base URL."""
    common = ["--no-enable-prefix-caching", f"--max-model-len={MAX_MODEL_LEN}"]
    common += ["--enforce-eager"] if eager else []
    with MonolithicVllm(model, *common, *flags) as peer:
        yield peer.url


def english(model: Path, count: int, seed: int) -> list[list[int]]:
    """``count`` pieces of English as token ids: Python's own manual, cut to LENGTHS."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    rng = random.Random(seed)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    manual = "\n".join(topics[name] for name in sorted(topics))
    texts = []
    for index in range(count):
        start = rng.randrange(len(manual) - PIECE_CHARACTERS)
        tokens = tokenizer.encode(manual[start : start + PIECE_CHARACTERS]).ids
        texts.append(tokens[: LENGTHS[index % len(LENGTHS)]])
    return texts


async def everything(url: str, model: str, texts: list[list[int]], concurrency: int) -> list[Text]:
    """Log-probs and greedy continuation of every text, at most ``concurrency`` texts at a time."""
    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(text: list[int]) -> Text:
            async with gate:
                judged = await complete(session, url, model, text, 1, prompt_logprobs=1)
                beginning = text if len(text) == LENGTHS[1] else text[:BEGINNING_TOKENS]
                answer = await complete(
                    session, url, model, beginning, CONTINUED_TOKENS, return_token_ids=True
                )
            return Text(*prompt_judgement(judged["prompt_logprobs"], text), tuple(answer["token_ids"]))

        return list(await asyncio.gather(*(one(text) for text in texts)))


async def complete(
    session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], tokens: int, **params: Any
) -> dict[str, Any]:
    """One greedy completion; its only choice. Raises RuntimeError if it is refused."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    async with session.post(f"{url}/v1/completions", json={**body, **params}) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:500]}")
        choice: dict[str, Any] = (await response.json())["choices"][0]
    return choice


def prompt_judgement(
    prompt_logprobs: list[Any], text: list[int]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Log-prob of every token of ``text`` but the first, and the likeliest token at its place."""
    logprobs, likeliest = [], []
    for token, alternatives in zip(text[1:], prompt_logprobs[1:], strict=True):
        logprobs.append(float(alternatives[str(token)]["logprob"]))
        likeliest.append(next(int(other) for other, found in alternatives.items() if found["rank"] == 1))
    return tuple(logprobs), tuple(likeliest)


# ------------------------------------------------------------------ comparing


def compare(runs: dict[str, list[Text]]) -> dict[str, Any]:
    """Distances of every pair of runs, and whether ours lie within vLLM's own spread."""
    peers = [name for name in runs if name not in (OURS, OURS_ALONE, REFERENCE, COMPILED)]
    own = {f"{a} | {b}": distance(runs[a], runs[b]) for a, b in itertools.combinations(peers, 2)}
    ours = {f"{OURS} | {peer}": distance(runs[OURS], runs[peer]) for peer in peers}
    metrics: dict[str, Any] = {
        "positions": sum(len(text.logprobs) for text in runs[OURS]),
        "vllm_with_itself": own,
        "tarragon_with_vllm": ours,
        "tarragon_with_itself": distance(runs[OURS], runs[OURS_ALONE]),
    }
    if COMPILED in runs:
        metrics["compiled_with_eager"] = distance(runs[COMPILED], runs[ALONE])
    if REFERENCE in runs:
        metrics["from_float32"] = {
            name: distance(found, runs[REFERENCE]) for name, found in runs.items() if name != REFERENCE
        }
        metrics["farther_than_vllm"] = farther(runs)
    metrics["verdict"] = verdict(metrics)
    return metrics


def distance(a: Sequence[Text], b: Sequence[Text]) -> dict[str, float]:
    """How far two runs are apart: log-probs in nats, agreements as shares."""
    pairs = list(zip(a, b, strict=True))
    apart = [abs(x - y) for p, q in pairs for x, y in zip(p.logprobs, q.logprobs, strict=True)]
    moved = [nats for nats in apart if nats > 0]
    same = [x == y for p, q in pairs for x, y in zip(p.likeliest, q.likeliest, strict=True)]
    return {
        "mean": sum(apart) / len(apart),
        **{name: percentile(apart, share) for name, share in QUANTILES.items()},
        "moved": len(moved) / len(apart),
        "moved_mean": sum(moved) / len(moved) if moved else 0.0,
        "moved_p99": percentile(moved, 0.99),
        "likeliest_equal": sum(same) / len(same),
        "texts_equal": sum(p.continued == q.continued for p, q in pairs) / len(pairs),
        "tokens_before_difference": sum(agreeing(p.continued, q.continued) for p, q in pairs) / len(pairs),
    }


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def farther(runs: dict[str, list[Text]]) -> dict[str, Any]:
    """Our mean distance from float32 over vLLM's, text by text."""
    ours, theirs = (
        [distance([text], [exact])["mean"] for text, exact in zip(runs[name], runs[REFERENCE], strict=True)]
        for name in (OURS, ALONE)
    )
    return paired_ratio(ours, theirs)


def verdict(metrics: dict[str, Any]) -> dict[str, bool]:
    """Ours against the widest that vLLM is apart from itself, and against vLLM as seen from float32."""
    own, ours = metrics["vllm_with_itself"].values(), metrics["tarragon_with_vllm"].values()

    def within(name: str) -> bool:
        return bool(max(found[name] for found in ours) <= max(found[name] for found in own))

    checks = {
        "moved_mean_within_vllm_spread": within("moved_mean"),
        "moved_p99_within_vllm_spread": within("moved_p99"),
        "max_within_vllm_spread": within("max"),
        "the_same_in_every_batching": metrics["tarragon_with_itself"]["max"] == 0.0,
    }
    if "from_float32" in metrics:
        far, ratio = metrics["from_float32"], metrics["farther_than_vllm"]
        checks["as_near_to_float32"] = judge(ratio["ci95"], ratio["n"], at_most=FARTHER_MAX) == "holds"
        eager = [name for name in far if name not in (OURS, OURS_ALONE, COMPILED)]
        least = min(far[name]["tokens_before_difference"] for name in eager)
        checks["greedy_agrees_with_float32_no_less"] = far[OURS]["tokens_before_difference"] >= least
    return {**checks, "all": all(checks.values())}


# ------------------------------------------------------------------ showing


def report(metrics: dict[str, Any]) -> str:
    columns = {
        "mean": "mean",
        **dict(zip(QUANTILES, QUANTILES, strict=True)),
        "moved": "moved",
        "moved_mean": "mean of those",
        "moved_p99": "p99 of those",
        "likeliest_equal": "argmax same",
        "texts_equal": "texts same",
        "tokens_before_difference": "tokens same",
    }
    pairs = {
        **metrics["vllm_with_itself"],
        **metrics["tarragon_with_vllm"],
        f"{OURS} | {OURS_ALONE}": metrics["tarragon_with_itself"],
        **({f"{COMPILED} | {ALONE}": compiled} if (compiled := metrics.get("compiled_with_eager")) else {}),
        **{f"{name} | {REFERENCE}": found for name, found in metrics.get("from_float32", {}).items()},
    }
    rows = [[name, *(found[column] for column in columns)] for name, found in pairs.items()]
    verdicts = [f"{name}: {'yes' if true else 'NO'}" for name, true in metrics["verdict"].items()]
    lines = [
        output.table(["log-probs apart (nats)", *columns.values()], rows),
        f"{metrics['positions']} positions",
    ]
    if ratio := metrics.get("farther_than_vllm"):
        low, high = ratio["ci95"]
        lines.append(
            f"from float32, of vLLM's distance: {ratio['median']:.2f} ({low:.2f} to {high:.2f}) a text"
        )
    return "\n".join([*lines, *verdicts])


def draw(axes: Any, metrics: dict[str, Any]) -> None:
    """Mean and 99th percentile of the distances, vLLM with itself above, ours below."""
    pairs = {**metrics["vllm_with_itself"], **metrics["tarragon_with_vllm"]}
    for offset, name in ((-0.2, "mean"), (0.2, "p99")):
        at = [index + offset for index in range(len(pairs))]
        axes.barh(at, [found[name] for found in pairs.values()], 0.4, label=name)
    axes.set_yticks(range(len(pairs)), list(pairs))
    axes.invert_yaxis()
    axes.set_xlabel("teacher-forced log-probs apart, nats")
    axes.legend()
