"""A replacement's priority, in a real process with a session of its own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from typing import Any

from tarragon.agent.priority import group_nice, may_raise

TIMEOUT_S = 60
LONG_S = 60.0

PROGRAM = """
import json, os, sys, threading, time
from tarragon.agent import priority
from tarragon.agent.process import fork_child

def seen():
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return [nice, priority.group_nice(os.getpid()), os.sched_getscheduler(0) == os.SCHED_IDLE]

def child():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    low = seen()
    if "wait" in sys.argv:
        while seen()[2]:
            time.sleep(0.01)
        low = seen()
    priority.restore()
    own = [os.getpriority(os.PRIO_PROCESS, thread.native_id), os.sched_getscheduler(thread.native_id)]
    stop.set()
    print(json.dumps({"low": low, "restored": seen(), "thread": own}), flush=True)

before = seen()
polite = priority.Politeness(nice=7, idle_s=float(sys.argv[1]))
pid, _ = fork_child("child", child, lambda: None, polite, piped=False)
os.waitpid(pid, 0)
print(json.dumps({"before": before, "after": seen()}))
"""


def run(idle_s: float, *arguments: str, privileged: bool = True) -> dict[str, Any]:
    """What a polite child saw, and its parent; both lack CAP_SYS_NICE if not privileged."""
    command = [sys.executable, "-c", PROGRAM, str(idle_s), *arguments]
    if not privileged and may_raise():
        command = ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", *command]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True, start_new_session=True)
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


def test_it_is_low_and_becomes_its_parents() -> None:
    found = run(LONG_S)
    grouped = found["before"][1] is not None  # this process may be of the first session, which is in no group
    own = [7, True] if may_raise() else [found["before"][0], False]
    assert found["low"] == [own[0], 7 if grouped else None, own[1]]
    assert found["restored"] == found["before"] == found["after"]
    assert found["thread"] == [found["before"][0], os.SCHED_OTHER]


def test_its_idleness_ends_before_it_is_ready() -> None:
    found = run(0.05, "wait")
    assert found["low"][2] is False
    assert found["low"][0] == (7 if may_raise() else found["before"][0])
    assert found["restored"] == found["before"] == found["after"]
    assert found["thread"] == [found["before"][0], os.SCHED_OTHER]


def test_without_the_privilege_only_what_can_be_undone_is_lowered() -> None:
    found = run(LONG_S, privileged=False)
    assert found["low"][0] == found["before"][0]
    assert found["low"][2] is False
    assert found["restored"] == found["before"]


def test_a_parent_in_no_group_means_a_group_like_any_other() -> None:
    """The parent here is init (or what adopts orphans), which on most machines is in the first session."""
    read, write = os.pipe()
    program = f"""
import os, time
from tarragon.agent import priority
launcher = os.getpid()
if not os.fork():
    os.setsid()
    priority.lower(priority.Politeness(7, 60.0))
    while os.getppid() == launcher:
        time.sleep(0.01)
    priority.restore()
    os.write({write}, repr((priority.group_nice(os.getppid()), priority.group_nice(os.getpid()))).encode())
"""
    subprocess.run([sys.executable, "-c", program], timeout=TIMEOUT_S, check=True, pass_fds=(write,))
    os.close(write)
    with open(read) as results:
        adopter, own = ast.literal_eval(results.read())
    assert own is None or own == (adopter or 0)


def test_a_process_that_is_gone_is_in_no_group() -> None:
    assert group_nice(2**22 + 1) is None
