"""A replacement's priority, in a real process with a session of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tarragon.agent.priority import group_nice

TIMEOUT_S = 60

PROGRAM = """
import json, os, sys, threading
from tarragon.agent import priority
from tarragon.agent.process import fork_child

def seen():
    return [os.getpriority(os.PRIO_PROCESS, 0), priority.group_nice(os.getpid())]

def child():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    low = seen()
    priority.restore()
    own = os.getpriority(os.PRIO_PROCESS, thread.native_id)
    stop.set()
    print(json.dumps({"low": low, "restored": seen(), "thread": own}), flush=True)

before = seen()
pid, _ = fork_child("child", child, lambda: None, piped=False, nice=int(sys.argv[1]))
os.waitpid(pid, 0)
print(json.dumps({"before": before, "after": seen()}))
"""


def run(nice: int, *, without: str = "") -> dict[str, Any]:
    """What a child saw that was to be that nice, and its parent; ``without``: a capability that both lack."""
    command = [sys.executable, "-c", PROGRAM, str(nice)]
    if without:
        command = ["setpriv", f"--bounding-set=-{without}", f"--inh-caps=-{without}", *command]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True, start_new_session=True)
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


def test_it_is_low_and_becomes_its_parents() -> None:
    found = run(7)
    grouped = group_nice(os.getpid()) is not None
    assert found["low"][1] == (7 if grouped else None)
    assert found["restored"] == found["before"] == found["after"]
    assert found["thread"] == found["before"][0]


@pytest.mark.skipif(os.getuid() != 0, reason="without root nobody has the capability that is taken away here")
def test_without_the_privilege_only_what_can_be_undone_is_lowered() -> None:
    found = run(7, without="sys_nice")
    assert found["low"][0] == found["before"][0]
    assert found["restored"] == found["before"]


def test_a_process_that_is_gone_is_in_no_group() -> None:
    assert group_nice(2**22 + 1) is None
