"""`tarragon bench evaluation`: all of the paper's figures, one after the other, and a page made of them.

Each benchmark runs as a process of its own with a hard limit of time, within a budget for all of them.
Results (JSON) and pictures (PNG) go into one folder, with what ran and how it ended; the page is made of
that folder alone, also by ``--from DIR`` without running anything. One that fails or takes too long is shown
as failed, with what it had measured until then, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tarragon import __version__
from tarragon.agent.process import die_with_parent
from tarragon.bench.evaluation_page import EvaluationError, write_page
from tarragon.bench.evaluation_plan import FULL_BUDGET_S, PARTS, QUICK_BUDGET_S, Part, planned
from tarragon.bench.machine import machine
from tarragon.bench.progress import Bar

RECORD: Final = "evaluation.json"
"""What ran, when, and how it ended."""
LOG_TAIL_BYTES: Final = 4_000
STOP_TIMEOUT_S: Final = 20.0
"""Between SIGTERM and SIGKILL of a benchmark that takes too long: its servers have to be stopped."""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="tarragon bench evaluation",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    options.add_argument("--quick", action="store_true", help="small sizes, within 10 minutes")
    options.add_argument(
        "--only", nargs="+", choices=[part.key for part in PARTS], help="run these, keep the others' results"
    )
    options.add_argument(
        "--out", type=Path, help="folder of results (default: build/evaluation, build/evaluation-quick)"
    )
    options.add_argument("--from", dest="source", type=Path, metavar="DIR", help="only make the page again")
    options.add_argument(
        "--docs",
        type=Path,
        help="folder of the page, evaluation.md, and of its images "
        "(default: docs; of a quick run: the folder of results)",
    )
    options.add_argument("--budget-s", type=float, help="seconds for all of it (default: 5400, quick 600)")
    return options


def main(argv: list[str]) -> int:
    """Exit code 1 if any part failed or was not run, 2 if there is no result to make a page of."""
    options = parser().parse_args(argv)
    folder = (
        options.source
        or options.out
        or Path("build/evaluation-quick" if options.quick else "build/evaluation")
    )
    record = run(options, folder) if options.source is None else read_record(folder)
    docs = options.docs or (folder if record["quick"] else Path("docs"))
    page = write_page(record, folder, docs)
    print(page)
    failed = [part["key"] for part in record["parts"] if part["error"]]
    for key in failed:
        print(f"tarragon: {key} failed", file=sys.stderr)
    return 1 if failed else 0


def read_record(folder: Path) -> dict[str, Any]:
    """What ``run`` wrote into ``folder``. Raises EvaluationError."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"there is no evaluation in {folder}: {error}") from error
    return record


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all parts within the budget; the record is written after each.

    With ``only``, what an earlier run in the same folder says of the other parts stays.
    """
    parts = [part for part in planned(options.quick) if not options.only or part.key in options.only]
    if unplanned := set(options.only or ()) - {part.key for part in parts}:
        raise EvaluationError(f"there is no quick size of {', '.join(sorted(unplanned))}")
    folder.mkdir(parents=True, exist_ok=True)
    earlier = {one["key"]: one for one in _earlier(options, folder)}
    budget_s = options.budget_s or (QUICK_BUDGET_S if options.quick else FULL_BUDGET_S)
    record: dict[str, Any] = {
        "name": "evaluation",
        "version": __version__,
        "started": now(),
        "quick": options.quick,
        "budget_s": budget_s,
        "machine": machine(),
        "parts": [],
    }
    start_s = time.monotonic()
    with Bar("evaluation", sum(part.planned_s(options.quick) for part in parts)) as bar:
        for part in parts:
            bar.doing(part.key)
            left_s = budget_s - (time.monotonic() - start_s)
            ended = run_part(part, folder, options.quick, left_s)
            earlier[part.key] = ended
            record["parts"] = [earlier[one.key] for one in PARTS if one.key in earlier]
            record["took_s"] = sum(one["took_s"] for one in record["parts"])
            (folder / RECORD).write_text(json.dumps(record, indent=1))
            how = f"FAILED: {ended['error']}" if ended["error"] else "done"
            bar.done(part.planned_s(options.quick), f"{part.key}: {how} in {ended['took_s']:.0f} s")
    return record


def now() -> str:
    """Date and time (UTC)."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _earlier(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    if not options.only or not (folder / RECORD).exists():
        return []
    record = read_record(folder)
    if record["quick"] != options.quick:
        raise EvaluationError(f"{folder} holds a run of the other kind: name another folder with --out")
    parts: list[dict[str, Any]] = record["parts"]
    return parts


def run_part(part: Part, folder: Path, quick: bool, left_s: float) -> dict[str, Any]:
    """Run one benchmark in ``folder``; how it ended, with a sentence in "error" if not as it should."""
    files = {kind: folder / f"{part.key}.{kind}" for kind in ("json", "png", "log")}
    for file in files.values():
        file.unlink(missing_ok=True)  # of an earlier run
    command = ["tarragon", "bench", part.bench, *part.arguments(quick)]
    outputs = ["--json", str(files["json"]), "--plot", str(files["png"])]
    ended: dict[str, Any] = {
        "key": part.key,
        "command": shlex.join(command),
        "started": now(),
        "took_s": 0.0,
        "exit_code": None,
        "error": "",
    }
    if left_s < part.planned_s(quick) / 2:
        return {**ended, "error": f"not run: of the budget {max(0.0, left_s):.0f} s were left"}
    limit_s = part.limit_s(quick, left_s)
    start_s = time.monotonic()
    with files["log"].open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tarragon", *command[1:], *outputs],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            ended["error"] = f"stopped after its limit of {limit_s:.0f} s"
            code = stop(process)
        except BaseException:  # Ctrl-C, or our own end: nothing is left behind
            stop(process)
            raise
    if code and not ended["error"]:
        ended["error"] = last_sentence(files["log"]) or f"it ended with exit code {code}"
    return {**ended, "exit_code": code, "took_s": time.monotonic() - start_s}


def stop(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, so that it stops its servers, then SIGKILL to what is left of its session."""
    process.terminate()
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def last_sentence(log: Path) -> str:
    """The last line that a benchmark said about its own failure, or the last line at all."""
    lines = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    own = [line.removeprefix("tarragon: ") for line in lines if line.startswith("tarragon: ")]
    return (own or lines or [""])[-1][:300]


def _tail(log: Path) -> str:
    return log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace")
