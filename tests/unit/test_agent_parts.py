"""The pure parts of the node agent: log lines, words for ends, budgets, checks before the start."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from tarragon.agent import environment, preflight
from tarragon.agent.console import progress_text, reachable_host, ready_line
from tarragon.agent.link import RestartBudget
from tarragon.agent.log import Lines, LogPipe, LogWriter, looks_like_error
from tarragon.agent.process import exit_words
from tarragon.cluster import free_ports
from tarragon.config import Config

GIB = 1 << 30


# ------------------------------------------------------------------ log


def test_lines_are_cut_at_line_feeds_wherever_the_reads_end() -> None:
    lines = Lines(100)
    assert lines.feed(b"one\ntw") == ["one"]
    assert lines.feed(b"o\r\n\nthr") == ["two", ""]
    assert lines.end() == ["thr"]
    assert lines.end() == []


def test_a_line_without_an_end_does_not_grow_without_bound() -> None:
    lines = Lines(10)
    assert lines.feed(b"x" * 25) == ["x" * 10, "x" * 10]
    assert lines.end() == ["x" * 5]
    assert lines.feed(b"y" * 30 + b"\n") == ["y" * 10] * 3


def test_bytes_that_are_no_text_do_not_end_the_agent() -> None:
    assert Lines(100).feed(b"\xff\xfe\n") == ["\\xff\\xfe"]


@pytest.mark.parametrize(
    "line",
    [
        "ValueError: no",
        "tarragon.models.headers.ModelError: x is not a folder",
        "torch.OutOfMemoryError: 3 GiB",
        "KeyboardInterrupt",
        "Fatal Python error: Segmentation fault",
        "(Engine pid=1) ERROR 10-02 12:00:00 [core.py:1] failed",
        "terminate called after throwing an instance of 'c10::Error'",
    ],
)
def test_lines_that_name_an_error(line: str) -> None:
    assert looks_like_error(line)


@pytest.mark.parametrize(
    "line", ["ready", '  raise ValueError("no")', "    ValueError: in a source line", "loaded 3 layers", ""]
)
def test_lines_that_name_none(line: str) -> None:
    assert not looks_like_error(line)


def test_the_last_error_survives_what_follows_it_and_loses_its_colours() -> None:
    lines = Lines(200)
    lines.feed(b"KeyError: 'a'\n\x1b[31mRuntimeError: b\x1b[0m\nand then some words\n")
    assert lines.last_error == "RuntimeError: b"


def test_a_pipe_gives_its_last_words_even_without_a_line_feed() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    pipe = LogPipe(read_end, 100)
    os.write(write_end, b"first\nValueError: last words")
    assert pipe.drain() == ["first", "ValueError: last words"]
    assert pipe.last_error == "ValueError: last words"
    os.close(write_end)
    assert pipe.read() == []
    assert not pipe.is_open
    pipe.close()


def test_the_writer_drops_lines_rather_than_wait_for_a_reader() -> None:
    read_end, write_end = os.pipe()
    writer = LogWriter(write_end)
    writer.write("aw-0", ["hello"])
    assert os.read(read_end, 100).endswith(b" [aw-0] hello\n")
    writer.write("aw-0", ["x" * 1000] * 200)
    assert writer.dropped > 0
    os.close(read_end)
    before = writer.dropped
    writer.write("aw-0", ["nobody reads"])
    assert writer.dropped == before + 1
    os.close(write_end)


# ------------------------------------------------------------------ ends and restarts


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (os.CLD_EXITED, 0, "exit code 0"),
        (os.CLD_EXITED, 2, "exit code 2"),
        (os.CLD_KILLED, 9, "killed by SIGKILL"),
        (os.CLD_DUMPED, 11, "killed by SIGSEGV (core dumped)"),
        (os.CLD_KILLED, 40, "killed by signal 40"),
    ],
)
def test_exit_words(code: int, status: int, words: str) -> None:
    assert exit_words(code, status) == words


def test_restarts_are_bounded_within_a_sliding_window() -> None:
    budget = RestartBudget(2, 10.0)
    assert budget.spend(0.0)
    assert budget.spend(1.0)
    assert not budget.spend(9.9)
    assert budget.spend(10.0)
    assert not budget.spend(10.5)
    assert budget.spend(11.0)


# ------------------------------------------------------------------ environment


def test_required_variables_win_over_the_users_and_defaults_do_not() -> None:
    changes = environment.wanted({"VLLM_CPU_ATTN_SPLIT_KV": "1", "VLLM_LOGGING_LEVEL": "DEBUG"})
    assert changes["VLLM_CPU_ATTN_SPLIT_KV"] == "0"
    assert "VLLM_LOGGING_LEVEL" not in changes
    assert environment.wanted({})["VLLM_LOGGING_LEVEL"] == "WARNING"
    assert environment.wanted(environment.wanted({})) == {}


def test_libraries_are_preloaded_once() -> None:
    tcmalloc, iomp = Path("/a/libtcmalloc_minimal.so.4"), Path("/b/libiomp5.so")
    assert environment.with_preloads("", [tcmalloc, iomp]) == f"{tcmalloc}:{iomp}"
    assert environment.with_preloads("/c/libtcmalloc.so.4 /x.so", [tcmalloc]) == "/c/libtcmalloc.so.4:/x.so"
    assert environment.with_preloads("/x.so", []) == "/x.so"


# ------------------------------------------------------------------ before the start


def test_memory_counts_shadows_caches_and_overhead() -> None:
    config = Config(
        attention_workers=2, expert_workers=3, kv_cache_bytes=5, worker_overhead_bytes=100, shadow_replicas=1
    )
    assert preflight.memory_needed_bytes(config, attention_bytes=10, expert_bytes=1000) == 1000 + 40 + 500
    apart = replace(config, share_expert_memory=False)
    assert preflight.memory_needed_bytes(apart, attention_bytes=10, expert_bytes=1000) == 2000 + 40 + 500


@pytest.mark.parametrize(
    ("expert_workers", "replicas", "copies"), [(1, 1, 1), (2, 5, 2), (4, 0, 1), (4, 2, 3)]
)
def test_there_are_at_most_as_many_copies_as_expert_workers(
    expert_workers: int, replicas: int, copies: int
) -> None:
    config = Config(
        attention_workers=1,
        expert_workers=expert_workers,
        kv_cache_bytes=0,
        worker_overhead_bytes=0,
        shadow_replicas=replicas,
        share_expert_memory=False,
    )
    assert preflight.memory_needed_bytes(config, attention_bytes=0, expert_bytes=7) == 7 * copies


def test_a_budget_of_expert_memory_bounds_what_is_needed() -> None:
    config = Config(
        attention_workers=1,
        expert_workers=2,
        kv_cache_bytes=0,
        worker_overhead_bytes=0,
        expert_memory_bytes_max=6,
        share_expert_memory=False,
    )
    assert preflight.memory_needed_bytes(config, attention_bytes=0, expert_bytes=10) == 12


def test_too_little_memory_is_one_sentence_with_the_numbers() -> None:
    config = Config(kv_cache_bytes=GIB, share_expert_memory=False)
    with pytest.raises(
        preflight.PreflightError, match=r"4\.0 GB of experts x 2, .* 3\.0 GB are available"
    ) as raised:
        preflight.check_memory(config, 10**9, 4 * 10**9, 3 * 10**9)
    assert "\n" not in str(raised.value)
    preflight.check_memory(config, 10**9, 4 * 10**9, 100 * 10**9)


def test_memory_that_the_system_does_not_grant_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_model: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(preflight, "HostMemory", refuse)
    model: Any = SimpleNamespace(experts_total=1000, expert_bytes=10**9)
    with pytest.raises(preflight.PreflightError, match=r"not grant 1000\.0 GB .*--no-share-expert-memory"):
        preflight.expert_memory(Config(), model)
    assert preflight.expert_memory(Config(share_expert_memory=False), model) is None


def test_available_memory_is_the_less_of_the_kernels_and_the_cgroups(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    assert preflight.memory_available_bytes(tmp_path) == 50 << 10
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("30720\n")
    (group / "memory.current").write_text("20480\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 10240\n")
    assert preflight.memory_available_bytes(tmp_path) == 20 << 10
    (group / "memory.max").write_text("max\n")
    assert preflight.memory_available_bytes(tmp_path) == 50 << 10


def test_a_taken_port_is_named_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            preflight.PreflightError, match=rf"port {port} of 127.0.0.1 is taken.*--admin-port"
        ):
            preflight.check_ports(Config(port=free_ports(1)[0], admin_port=port))
        with pytest.raises(preflight.PreflightError, match=r"--port$"):
            preflight.check_ports(Config(port=port, admin_port=free_ports(1)[0]))
    preflight.check_ports(Config(port=port, admin_port=free_ports(1)[0]))


def test_both_ports_may_not_be_the_same_and_a_host_must_be_ours() -> None:
    with pytest.raises(preflight.PreflightError, match="must differ"):
        preflight.check_ports(Config(port=9000, admin_port=9000))
    with pytest.raises(preflight.PreflightError, match=r"cannot listen at 192\.0\.2\.1"):
        preflight.check_ports(Config(host="192.0.2.1", port=free_ports(1)[0], admin_port=free_ports(1)[0]))


# ------------------------------------------------------------------ what the user sees


def test_progress_in_words() -> None:
    config = Config(attention_workers=2, expert_workers=3)
    orchestrator = {"id": "orchestrator", "role": "orchestrator", "pid": 1, "state": "healthy"}
    assert progress_text(config, None) == "starting"
    assert progress_text(config, {"workers": [orchestrator]}) == "importing torch and vLLM"
    workers = [
        orchestrator,
        {"id": "aw-0", "role": "attention", "pid": 2, "state": "healthy"},
        {"id": "ew-0", "role": "expert", "pid": 3, "state": "starting"},
    ]
    assert (
        progress_text(config, {"workers": workers}) == "workers: attention 1/2, expert 0/3, gateway starting"
    )


def test_the_ready_line_counts_healthy_workers() -> None:
    workers = [{"role": "attention", "state": "healthy"}] * 2 + [{"role": "expert", "state": "healthy"}]
    workers += [{"role": "expert", "state": "dead"}]
    line = ready_line(Config(port=8123, host="0.0.0.0"), {"workers": workers}, 14.23)
    assert line == "ready: http://127.0.0.1:8123/v1 (2 attention + 1 expert workers, 14.2 s)"
    assert reachable_host("::") == "::1"
