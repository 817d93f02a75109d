"""`tarragon top`: a running cluster in a terminal, as it lives, dies and returns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar, Final

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Label, RichLog, Sparkline, Static

from tarragon.admin import AdminClient, AdminError
from tarragon.display import number, state_text, summary
from tarragon.observability import ert
from tarragon.observability.poll import Poller

POLL_S: Final = 1.0
SPARK_SAMPLES: Final = 120
_COLUMNS: Final = ("worker", "role", "state", "pid", "epoch", "rows/s", "experts", "note")
_LOUD: Final = {"dead": "bold red", "given up": "bold red", "suspect": "magenta", "healthy": "green"}
_EPOCH: Final = 1 << 20


class Ask(ModalScreen[bool]):
    """Yes or no, before anything is done to a worker."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("y", "answer(True)", "Yes"),
        ("n,escape", "answer(False)", "No"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        yield Label(f"{self._question}   y = yes   n = no", id="question")

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class Top(App[None]):
    """Everything is asked once a second in a thread; the screen only shows what it found."""

    TITLE = "tarragon top"
    CSS = """
    #summary { padding: 0 1; background: $panel; height: auto; }
    #workers { height: auto; max-height: 40%; }
    #sparks { height: 5; }
    #sparks Vertical { width: 1fr; padding: 0 1; height: auto; }
    Sparkline { height: 3; }
    #tbt > .sparkline--max-color { color: $error; }
    #lower { height: 1fr; min-height: 8; }
    #ert { width: 3fr; border: round $primary; }
    #log { width: 2fr; border: round $primary; }
    Ask { align: center middle; }
    #question { padding: 1 3; background: $panel; border: thick $error; width: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("k", "kill", "Kill"),
        Binding("z", "hang", "Hang (SIGSTOP)"),
        Binding("d", "drain", "Drain"),
        Binding("a", "add('attention')", "Add attention"),
        Binding("e", "add('expert')", "Add expert"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, admin: AdminClient) -> None:
        super().__init__()
        self._poller = Poller(admin)
        self._shown: tuple[Any, int] | None = None
        self._asking = False

    def compose(self) -> ComposeResult:
        yield Static("asking ...", id="summary")
        yield DataTable(id="workers", cursor_type="row", zebra_stripes=True)
        with Horizontal(id="sparks"):
            for name, title in (("tokens", "tokens/s"), ("tbt", "time between tokens, longest, ms")):
                with Vertical():
                    yield Label(title, id=f"{name}-label")
                    yield Sparkline([], id=name)
        with Horizontal(id="lower"):
            with VerticalScroll(id="ert"):
                yield Static(id="legend")
                yield Static(id="grid")
            yield RichLog(id="log", wrap=True, min_width=20, max_lines=400)
        yield Footer()

    def on_mount(self) -> None:
        self.query_one("#ert").border_title = "experts: worker and shadow"
        self.query_one("#log").border_title = "events"
        workers = self.query_one("#workers", DataTable)
        for title in _COLUMNS:
            workers.add_column(title, key=title)
        workers.focus()
        self.poll()
        self.set_interval(POLL_S, self.poll)

    # ------------------------------------------------------------------ asking

    def poll(self) -> None:
        """Ask, unless an answer is still awaited: two threads would show the same events twice."""
        if not self._asking:
            self._asking = True
            self._ask_now()

    @work(thread=True, group="poll")
    def _ask_now(self) -> None:
        try:
            events = self._poller.poll()
        except AdminError as error:
            self.call_from_thread(self._absent, str(error))
        else:
            self.call_from_thread(self._show, events)
        finally:
            self._asking = False

    def _absent(self, why: str) -> None:
        if self._has_widgets:
            self.query_one("#summary", Static).update(Text(f"{why}: asking again", style="bold red"))

    @work(thread=True, group="command")
    def _command(self, what: Callable[[], dict[str, Any]], done: str) -> None:
        try:
            what()
        except AdminError as error:
            self.call_from_thread(self.notify, str(error), severity="error")
        else:
            self.call_from_thread(self.notify, done)

    # ------------------------------------------------------------------ showing

    def _show(self, events: list[dict[str, Any]]) -> None:
        if not self._has_widgets:
            return
        self.query_one("#summary", Static).update(summary(self._poller.status))
        self._show_workers()
        self._show_sparks()
        self._show_table()
        log = self.query_one("#log", RichLog)
        for event in events:
            log.write(event_line(event))

    @property
    def _has_widgets(self) -> bool:
        """False once it ends: an answer may still come then."""
        return bool(self.query("#summary"))

    def _show_workers(self) -> None:
        table = self.query_one("#workers", DataTable)
        rows = {worker["id"]: self._row(worker) for worker in self._poller.status["workers"]}
        for key in [str(row.value) for row in table.rows if row.value not in rows]:
            table.remove_row(key)
        known = {row.value for row in table.rows}
        for worker_id, cells in rows.items():
            if worker_id not in known:
                table.add_row(*cells, key=worker_id)
            else:
                for column, cell in zip(_COLUMNS, cells, strict=True):
                    table.update_cell(worker_id, column, cell, update_width=True)

    def _row(self, worker: dict[str, Any]) -> list[Text]:
        swatch = ert.colour(worker["id"]) if worker["role"] == "expert" else ""
        return [
            Text(worker["id"], style=f"bold {swatch}".strip()),
            Text(worker["role"]),
            state_text(worker),
            Text(str(worker["pid"] or ""), justify="right"),
            Text(f"{worker['epoch'] // _EPOCH}.{worker['epoch'] % _EPOCH}", justify="right"),
            Text(number(self._poller.rates.get(worker["id"])), justify="right"),
            Text(number(worker.get("experts_resident")), justify="right"),
            Text(("given up: " if worker.get("given_up") else "") + str(worker.get("cause") or "")),
        ]

    def _show_sparks(self) -> None:
        samples = list(self._poller.samples)[-SPARK_SAMPLES:]
        last = samples[-1] if samples else {}
        sent = [_first(one["tokens_per_s"], one["tokens_computed_per_s"]) for one in samples]
        stalls = [_first(one["tbt_ms"]["max"]) for one in samples]
        self.query_one("#tokens", Sparkline).data = [0.0, *sent]  # so that its scale begins there
        self.query_one("#tbt", Sparkline).data = [0.0, *stalls]
        tbt = last.get("tbt_ms", {})
        self.query_one("#tokens-label", Label).update(
            f"tokens/s: {number(sent[-1]) if sent else '-'}   streams: {number(last.get('streams')) or '-'}"
        )
        said = "   ".join(f"{name} {number(tbt.get(name)) or '-'}" for name in ("median", "p95", "max"))
        self.query_one("#tbt-label", Label).update(f"ms between tokens: {said}")

    def _show_table(self) -> None:
        frame = self.query_one("#ert", VerticalScroll)
        now = (self._poller.table["version"], frame.content_size.width)
        if now != self._shown and frame.content_size.width:
            self._shown = now
            self.query_one("#legend", Static).update(ert.legend(self._poller.table))
            self.query_one("#grid", Static).update(ert.grid(self._poller.table, frame.content_size.width))

    # ------------------------------------------------------------------ keys

    @property
    def _selected(self) -> str | None:
        table = self.query_one("#workers", DataTable)
        if not table.row_count:
            return None
        return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value

    def _ask(self, question: str, what: Callable[[], dict[str, Any]], done: str) -> None:
        def answered(yes: bool | None) -> None:
            if yes:
                self._command(what, done)

        self.push_screen(Ask(question), answered)

    def action_kill(self) -> None:
        self._signal("SIGKILL", "Kill")

    def action_hang(self) -> None:
        self._signal("SIGSTOP", "Stop")

    def _signal(self, name: str, verb: str) -> None:
        if (worker_id := self._selected) is not None:
            admin = self._poller.admin
            self._ask(
                f"{verb} {worker_id}?", lambda: admin.kill(worker_id, name), f"{worker_id}: {name} sent"
            )

    def action_drain(self) -> None:
        if (worker_id := self._selected) is not None:
            admin = self._poller.admin
            self._ask(f"Drain {worker_id}?", lambda: admin.drain(worker_id), f"{worker_id} is draining")

    def action_add(self, role: str) -> None:
        admin = self._poller.admin
        self._ask(f"Add an {role} worker?", lambda: admin.add(role), f"an {role} worker is starting")


def event_line(event: dict[str, Any]) -> Text:
    """One event as a line of the log; failures stand out."""
    kind = str(event["kind"])
    line = Text(time.strftime("%H:%M:%S ", time.localtime(event["time_s"])), style="dim")
    line.append(f"{event['worker_id']} ", "bold")
    return line.append(kind, _LOUD.get(kind, "")).append(f" {event['text']}", "not dim")


def _first(*values: float | None) -> float:
    """The first value that is there, or 0: a sparkline has no gaps."""
    return next((value for value in values if value is not None), 0.0)
