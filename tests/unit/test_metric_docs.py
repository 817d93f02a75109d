"""The board in deploy/ shows only metrics that the documentation names."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.metric_names import documented

BOARD = Path(__file__).parents[2] / "deploy/grafana-dashboard.json"
_SERIES = re.compile(r"_(bucket|sum|count)$")


def test_the_board_uses_only_documented_names() -> None:
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    used = {
        name for expression in expressions for name in re.findall(r"\b(?:tarragon_|vllm:)\w+", expression)
    }
    assert len(used) > 15
    known = documented()
    unknown = {name for name in used if name not in known and _SERIES.sub("", name) not in known}
    assert unknown == set()
    assert len({panel["id"] for panel in panels}) == len(panels)
