"""What did a failure cost a reader? A streamed answer with its times, the kills, and what follows. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass
class Answer:
    """A streamed text; times are seconds of one steady clock."""

    pieces: list[str] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def take(self, piece: str, now_s: float) -> None:
        self.pieces.append(piece)
        self.times_s.append(now_s)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def same_as(self, other: Answer) -> bool:
        """Whether the two are equal, byte for byte, and ended for the same reason."""
        return self.text.encode() == other.text.encode() and self.finish_reason == other.finish_reason


@dataclass(frozen=True)
class Kill:
    """One worker, killed while an answer was streamed."""

    worker_id: str
    at_s: float
    pieces_before: int
    """What the reader had when the worker was killed."""


def median_gap_s(answer: Answer) -> float:
    """The median time between two pieces; 0 if there are fewer than two."""
    gaps = sorted(b - a for a, b in zip(answer.times_s, answer.times_s[1:], strict=False))
    return gaps[len(gaps) // 2] if gaps else 0.0


def stall_s(answer: Answer, kill: Kill, until_s: float) -> float | None:
    """The longest pause between two pieces that ended from ``kill`` until ``until_s`` (the next kill).

    So what a replacement's start or a late piece costs counts too. If no piece came in that time, it is the
    pause in which both lie. None if nothing came after the kill: then there is no stall but an end.
    """
    pairs = zip(answer.times_s, answer.times_s[1:], strict=False)
    later = [(after, after - before) for before, after in pairs if after > kill.at_s]
    own = [pause for ended_s, pause in later if ended_s <= until_s] or [pause for _, pause in later[:1]]
    return max(own, default=None)


def report(
    disturbed: Answer, undisturbed: Answer, kills: Sequence[Kill], back_s: Sequence[float]
) -> RenderableType:
    """The proof on one screen.

    Args:
        back_s: per kill, how long it took until the worker's replacement was ready; NaN if it never was.
    """
    table = Table(title="What each death cost the reader", box=SIMPLE)
    for title in ("killed", "after", "longest pause", "usual pause", "replaced in"):
        table.add_column(title, justify="left" if title == "killed" else "right", no_wrap=True)
    ends = [*(kill.at_s for kill in kills), float("inf")][1:]
    for kill, until_s, back in zip(kills, ends, back_s, strict=True):
        stall = stall_s(disturbed, kill, until_s)
        table.add_row(
            kill.worker_id,
            f"{kill.pieces_before} pieces",
            "the stream ended" if stall is None else f"{1e3 * stall:,.0f} ms",
            f"{1e3 * median_gap_s(disturbed):,.0f} ms",
            f"{back:.1f} s" if back == back else "not yet",
        )
    return Group(table, _beside(disturbed, undisturbed), _verdict(disturbed, undisturbed))


def _beside(disturbed: Answer, undisturbed: Answer) -> Table:
    table = Table(box=SIMPLE, expand=True, title="The same question, twice")
    table.add_column("with the deaths", ratio=1)
    table.add_column("without", ratio=1)
    table.add_row(Text(disturbed.text), Text(undisturbed.text))
    return table


def _verdict(disturbed: Answer, undisturbed: Answer) -> Text:
    """Equal, yes or no, and if not, from where on."""
    size = len(disturbed.text.encode())
    if disturbed.same_as(undisturbed):
        return Text(f"Equal, byte for byte ({size} bytes): yes", style="bold green")
    matcher = difflib.SequenceMatcher(None, disturbed.text, undisturbed.text, autojunk=False)
    same = matcher.find_longest_match(0, len(disturbed.text), 0, len(undisturbed.text))
    prefix = same.size if (same.a, same.b) == (0, 0) else 0
    other = len(undisturbed.text.encode())
    reasons = (
        f"ended by {disturbed.finish_reason or 'an error'} and by {undisturbed.finish_reason or 'an error'}"
    )
    return Text(
        f"Equal, byte for byte: NO ({size} and {other} bytes, the first {prefix} characters are; {reasons})",
        style="bold red",
    )
