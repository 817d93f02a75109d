"""How does an attention worker checkpoint? In segments, not at all, or as the baseline does (7.4)."""

from __future__ import annotations

from typing import Final, NamedTuple


class Mode(NamedTuple):
    """``segments``: every new row, in the gaps. ``pause_steps``: the whole cache, every so many steps."""

    segments: bool
    pause_steps: int


SEGMENTS: Final = Mode(True, 0)
NONE: Final = Mode(False, 0)
_PAUSE_STEPS_MAX: Final = 4096


def parse(text: str) -> Mode:
    """The mode of a name: "segments", "none" or "pause-N".

    The last stops every N steps to copy the whole cache: a baseline, from which nothing is restored.
    Raises ValueError with one sentence.
    """
    if text == "segments":
        return SEGMENTS
    if text == "none":
        return NONE
    word, _, steps = text.partition("-")
    if word == "pause" and steps.isascii() and steps.isdecimal() and 1 <= int(steps) <= _PAUSE_STEPS_MAX:
        return Mode(False, int(steps))
    modes = f"segments, none or pause-N with N up to {_PAUSE_STEPS_MAX}"
    raise ValueError(f"a checkpoint mode is {modes}, not {text}")
