"""The gateway's process by itself: ``main`` is what a nursery's fork runs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tarragon.boot import Boot


def main(arguments: Sequence[str]) -> int:
    """Serve until told to stop. The only argument is a Boot as JSON."""
    from tarragon.gateway import process

    process.main(msgspec.json.decode(arguments[0], type=Boot))
    return 0
