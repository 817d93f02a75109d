"""What a part of a worker counts: plain attributes, reported by name."""

from __future__ import annotations


class Counters:
    """Base of all counters: a subclass sets numbers in ``__init__``, cumulative since the worker started.

    One thread adds to them; another may read them for a report.
    """

    def as_dict(self) -> dict[str, float]:
        return {name: float(value) for name, value in vars(self).items()}
