"""`tarragon top` under Textual's pilot, over the recorded status API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from rich.text import Text
from tests.recorded import Recorded
from textual.pilot import Pilot
from textual.widgets import DataTable, RichLog, Sparkline, Static

from tarragon import cli
from tarragon.admin import AdminClient, AdminError
from tarragon.observability import ert
from tarragon.observability.poll import Poller
from tarragon.observability.top import Ask, Top

LIMIT_S = 10.0


class FakeAdmin(AdminClient):
    """Answers from recorded operations, without a socket."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__("127.0.0.1", 1, timeout_s=1.0)
        self.recorded = recorded
        self.absent = False
        self.asked = 0
        self.answers = threading.Event()
        self.answers.set()

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        self.asked += 1
        if not self.answers.wait(LIMIT_S):
            raise AssertionError("nobody let it answer")
        if self.absent:
            raise AdminError("no Tarragon cluster answers")
        route, _, query = path.partition("?")
        after = int(query.removeprefix("after=") or 0)
        match method, route:
            case "GET", "/status":
                return self.recorded.status()
            case "GET", "/table":
                return self.recorded.table()
            case "GET", "/events":
                return self.recorded.events(1_000, after)
            case "GET", "/history":
                return self.recorded.history(after)
            case "POST", "/kill":
                assert body is not None
                return self.recorded.kill(body["worker_id"], 9 if body["signal"] == "SIGKILL" else 19)
            case "POST", "/drain":
                assert body is not None
                return self.recorded.drain(body["worker_id"])
            case "POST", "/add":
                assert body is not None
                return self.recorded.add(body["role"])
        raise AssertionError(path)


def drive(test: Callable[[Top, Pilot[None], Recorded, FakeAdmin], Any], **shape: int) -> None:
    async def body() -> None:
        recorded = Recorded(**shape)
        admin = FakeAdmin(recorded)
        app = Top(admin)
        async with app.run_test(size=(120, 44)) as pilot, asyncio.timeout(3 * LIMIT_S):
            await until(pilot, lambda: app.query_one("#workers", DataTable).row_count > 0)
            await test(app, pilot, recorded, admin)

    asyncio.run(body())


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await pilot.pause(0.05)


def cells(app: Top, worker_id: str) -> list[str]:
    return [str(cell) for cell in app.query_one("#workers", DataTable).get_row(worker_id)]


def log(app: Top) -> str:
    return "\n".join(line.text for line in app.query_one("#log", RichLog).lines)


def test_workers_with_role_state_pid_epoch_and_load() -> None:
    async def test(app: Top, pilot: Pilot[None], recorded: Recorded, admin: FakeAdmin) -> None:
        assert app.query_one("#workers", DataTable).row_count == len(recorded.workers)
        worker_id, role, state, pid, epoch, rows, experts, note = cells(app, "ew-1")
        assert (worker_id, role, state, pid, epoch) == ("ew-1", "expert", "healthy", "4206", "1.6")
        assert rows.replace(",", "").isdigit()
        assert (experts, note) == ("240", "")
        assert len(app.query_one("#tbt", Sparkline).data or []) == 121
        await until(pilot, lambda: "healthy after 1.9 s" in log(app))

    drive(test)


def test_a_worker_is_killed_after_a_yes_and_its_death_shows() -> None:
    async def test(app: Top, pilot: Pilot[None], recorded: Recorded, admin: FakeAdmin) -> None:
        await select(app, pilot, "ew-0")
        await pilot.press("k")
        assert isinstance(app.screen, Ask)
        await pilot.press("n")
        assert recorded.asked == []
        await pilot.press("k", "y")
        await until(pilot, lambda: cells(app, "ew-0")[2] == "dead")
        assert recorded.asked == [("kill", "ew-0", "9")]
        await until(pilot, lambda: "ew-0 exited killed by SIGKILL" in log(app))
        assert cells(app, "ew-0")[-1] == "killed by SIGKILL"
        recorded.back("ew-0")
        await until(pilot, lambda: cells(app, "ew-0")[2] == "healthy")

    drive(test)


def test_keys_hang_drain_and_add() -> None:
    async def test(app: Top, pilot: Pilot[None], recorded: Recorded, admin: FakeAdmin) -> None:
        await select(app, pilot, "aw-1")
        for key in ("z", "y", "d", "y", "a", "y", "e", "y"):
            await pilot.press(key)
        await until(pilot, lambda: len(recorded.asked) == 4)
        assert set(recorded.asked) == {
            ("kill", "aw-1", "19"),
            ("drain", "aw-1"),
            ("add", "attention"),
            ("add", "expert"),
        }
        await until(pilot, lambda: app.query_one("#workers", DataTable).row_count == len(recorded.workers))
        assert cells(app, "ew-2")[2] == "starting"

    drive(test)


def test_a_refused_command_and_an_absent_orchestrator_are_said() -> None:
    async def test(app: Top, pilot: Pilot[None], recorded: Recorded, admin: FakeAdmin) -> None:
        admin.absent = True
        await until(pilot, lambda: "asking again" in str(app.query_one("#summary", Static).content))
        await pilot.press("k", "y")
        await until(pilot, lambda: bool(list(app._notifications)))
        admin.absent = False
        await until(pilot, lambda: "serving" in str(app.query_one("#summary", Static).content))

    drive(test)


def test_answers_that_come_while_it_ends_harm_nobody() -> None:
    """Its widgets go before the thread that asks does."""

    async def test(app: Top, pilot: Pilot[None], recorded: Recorded, admin: FakeAdmin) -> None:
        await select(app, pilot, "aw-1")
        await app.screen.query("*").remove()
        app.poll()
        await app.workers.wait_for_complete()
        admin.absent = True
        app.poll()
        await app.workers.wait_for_complete()

    drive(test)


def test_a_slow_answer_is_waited_for_before_the_next_question() -> None:
    """Asked twice at once, the same events would be shown twice."""

    async def test(app: Top, pilot: Pilot[None], recorded: Recorded, admin: FakeAdmin) -> None:
        await app.workers.wait_for_complete()
        before = admin.asked
        admin.answers.clear()
        try:
            app.poll()
            await until(pilot, lambda: admin.asked == before + 1)
            app.poll()
            await pilot.pause(0.2)
            assert admin.asked == before + 1
        finally:
            admin.answers.set()
        await until(pilot, lambda: admin.asked > before + 1)

    drive(test)


async def select(app: Top, pilot: Pilot[None], worker_id: str) -> None:
    table = app.query_one("#workers", DataTable)
    table.move_cursor(row=table.get_row_index(worker_id))
    await pilot.pause()
    assert app._selected == worker_id


def test_top_without_a_terminal_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AdminClient, "status", lambda self: {})
    assert cli.main(["top"]) == 2
    assert "top needs a terminal" in capsys.readouterr().err


# ------------------------------------------------------------------ the table as text


@pytest.mark.parametrize(
    ("layers", "experts", "width", "rows", "across"),
    [
        (30, 8, 70, 8, "E↓ L→"),
        (30, 8, 24, 30, "L↓ E→"),
        (60, 128, 140, 60, "L↓ E→"),
        (60, 128, 70, 128, "E↓ L→"),
        (4, 8, 80, 4, "L↓ E→"),
    ],
)
def test_the_grid_fits_its_width(layers: int, experts: int, width: int, rows: int, across: str) -> None:
    lines = ert.grid(Recorded(layers=layers, experts=experts, expert=4).table(), width).plain.splitlines()
    assert lines[0] == across
    assert len(lines) == rows + 1
    assert max(map(len, lines)) <= width


def test_a_cell_names_worker_and_shadow() -> None:
    table = {
        "workers": [{"id": "ew-0"}, {"id": "ew-1"}],
        "candidates": [[["ew-1", "ew-0"], ["ew-0"], []]],
    }
    assert ert.grid(table, 80).plain.splitlines()[1].split() == ["0", "100·××"]
    assert " ".join(ert.legend(table).plain.split()) == "0 ew-0: 1 + 1 shadows 1 ew-1: 1 + 0 shadows"
    narrow: Text = ert.grid({**table, "candidates": table["candidates"] * 9}, 8)
    assert "▄▄×" in narrow.plain


# ------------------------------------------------------------------ the reader


def test_only_what_is_new_is_asked_for_and_a_restart_is_noticed() -> None:
    recorded = Recorded()
    poller = Poller(FakeAdmin(recorded))
    assert len(poller.poll()) == len(recorded.workers)
    assert poller.poll() == []
    assert len(poller.samples) == 280
    recorded.kill("ew-0", 9)
    assert [event["kind"] for event in poller.poll()] == ["dead", "exited"]
    assert poller.table["version"] == recorded.version
    recorded.workers[0]["epoch"] += 1 << 20
    recorded.log = [{**recorded.log[-1], "number": 1, "text": "of the new orchestrator"}]
    assert [event["text"] for event in poller.poll()] == ["of the new orchestrator"]
