"""`tarragon demo` to its end, on the first layers of its model: two real deaths in one answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.workload import SMALL_LAYERS

from tarragon import demo
from tarragon.models.demo import ensure_demo_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_the_proof_holds(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Four layers write fast and without sense: the answer must outlast the search for its writer.
    monkeypatch.setattr(demo, "make_model", lambda notes: ensure_demo_model(layers=SMALL_LAYERS))
    monkeypatch.setattr(demo, "BODY", {**demo.BODY, "max_tokens": 450, "ignore_eos": True})
    monkeypatch.setattr(demo, "ATTENTION_DIES_AFTER", 150)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = demo.main([])
    said = capfd.readouterr()
    assert code == 0, said.err + said.out
    assert "[✕ ew-0 killed]" in said.out
    assert "[✕ aw-" in said.out
    assert "Equal, byte for byte" in said.out
    assert "the stream ended" not in said.out
    assert "Restarting instead" in said.out
    assert list(tmp_path.glob("*dist*")) == [], "killed workers left files"
