"""How does an attention worker checkpoint? In segments, not at all, or as the baseline does (7.4)."""

from __future__ import annotations

from typing import Final, NamedTuple


class Mode(NamedTuple):
    """``segments``: every new row, in the gaps. ``pause_steps``: the whole cache, every so many steps.
    ``alternate``: segments in every other step, to compare steps with and without; nothing is protected."""

    segments: bool = False
    pause_steps: int = 0
    alternate: bool = False

    @property
    def writes(self) -> bool:
        """Whether rows are written at all."""
        return self.segments or self.alternate


SEGMENTS: Final = Mode(segments=True)
NONE: Final = Mode()
ALTERNATE: Final = Mode(alternate=True)
_PAUSE_STEPS_MAX: Final = 4096


def parse(text: str) -> Mode:
    """The mode of a name: "segments", "none", "alternate" or "pause-N".

    The last stops every N steps to copy the whole cache: a baseline, from which nothing is restored.
    Raises ValueError with one sentence.
    """
    named = {"segments": SEGMENTS, "none": NONE, "alternate": ALTERNATE}.get(text)
    if named is not None:
        return named
    word, _, steps = text.partition("-")
    if word == "pause" and steps.isascii() and steps.isdecimal() and 1 <= int(steps) <= _PAUSE_STEPS_MAX:
        return Mode(pause_steps=int(steps))
    modes = f"segments, none, alternate or pause-N with N up to {_PAUSE_STEPS_MAX}"
    raise ValueError(f"a checkpoint mode is {modes}, not {text}")
