"""The expert routing table for a terminal: a cell per layer and expert, in its workers' colours. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.style import Style
from rich.text import Text

COLOURS: Final = (
    "#4c9be8",
    "#f0a04b",
    "#5fbf7f",
    "#e06ca8",
    "#c3b73f",
    "#a98bf0",
    "#3fc1c9",
    "#ff7f6e",
)
_INK: Final = "#101418"
_NOBODY: Final = Style(color="#ff5555", bold=True)
_NO_SHADOW: Final = "#3a4045"
_GUTTER: Final = 4
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def number(worker_id: str) -> int:
    """The number at the end of a worker's id; 0 if there is none."""
    found = re.search(r"\d+$", worker_id)
    return int(found.group()) if found else 0


def colour(worker_id: str) -> str:
    return COLOURS[number(worker_id) % len(COLOURS)]


def legend(table: Mapping[str, Any]) -> Text:
    """Per worker: its colour, for how many experts it is first, for how many a shadow."""
    cells = [found for row in table["candidates"] for found in row]
    text = Text()
    for worker_id in sorted((worker["id"] for worker in table["workers"]), key=number):
        first = sum(found[:1] == [worker_id] for found in cells)
        shadow = sum(worker_id in found[1:] for found in cells)
        text.append(f" {_DIGITS[number(worker_id) % 36]} ", Style(color=_INK, bgcolor=colour(worker_id)))
        text.append(f" {worker_id}: {first} + {shadow} shadows   ")
    return text


def grid(table: Mapping[str, Any], columns_max: int) -> Text:
    """The table, the longer of layers and experts across if ``columns_max`` characters have room for it.

    Where two characters fit, a cell is the number of the worker and that of its first shadow; else one
    character, the upper half the worker's and the lower half the shadow's. × is an expert without worker.
    """
    candidates: Sequence[Sequence[Sequence[str]]] = table["candidates"]
    layers, experts = len(candidates), len(candidates[0]) if candidates else 0
    room = columns_max - _GUTTER
    wide = max(layers, experts) <= room
    across_layers = (layers > experts) == wide
    columns, rows = (layers, experts) if across_layers else (experts, layers)
    digits = 2 * columns <= room
    text = Text(f"{'E↓ L→' if across_layers else 'L↓ E→'}\n", style="dim")
    for row in range(rows):
        text.append(f"{row:>{_GUTTER - 1}} ", "dim")
        for column in range(columns):
            found = candidates[column][row] if across_layers else candidates[row][column]
            text.append_text(_cell(found, digits))
        text.append("\n")
    return text


def _cell(found: Sequence[str], digits: bool) -> Text:
    if not found:
        return Text("××" if digits else "×", style=_NOBODY)
    first = colour(found[0])
    shadow = colour(found[1]) if found[1:] else _NO_SHADOW
    if not digits:
        return Text("▄", style=Style(color=shadow, bgcolor=first))
    cell = Text(_DIGITS[number(found[0]) % 36], style=Style(color=_INK, bgcolor=first, bold=True))
    mark = _DIGITS[number(found[1]) % 36] if found[1:] else "·"
    return cell.append(mark, Style(color=_INK if found[1:] else "#9aa3a8", bgcolor=shadow))
