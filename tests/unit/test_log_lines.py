"""Lines of the log: what is read out of a worker's line, and its two forms."""

from __future__ import annotations

import json
import os

import pytest

from tarragon.agent.log import FORMATS, LogWriter, Record, as_json, as_text, collected, record
from tarragon.config import LOG_FORMATS

TIME_S = 1_700_000_000.25


@pytest.mark.parametrize(
    ("line", "level", "text", "request_id"),
    [
        ("ready", "info", "ready", ""),
        ("", "info", "", ""),
        ("ValueError: no", "error", "ValueError: no", ""),
        ("WARNING aw-0 (7) dead: silent", "warning", "aw-0 (7) dead: silent", ""),
        ("INFO 11-21 19:31:02 [core.py:7] ready", "info", "[core.py:7] ready", ""),
        ("(Engine pid=1) ERROR 11-21 19:31:02.5 [core.py:7] x", "error", "[core.py:7] x", ""),
        ("CRITICAL 11-21 19:31:02 [core.py:7] x", "error", "[core.py:7] x", ""),
        ("\x1b[31mDEBUG 11-21 19:31:02 [a.py:1]\x1b[0m y", "debug", "[a.py:1] y", ""),
        ("WARNING request cmpl-a1-0-b2: gone", "warning", "request cmpl-a1-0-b2: gone", "cmpl-a1-0-b2"),
        ("Added request chatcmpl-9f.", "info", "Added request chatcmpl-9f.", "chatcmpl-9f"),
        ("this request was refused", "info", "this request was refused", ""),
        ("INFORMATION about nothing", "info", "INFORMATION about nothing", ""),
    ],
)
def test_level_and_request_are_read_out_of_the_line(
    line: str, level: str, text: str, request_id: str
) -> None:
    assert record(line, "aw-0", 7, TIME_S) == Record(TIME_S, level, "aw-0", 7, text, request_id)


def test_a_line_for_people() -> None:
    found = record("WARNING request cmpl-1: it goes on", "gateway", 1_048_577, TIME_S)
    assert as_text(found) == "2023-11-14T22:13:20.250Z WARNING 1048577 [gateway] request cmpl-1: it goes on"


def test_a_line_for_programs_has_a_request_only_if_it_is_about_one() -> None:
    found = {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "worker": "aw-0",
        "epoch": 7,
        "text": 'a "b"',
    }
    assert json.loads(as_json(record('a "b"', "aw-0", 7, TIME_S))) == found
    assert json.loads(as_json(record("request cmpl-1: x", "aw-0", 7, TIME_S)))["request"] == "cmpl-1"


def test_every_configurable_form_exists() -> None:
    assert set(FORMATS) == set(LOG_FORMATS)


def test_json_lines_stay_whole_after_one_that_was_cut() -> None:
    read_end, write_end = os.pipe()
    writer = LogWriter(write_end, "json", clock=lambda: TIME_S)
    long = ["x" * 3_000] * 60
    writer.write("aw-0", long, 7)
    assert writer.dropped > 0
    head = os.read(read_end, 1 << 20)
    writer.write("aw-0", ["after"], 7)
    os.close(write_end)
    lines = (head + os.read(read_end, 1 << 20)).decode().splitlines()
    assert json.loads(lines[-1])["text"] == "after"
    assert all(json.loads(line)["worker"] == "aw-0" for line in lines[:-2] if line)
    os.close(read_end)


def test_what_the_process_itself_writes_becomes_lines_too() -> None:
    found: list[str] = []
    read_end, write_end = os.pipe()
    with collected(found.extend, 1_000, fd=write_end):
        os.write(write_end, b"one\ntw")
        os.write(write_end, b"o\nlast")
    assert found == ["one", "two", "last"]
    os.write(write_end, b"as before")
    assert os.read(read_end, 100) == b"as before"
    os.close(read_end)
    os.close(write_end)
