"""Every command in the documentation is run, or checked as far as its length allows.

RULES says for each command what is done with it; one that fits no rule fails the test. What is run talks to
a real cluster of 2 + 2 workers with the first layers of the demo model, in the order of the pages; before
each command the cluster is whole again.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from tests.cluster.observe import is_open, until
from tests.docs_pages import PAGES, ROOT, Command, all_commands, inline_code, name_of
from tests.pool import Clusters
from tests.workload import SMALL_LAYERS

from tarragon import cli
from tarragon.agent import preflight
from tarragon.cluster import Cluster
from tarragon.config import Config
from tarragon.gateway.flag_table import APPLIES
from tarragon.models.demo import ensure_demo_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

RULES = (
    # what is done, and with which commands
    ("terminal", r"\.venv/bin/tarragon top"),
    ("run", r"\.venv/bin/tarragon (status|kill|drain|add|config|demo-model)\b.*"),
    ("run", r"curl -sN? .*"),
    ("dry run", r"([A-Z_]+=\S+ )?(\.venv/bin/)?tarragon serve .*"),
    ("flags", r"(\.venv/bin/)?tarragon (bench|simulate)\b.*"),  # minutes
    ("pytest", r"([A-Z_]+=\S+ )*\.venv/bin/python -m pytest .*"),  # minutes
    ("make", r"([A-Z_]+=\S+ )*make [a-z]+( [A-Z_]+=\S+)*"),  # minutes, or all of these tests
    ("not run", r"apt install chromium"),  # changes the system
    ("not run", r"\.venv/bin/playwright install chromium"),  # downloads a browser
)
_CHANGES = re.compile(r"tarragon (kill|drain|add) |/(kill|drain|add) |\"restart\"|/inject ")
"""Commands after which another process, or one more or less, is there."""
PLACEHOLDERS = {"MODEL", "demo"}
WHOLE_TIMEOUT_S = 60.0
RUN_TIMEOUT_S = 60.0
SCREEN_TIMEOUT_S = 30.0
POLL_S = 0.05
BIN = Path(sys.executable).parent
COMMANDS = all_commands()
RECORDS = {"docs/performance.md", "docs/evaluation.md"}
"""Pages that tell what was run when; a flag may be gone since."""
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


def rule(command: Command) -> str | None:
    """What is to be done with a command; None if nobody has said."""
    return next((kind for kind, pattern in RULES if re.fullmatch(pattern, command.text)), None)


def those(kind: str) -> Any:
    found = [command for command in COMMANDS if rule(command) == kind]
    return pytest.mark.parametrize(
        "command", found, ids=lambda command: f"{command.where} {command.text}"[:90]
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where} {command.text}"[:90])
def test_every_command_is_classified(command: Command) -> None:
    assert rule(command), f"{command.where}: say in RULES what is to be done with: {command.text}"


# ------------------------------------------------------------------ what is not started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands are run, one after the other, so that one finds the files of another."""
    made = tmp_path_factory.mktemp("commands")
    (made / "docs").mkdir()
    return made


@pytest.fixture(scope="module")
def model() -> Path:
    return ensure_demo_model(layers=SMALL_LAYERS)


def help_of(*argv: str) -> str:
    """What a command prints with --help."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*argv, "--help"])
    return out.getvalue()


def flags_of(argv: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in argv if word.startswith("--")}


@those("flags")
def test_long_ones_have_these_flags(command: Command) -> None:
    words = command.argv[1:]
    name = words[:2] if words[0] == "bench" else words[:1]
    known = set(_FLAG.findall(help_of(*name)))
    assert known, f"{command.where}: there is no help for {' '.join(name)}"
    assert flags_of(words) <= known


@those("make")
def test_make_knows_the_target(command: Command) -> None:
    done = subprocess.run(["make", "--dry-run", *command.argv[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@cache
def pytest_help() -> str:
    command = [sys.executable, "-m", "pytest", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@those("pytest")
def test_pytest_knows_flags_and_files(command: Command) -> None:
    for word in command.argv[3:]:
        if word.startswith("-"):
            assert re.search(rf"(^|\s){re.escape(word)}\b", pytest_help()), f"pytest has no {word}"
        elif word.startswith("tests/"):
            assert (ROOT / word).exists(), f"there is no {word}"


@those("dry run")
def test_serve_understands_it(
    command: Command,
    folder: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    # Whether it fits is another test's question; here other clusters may run beside.
    monkeypatch.setattr(preflight, "memory_available_bytes", lambda: 1 << 40)
    if "--config" in command.argv:
        (folder / "tarragon.toml").write_text("[tarragon]\nexpert_workers = 2\n")
    for name, value in command.assignments.items():
        monkeypatch.setenv(name, value)
    argv = [str(model) if word in PLACEHOLDERS else word for word in command.argv[1:]]
    assert cli.main([*argv, *([] if "--dry-run" in argv else ["--dry-run"])]) == 0, capsys.readouterr().err
    passed_on = typer.main.get_command(cli.app).commands["serve"].make_context("serve", argv[1:]).args  # type: ignore[attr-defined]
    assert {flag[2:].replace("-", "_") for flag in flags_of(passed_on)} <= APPLIES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_exist(page: Path) -> None:
    """Those between backticks: what they run exists, whatever stands for their arguments."""
    subcommands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in inline_code(page):
        words = code.split()
        if words[0].rpartition("/")[2] == "tarragon" and len(words) > 1 and words[1][0] != "-":
            assert words[1] in subcommands, f"{name_of(page)}: {code}"
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets, f"{name_of(page)}: {code}"


def known_flags() -> set[str]:
    """Every flag of every command, of the benchmarks, and those of vLLM that are decided."""
    from tarragon.gateway.flag_table import OWN, REFUSED

    commands = typer.main.get_command(cli.app).commands.values()  # type: ignore[attr-defined]
    own = {
        name for command in commands for each in command.params for name in (*each.opts, *each.secondary_opts)
    }
    vllm = {
        f"--{prefix}{name.replace('_', '-')}" for name in (*APPLIES, *OWN, *REFUSED) for prefix in ("", "no-")
    }
    sources = [*(ROOT / "src/tarragon/bench").glob("*.py"), ROOT / "src/tarragon/simulate/__init__.py"]
    scripts = [ROOT / "docs/make_screenshots.py"]
    texts = [file.read_text(encoding="utf-8") for file in (*sources, *scripts)]
    return {*own, *vllm, "--help", "--strict", *(flag for text in texts for flag in _FLAG.findall(text))}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_the_text_exist(page: Path) -> None:
    if name_of(page) in RECORDS:
        return
    named = {flag for code in inline_code(page) for flag in _FLAG.findall(code)}
    assert named - known_flags() - {"--ssl-"} == set()


# ------------------------------------------------------------------ a real cluster


@pytest.fixture
def cluster(clusters: Clusters) -> Cluster:
    """One whose workers may be told where to die, and which takes requests."""
    running = clusters.get(2, 2, failpoints=True)
    until("the gateway takes no requests", lambda: is_open(running), WHOLE_TIMEOUT_S)
    return running


def as_here(text: str, cluster: Cluster, model: Path) -> str:
    """The command with this machine's paths and ports; curl fails if the answer is an error."""
    defaults = Config()
    replaced = (
        (f"http://127.0.0.1:{defaults.port}", cluster.url),
        (f"http://127.0.0.1:{defaults.admin_port}", cluster.admin_url),
        (".venv/bin/", f"{BIN}/"),
        ("curl ", "curl --fail --show-error --max-time 30 "),
    )
    for there, here in replaced:
        text = text.replace(there, here)
    return re.sub(r"\bMODEL\b", str(model), text)


def environment(cluster: Cluster) -> dict[str, str]:
    return {**os.environ, "TARRAGON_ADMIN_PORT": cluster.admin_url.rpartition(":")[2]}


@those("run")
def test_commands_work(command: Command, cluster: Cluster, model: Path, folder: Path) -> None:
    if command.argv[0] == "curl" and not shutil.which("curl"):
        pytest.skip("NOT RUN: there is no curl")
    before = cluster.pids()
    done = subprocess.run(
        ["bash", "-c", as_here(command.text, cluster, model)],
        cwd=folder,
        env=environment(cluster),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    assert done.returncode == 0, f"{command.where}: {command.text}\n{done.stdout}{done.stderr}"
    assert ">" in command.text or done.stdout, "it says nothing"
    if "/inject" in command.text:  # armed; it happens under the next request
        body = {"prompt": "Once upon a time", "max_tokens": 8}
        assert httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).status_code == 200
    if _CHANGES.search(command.text):
        until(f"nothing happened: {command.text}", lambda: cluster.pids() != before, WHOLE_TIMEOUT_S)


@those("terminal")
def test_screens_open_and_close(command: Command, cluster: Cluster, model: Path) -> None:
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        ["bash", "-c", as_here(command.text, cluster, model)],
        env={**environment(cluster), "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen, end_s = b"", time.monotonic() + SCREEN_TIMEOUT_S
    try:
        while running.poll() is None and time.monotonic() < end_s:
            if select.select([ours], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other end is closed
                    seen += os.read(ours, 65_536)
            if b"ew-1" in seen:
                os.write(ours, b"q")
        assert running.poll() == 0, seen[-2_000:].decode(errors="replace")
    finally:
        running.kill()
        running.wait()
        os.close(ours)
