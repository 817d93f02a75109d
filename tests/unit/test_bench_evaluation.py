"""The evaluation runs its parts within a budget, and makes its page of what they left, whole or not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tarragon.bench import evaluation, evaluation_headlines, evaluation_page, evaluation_plan
from tarragon.bench.evaluation_plan import PARTS
from tarragon.bench.machine import machine


def _record(*parts: dict[str, Any], quick: bool = True) -> dict[str, Any]:
    return {
        "name": "evaluation",
        "version": "0",
        "started": "2026-11-21T00:00:00+00:00",
        "quick": quick,
        "budget_s": 600.0,
        "took_s": 30.0,
        "machine": machine(),
        "parts": list(parts),
    }


def _ended(key: str, error: str = "") -> dict[str, Any]:
    command = f"tarragon bench {key}"
    return {
        "key": key,
        "command": command,
        "started": "2026-11-21T00:00:00+00:00",
        "took_s": 3.0,
        "exit_code": int(bool(error)),
        "error": error,
    }


RESTORE = {
    "settings": {"model": "x-layers4-y"},
    "metrics": {
        "formula": {"experts_bytes_per_token": 100.0},
        "points": {
            "16": {
                name: {"median": 2.0}
                for name in (
                    "restore_s",
                    "parallel_s",
                    "sequential_s",
                    "parallel_over_restore",
                    "sequential_over_restore",
                    "restored_bytes",
                    "restored_positions",
                    "reader_gap_s",
                )
            }
        },
    },
}


@pytest.mark.parametrize(
    ("quick", "budget_s"), [(True, evaluation_plan.QUICK_BUDGET_S), (False, evaluation_plan.FULL_BUDGET_S)]
)
def test_the_plan_fits_the_budget(quick: bool, budget_s: float) -> None:
    assert sum(part.planned_s(quick) for part in evaluation_plan.planned(quick)) <= budget_s
    assert len({part.key for part in PARTS}) == len(PARTS)


def test_no_part_may_take_more_than_is_left() -> None:
    assert PARTS[0].limit_s(True, 5.0) == 5.0
    assert PARTS[0].limit_s(True, 10_000.0) < 1_000.0


def test_every_headline_belongs_to_a_part() -> None:
    assert {line.part for line in evaluation_headlines.HEADLINES} <= {part.key for part in PARTS}


def test_the_arguments_of_every_part_are_understood() -> None:
    import importlib

    for quick in (True, False):
        for part in evaluation_plan.planned(quick):
            module = importlib.import_module(f"tarragon.bench.{part.bench}")
            module.parser().parse_args([*part.arguments(quick), "--json", "x.json", "--plot", "x.png"])


def test_the_page_is_made_of_the_folder_alone(tmp_path: Path) -> None:
    folder, docs = tmp_path / "results", tmp_path / "docs"
    folder.mkdir()
    (folder / "restore.json").write_text(json.dumps(RESTORE))
    (folder / "restore.png").write_bytes(b"a picture")
    record = _record(_ended("restore"), _ended("traffic", "no cluster"))
    (folder / evaluation.RECORD).write_text(json.dumps(record))
    assert evaluation.main(["--from", str(folder), "--docs", str(docs)]) == 1
    page = (docs / "evaluation.md").read_text()
    assert (
        "| Restoration against parallel replay | 7.4 | 10 times faster | 2 times at token 16 | 4 layers |"
        in page
    )
    assert "**Failed:** no cluster." in page
    assert "(images/evaluation/restore.png)" in page
    assert (docs / "images" / "evaluation" / "restore.png").read_bytes() == b"a picture"
    assert "This is a quick run" in page


def test_a_result_that_is_not_whole_is_said_so() -> None:
    broken = {"settings": {}, "metrics": {"points": {}}}
    page = "\n".join(
        evaluation_page.sections(_record(_ended("restore", "stopped")), {"restore": broken}, set())
    )
    assert "not measured in this run" in page
    assert "no table can be made of it" in page or "restore ms" in page


def test_without_results_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(evaluation_page.EvaluationError, match="there is no evaluation in"):
        evaluation.read_record(tmp_path)


def test_a_part_that_fails_leaves_its_sentence(tmp_path: Path) -> None:
    part = PARTS[0]._replace(bench="nosuch", quick="")
    ended = evaluation.run_part(part, tmp_path, True, 100.0)
    assert ended["exit_code"] == 2
    assert "there is no benchmark nosuch" in ended["error"]


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    ended = evaluation.run_part(PARTS[0]._replace(quick_s=0.5), tmp_path, True, 0.5)
    assert ended["error"] == "stopped after its limit of 0 s"


def test_what_does_not_fit_is_not_run(tmp_path: Path) -> None:
    ended = evaluation.run_part(PARTS[0], tmp_path, True, 1.0)
    assert ended["exit_code"] is None
    assert "not run" in ended["error"]


def test_running_some_parts_again_keeps_what_is_known_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "run_part", lambda part, *_: _ended(part.key))
    arguments = ["--quick", "--out", str(tmp_path)]
    assert evaluation.main([*arguments, "--only", "traffic"]) == 0
    assert evaluation.main([*arguments, "--only", "restore"]) == 0
    record = evaluation.read_record(tmp_path)
    assert [part["key"] for part in record["parts"]] == ["restore", "traffic"]
    with pytest.raises(evaluation_page.EvaluationError, match="the other kind"):
        evaluation.main(["--out", str(tmp_path), "--only", "restore"])
    with pytest.raises(evaluation_page.EvaluationError, match="no quick size"):
        evaluation.main([*arguments, "--only", "steady-closed"])
