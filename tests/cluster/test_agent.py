"""The node agent with tiny fake workers: real forks, signals and deaths. The test is the orchestrator."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_workers import FRAME_BYTES_MAX, RELAY_SECRET

from tarragon.agent.preload import PRELOAD_MODULES
from tarragon.agent.process import children_of
from tarragon.messages import (
    Alive,
    Control,
    Hello,
    SignalWorker,
    StartWorker,
    Stop,
    WorkerExited,
    WorkerStarted,
)
from tarragon.transport.local import Connection, Listener

pytestmark = pytest.mark.cluster
TIMEOUT_S = 60.0
GENERATION_1 = 1 << 20

PROGRAM = """
import importlib, sys
from tarragon.agent import environment
environment.prepare()
from tarragon.agent.agent import NodeAgent
from tarragon.config import Config
import msgspec
roles = ("orchestrator", "attention", "expert", "gateway", "store")
config = msgspec.json.decode(sys.argv[1], type=Config)
console = importlib.import_module("console_of_test").main if sys.argv[3] == "console" else None
def check():
    if "--bad" in sys.argv:
        raise ValueError("--bad is no flag")
agent = NodeAgent(config, "model", modules=dict.fromkeys(roles, "fake_workers"),
                  preload_modules=sys.argv[2].split(), console=console, check=check,
                  stop_with_pid=int(sys.argv[4]))
sys.exit(agent.run())
"""


def path_with(*folders: Path) -> str:
    return ":".join(str(folder) for folder in (*folders, Path(__file__).parent, *sys.path))


class Agent:
    """A node agent in a process of its own, and the link of its orchestrator, which the test holds."""

    def __init__(self, folder: Path, **options: Any) -> None:
        settings = {
            "shutdown_grace_s": 1.0,
            "connect_timeout_s": 5.0,
            "orchestrator_start_timeout_s": 5.0,
            **options.pop("settings", {}),
        }
        relay = f"tarragon-test/{secrets.token_hex(8)}"
        self.listener = Listener(
            "\0" + relay, RELAY_SECRET, frame_bytes_max=FRAME_BYTES_MAX, handshake_timeout_s=5
        )
        self.log_path = folder / "log"
        environ = {**os.environ, "TEST_RELAY": relay, "PYTHONPATH": path_with(), **options.get("environ", {})}
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            msgspec.json.encode(settings).decode(),
            options.get("preload", ""),
        ]
        command += [
            options.get("console", ""),
            str(options.get("stop_with_pid", 0)),
            *options.get("flags", []),
        ]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        self.link: Connection | None = None

    def accept(self) -> Control:
        """Wait for the (next) orchestrator to be reached by the agent; return the agent's first word."""
        self.link = self.listener.accept(TIMEOUT_S)
        return self.receive()

    def send(self, message: Control) -> None:
        assert self.link is not None
        self.link.send_control(message)

    def receive(self) -> Control:
        assert self.link is not None
        message = self.link.recv_control(TIMEOUT_S)
        assert message is not None, self.log()
        return message

    def start(self, worker_id: str, epoch: int, role: Any = "attention") -> int:
        """Have a worker started and return its pid once it has said that it is ready."""
        self.send(StartWorker(worker_id=worker_id, role=role, epoch=epoch))
        started = self.receive()
        assert isinstance(started, WorkerStarted)
        assert (started.worker_id, started.epoch) == (worker_id, epoch)
        return started.pid

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_log(self, text: str) -> None:
        wait(lambda: text in self.log(), f"{text!r} in the log")

    def end(self) -> None:
        for pid in [*descendants(self.process.pid), self.process.pid]:
            if self.process.poll() is None or pid != self.process.pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(TIMEOUT_S)
        self.listener.close()
        if self.link is not None:
            self.link.close()


def wait(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"no {what} after {TIMEOUT_S} s"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    return state(pid) not in "ZX"


def state(pid: int) -> str:
    """The kernel's letter for what a process does; X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def descendants(pid: int) -> list[int]:
    found = []
    for child in children_of(pid):
        found += [child, *descendants(child)]
    return found


def by_title(agent: Agent, worker_id: str) -> int:
    title = f"tarragon: {worker_id}".encode()
    [pid] = [
        pid
        for pid in children_of(agent.process.pid)
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title)
    ]
    return pid


@pytest.fixture
def make_agent(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    made: list[Agent] = []

    def make(**options: Any) -> Agent:
        made.append(Agent(tmp_path, **options))
        return made[-1]

    yield make
    for agent in made:
        agent.end()


@pytest.fixture
def agent(make_agent: Callable[..., Agent]) -> Agent:
    made = make_agent()
    hello = made.accept()
    assert isinstance(hello, Hello)
    assert (hello.worker_id, hello.pid, hello.epoch) == ("agent", made.process.pid, GENERATION_1)
    return made


def test_a_worker_that_exits_is_reported_with_its_last_error_line(agent: Agent) -> None:
    pid = agent.start("aw-exits", GENERATION_1 + 1)
    assert agent.receive() == WorkerExited(
        worker_id="aw-exits",
        epoch=GENERATION_1 + 1,
        pid=pid,
        status="exit code 3",
        detail="ValueError: this worker has no wish to live",
    )
    assert f"[aw-exits] I am aw-exits at {GENERATION_1 + 1}" in agent.log()


def test_a_worker_that_raises_leaves_its_traceback_and_exit_code_1(agent: Agent) -> None:
    agent.start("ew-raises", GENERATION_1 + 1, "expert")
    exited = agent.receive()
    assert isinstance(exited, WorkerExited)
    assert (exited.status, exited.detail) == ("exit code 1", "ValueError: the model does not fit")
    assert "[ew-raises] Traceback (most recent call last):" in agent.log()


def test_a_killed_worker_is_reported_within_half_a_second(agent: Agent) -> None:
    took_s = []
    for epoch in range(GENERATION_1 + 1, GENERATION_1 + 4):
        pid = agent.start(f"aw-{epoch}", epoch)
        agent.wait_log(f"[aw-{epoch}] ready")
        killed_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        exited = agent.receive()
        took_s.append(time.monotonic() - killed_s)
        assert isinstance(exited, WorkerExited)
        assert (exited.pid, exited.status, exited.detail) == (pid, "killed by SIGKILL", "")
    # The news passes through three processes, and a busy machine may hold up each of them.
    assert min(took_s) < 0.5, took_s


def test_a_worker_inherits_no_descriptor_of_the_agent(agent: Agent) -> None:
    pids = [agent.start(f"aw-{index}", GENERATION_1 + index) for index in (1, 2, 3)]
    for index, pid in zip((1, 2, 3), pids, strict=True):
        agent.wait_log(f"[aw-{index}] ready")
        open_files = {fd.name: os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        assert set(open_files) == {"0", "1", "2"}, open_files
        assert open_files["0"] == "/dev/null"
        assert open_files["1"] == open_files["2"]
    logs = {os.readlink(f"/proc/{pid}/fd/1") for pid in pids}
    assert len(logs) == 3, "two workers write into one pipe"


def test_a_worker_is_a_session_of_its_own_that_ignores_ctrl_c_and_has_its_own_dice(agent: Agent) -> None:
    pids = [agent.start(f"aw-{index}", GENERATION_1 + index) for index in (1, 2)]
    for index, pid in zip((1, 2), pids, strict=True):
        agent.wait_log(f"[aw-{index}] ready")
        assert os.getsid(pid) == os.getpgid(pid) == pid
        status = Path(f"/proc/{pid}/status").read_text()
        masks = {
            name: int(mask, 16) for name, mask in re.findall(r"^(Sig\w+):\t([0-9a-f]{16})$", status, re.M)
        }
        assert masks["SigIgn"] >> (signal.SIGINT - 1) & 1
        assert not masks["SigCgt"] >> (signal.SIGTERM - 1) & 1
        assert masks["SigBlk"] == 0
        assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"tarragon: aw-{index}".encode())
    dice = re.findall(r"dice (\S+)", agent.log())
    assert len(set(dice)) == 2


def test_workers_die_with_an_agent_that_is_killed(agent: Agent) -> None:
    agent.start("aw-1", GENERATION_1 + 1)
    agent.start("aw-stubborn", GENERATION_1 + 2)
    agent.wait_log("[aw-1] ready")
    agent.wait_log("[aw-stubborn] ready")
    pids = children_of(agent.process.pid)
    assert len(pids) == 3
    agent.process.kill()
    agent.process.wait(TIMEOUT_S)
    wait(lambda: not any(lives(pid) for pid in pids), "end of the workers")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_leaves_no_process(agent: Agent, number: int) -> None:
    agent.start("aw-1", GENERATION_1 + 1)
    agent.start("aw-stubborn", GENERATION_1 + 2)
    agent.start("aw-parent", GENERATION_1 + 3)
    for name in ("aw-1", "aw-stubborn", "aw-parent"):
        agent.wait_log(f"[{name}] ready")
    pids = descendants(agent.process.pid)
    assert len(pids) == 6
    asked_s = time.monotonic()
    agent.process.send_signal(number)
    assert agent.process.wait(TIMEOUT_S) == 0
    assert 1.0 <= time.monotonic() - asked_s < 20, "the stubborn worker is killed after the grace time"
    assert not [pid for pid in pids if lives(pid)]
    assert "aw-stubborn (pid" in agent.log()


def test_asked_twice_the_agent_grants_no_grace(make_agent: Callable[..., Agent]) -> None:
    agent = make_agent(settings={"shutdown_grace_s": 30.0})
    agent.accept()
    agent.start("aw-stubborn", GENERATION_1 + 1)
    agent.wait_log("[aw-stubborn] ready")
    agent.process.send_signal(signal.SIGINT)
    agent.wait_log("stopping")
    agent.process.send_signal(signal.SIGINT)
    assert agent.process.wait(TIMEOUT_S) == 0


def test_the_orchestrator_can_stop_and_continue_and_end_a_worker(agent: Agent) -> None:
    epoch = GENERATION_1 + 1
    pid = agent.start("ew-0", epoch, "expert")
    agent.wait_log("[ew-0] ready")
    agent.send(SignalWorker(worker_id="ew-0", epoch=epoch - 1, signal=signal.SIGKILL))
    agent.send(SignalWorker(worker_id="ew-0", epoch=epoch, signal=9999))
    agent.send(SignalWorker(worker_id="ew-0", epoch=epoch, signal=signal.SIGSTOP))
    wait(lambda: state(pid) == "T", "stopped worker")
    agent.send(SignalWorker(worker_id="ew-0", epoch=epoch, signal=signal.SIGCONT))
    wait(lambda: state(pid) == "S", "worker that goes on")
    agent.send(SignalWorker(worker_id="ew-0", epoch=epoch, signal=signal.SIGTERM))
    exited = agent.receive()
    assert isinstance(exited, WorkerExited)
    assert exited.status == "killed by SIGTERM"


def test_a_stopped_worker_that_is_told_to_end_is_killed_after_the_grace_time(agent: Agent) -> None:
    epoch = GENERATION_1 + 1
    pid = agent.start("ew-0", epoch, "expert")
    agent.wait_log("[ew-0] ready")
    agent.send(SignalWorker(worker_id="ew-0", epoch=epoch, signal=signal.SIGSTOP))
    wait(lambda: state(pid) == "T", "stopped worker")
    agent.send(SignalWorker(worker_id="ew-0", epoch=epoch, signal=signal.SIGTERM))
    exited = agent.receive()
    assert isinstance(exited, WorkerExited)
    assert exited.status == "killed by SIGKILL"


def test_a_replaced_worker_that_still_runs_is_ended_and_an_old_epoch_is_not_started(agent: Agent) -> None:
    old = agent.start("aw-stubborn", GENERATION_1 + 1)
    agent.wait_log("[aw-stubborn] ready")
    new = agent.start("aw-stubborn", GENERATION_1 + 2)
    exited = agent.receive()
    assert isinstance(exited, WorkerExited)
    assert (exited.pid, exited.epoch, exited.status) == (old, GENERATION_1 + 1, "killed by SIGKILL")
    agent.send(StartWorker(worker_id="aw-stubborn", role="attention", epoch=GENERATION_1 + 1))
    refused = agent.receive()
    assert isinstance(refused, WorkerExited)
    assert (refused.pid, refused.status) == (0, "not started")
    assert lives(new)


def test_what_a_dead_worker_has_forked_dies_too(agent: Agent) -> None:
    pid = agent.start("aw-parent", GENERATION_1 + 1)
    agent.wait_log("[aw-parent] ready")
    in_group = [child for child in descendants(pid) if os.getpgid(child) == pid]
    assert len(in_group) == 1
    os.kill(pid, signal.SIGKILL)
    agent.receive()
    wait(lambda: not lives(in_group[0]), "end of the worker's child")


def test_a_dead_orchestrator_is_started_again_and_hears_of_the_living(agent: Agent) -> None:
    agent.start("aw-1", GENERATION_1 + 1)
    pid = agent.start("ew-2", GENERATION_1 + 2, "expert")
    agent.wait_log("[aw-1] ready")
    agent.wait_log("[ew-2] ready")
    orchestrator = by_title(agent, "orchestrator")
    os.kill(orchestrator, signal.SIGKILL)
    hello = agent.accept()
    assert isinstance(hello, Hello)
    assert hello.epoch == 2 << 20
    living = [agent.receive(), agent.receive()]
    assert {message.worker_id for message in living if isinstance(message, WorkerStarted)} == {"aw-1", "ew-2"}
    os.kill(pid, signal.SIGKILL)
    exited = agent.receive()
    assert isinstance(exited, WorkerExited)
    assert exited.worker_id == "ew-2"


def test_an_orchestrator_that_stops_giving_signs_of_life_is_replaced(
    make_agent: Callable[..., Agent],
) -> None:
    silence_s = 3.0
    agent = make_agent(settings={"orchestrator_silence_s": silence_s})
    agent.accept()
    pids = {agent.start("aw-1", GENERATION_1 + 1)}
    time.sleep(1.1 * silence_s)  # one that never gave any is not watched
    agent.send(Alive())
    time.sleep(0.4 * silence_s)
    silent_s = time.monotonic()
    agent.send(Alive())
    pids.add(agent.start("aw-2", GENERATION_1 + 2))  # the answer says that the relay has passed on both
    os.kill(by_title(agent, "orchestrator"), signal.SIGSTOP)
    hello = agent.accept()
    # Counted from the first sign it would be about 0.6 of the time; one that is not found is 60 s.
    assert 0.7 * silence_s < time.monotonic() - silent_s < 20
    assert isinstance(hello, Hello)
    assert hello.epoch == 2 << 20
    assert "the orchestrator hangs" in agent.log()
    living = [agent.receive(), agent.receive()]
    assert {message.pid for message in living if isinstance(message, WorkerStarted)} == pids
    assert all(lives(pid) for pid in pids)


def test_an_agent_that_was_paused_accuses_nobody(make_agent: Callable[..., Agent]) -> None:
    agent = make_agent(settings={"orchestrator_silence_s": 3.0})
    agent.accept()
    agent.send(Alive())
    agent.start("aw-1", GENERATION_1 + 1)
    os.kill(agent.process.pid, signal.SIGSTOP)
    time.sleep(4.0)
    os.kill(agent.process.pid, signal.SIGCONT)
    time.sleep(0.3)
    agent.send(Alive())
    agent.start("aw-2", GENERATION_1 + 2)
    assert "hangs" not in agent.log()


def test_buckets_outlive_the_store_and_no_worker_inherits_them(agent: Agent) -> None:
    for incarnation in (1, 2, 3):
        pid = agent.start("store", GENERATION_1 + incarnation, "store")
        buckets = [f"bucket {number}" for number in range(1, incarnation)]
        agent.wait_log(f"[store] incarnation {incarnation} got back {buckets}")
        wait(lambda count=incarnation: len(held(agent.process.pid)) == count, "bucket at the agent")  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
        assert isinstance(agent.receive(), WorkerExited)
    worker = agent.start("aw-1", GENERATION_1 + 9)
    agent.wait_log("[aw-1] ready")
    assert set(os.listdir(f"/proc/{worker}/fd")) == {"0", "1", "2"}


def test_a_stopped_store_makes_way_for_its_successor_at_once(make_agent: Callable[..., Agent]) -> None:
    agent = make_agent(settings={"shutdown_grace_s": 30.0})
    agent.accept()
    old = agent.start("store", GENERATION_1 + 1, "store")
    agent.wait_log("incarnation 1 got back []")
    wait(lambda: held(agent.process.pid), "bucket at the agent")
    os.kill(old, signal.SIGSTOP)
    agent.start("store", GENERATION_1 + 2, "store")
    exited = agent.receive()
    assert isinstance(exited, WorkerExited)
    assert (exited.pid, exited.status) == (old, "killed by SIGKILL")
    agent.wait_log("incarnation 2 got back ['bucket 1']")


def held(pid: int) -> list[str]:
    """Buckets of which a process has a descriptor."""
    names = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            names.append(os.readlink(fd))
    return [name for name in names if "tarragon-bucket" in name]


def test_an_orchestrator_that_ends_again_and_again_is_given_up(make_agent: Callable[..., Agent]) -> None:
    agent = make_agent(settings={"orchestrator_restarts_max": 2})
    for _ in range(3):
        agent.accept()
        for pid in children_of(agent.process.pid):
            os.kill(pid, signal.SIGKILL)
    assert agent.process.wait(TIMEOUT_S) == 1
    assert "tarragon: the orchestrator ended too often: killed by SIGKILL" in agent.log()


def test_an_orchestrator_that_cannot_start_is_one_sentence(make_agent: Callable[..., Agent]) -> None:
    agent = make_agent(environ={"TEST_ORCHESTRATOR": "broken"})
    assert agent.process.wait(TIMEOUT_S) == 1
    last = agent.log().splitlines()[-1]
    assert (
        last == "tarragon: the orchestrator could not start: exit code 1: RuntimeError: no orchestrator today"
    )


def test_what_the_orchestrator_asks_of_the_user_is_one_sentence_and_exit_code_2(
    make_agent: Callable[..., Agent],
) -> None:
    agent = make_agent(environ={"TEST_ORCHESTRATOR": "refuses"})
    assert agent.process.wait(TIMEOUT_S) == 2
    assert agent.log().splitlines()[-1] == "tarragon: the experts do not fit"


def test_a_worker_that_fails_twice_before_the_cluster_is_ready_ends_the_start(
    make_agent: Callable[..., Agent], tmp_path: Path
) -> None:
    (tmp_path / "console_of_test.py").write_text("import time\ndef main(): time.sleep(600)\n")
    agent = make_agent(console="console", environ={"PYTHONPATH": path_with(tmp_path)})
    agent.accept()
    agent.start("aw-exits", GENERATION_1 + 1)
    assert isinstance(agent.receive(), WorkerExited)
    agent.start("aw-exits", GENERATION_1 + 2)
    assert agent.process.wait(TIMEOUT_S) == 1
    assert agent.log().splitlines()[-1] == (
        "tarragon: aw-exits could not start: exit code 3: ValueError: this worker has no wish to live"
    )


def test_stop_from_the_orchestrator_ends_all(agent: Agent) -> None:
    agent.start("aw-1", GENERATION_1 + 1)
    pids = descendants(agent.process.pid)
    agent.send(Stop(reason="somebody asked"))
    assert agent.process.wait(TIMEOUT_S) == 0
    assert not [pid for pid in pids if lives(pid)]


def test_the_cluster_ends_with_the_process_that_started_it(make_agent: Callable[..., Agent]) -> None:
    with subprocess.Popen(["sleep", "600"]) as starter:
        agent = make_agent(stop_with_pid=starter.pid)
        agent.accept()
        agent.start("aw-1", GENERATION_1 + 1)
        starter.kill()
    assert agent.process.wait(TIMEOUT_S) == 0
    assert "the process that started this cluster has ended" in agent.log()


def test_ctrl_c_during_the_imports_stops_at_once(make_agent: Callable[..., Agent], tmp_path: Path) -> None:
    slow = "import sys, time\nprint('importing', file=sys.stderr, flush=True)\ntime.sleep(600)\n"
    (tmp_path / "slow_import.py").write_text(slow)
    agent = make_agent(preload="slow_import", environ={"PYTHONPATH": path_with(tmp_path)})
    agent.accept()
    agent.wait_log("importing")
    agent.process.send_signal(signal.SIGINT)
    assert agent.process.wait(TIMEOUT_S) == 0


def test_an_import_that_fails_is_one_sentence(make_agent: Callable[..., Agent]) -> None:
    agent = make_agent(preload="no_such_module")
    agent.link = agent.listener.accept(TIMEOUT_S)
    assert agent.process.wait(TIMEOUT_S) == 1
    assert agent.log().splitlines()[-1] == (
        "tarragon: cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"
    )


def test_a_flag_that_vllm_refuses_is_one_sentence_and_exit_code_2(make_agent: Callable[..., Agent]) -> None:
    agent = make_agent(flags=["--bad"])
    agent.link = agent.listener.accept(TIMEOUT_S)
    assert agent.process.wait(TIMEOUT_S) == 2
    assert agent.log().splitlines() == ["tarragon: --bad is no flag"]


def test_a_fork_of_an_agent_that_has_imported_torch_and_vllm_computes_with_two_threads_at_once(
    make_agent: Callable[..., Agent],
) -> None:
    heavy = [name for name in PRELOAD_MODULES if not name.startswith("tarragon")]
    agent = make_agent(preload=" ".join(heavy))
    agent.accept()
    agent.send(StartWorker(worker_id="aw-computes", role="attention", epoch=GENERATION_1 + 1))
    assert agent.link is not None
    assert isinstance(agent.link.recv_control(120.0), WorkerStarted)
    agent.wait_log("[aw-computes] ready")
    assert "[aw-computes] sum 1000000.0 with 2 threads, engine True" in agent.log()
    assert "threads run after the imports" not in agent.log()
