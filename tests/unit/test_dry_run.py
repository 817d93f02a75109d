"""What would be started: the placement and the memory, decided as `tarragon serve` decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tarragon import cli
from tarragon.agent import preflight
from tarragon.config import Config
from tarragon.models.shape import MoeModel, read_model
from tarragon.planning_report import Plan, plan, ranges
from tarragon.routing.placement import PlacementError
from tarragon.testing.checkpoints import make_checkpoint

GB = 10**9
PLENTY = 1_000 * GB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("model") / "model", layers=3)


@pytest.fixture
def model(folder: Path) -> MoeModel:
    return read_model(folder)


def planned(model: MoeModel, available_bytes: int = PLENTY, **settings: Any) -> Plan:
    return plan(Config(**settings), model, available_bytes, cores=8)


def test_the_memory_of_the_workers_adds_up_to_what_the_start_checks(model: MoeModel) -> None:
    for settings in (
        {},
        {"attention_workers": 3, "expert_workers": 4, "shadow_replicas": 2},
        {"expert_workers": 1},
        {"checkpoint_mode": "none"},
        {"checkpoint_bytes_max": GB},
        {"share_expert_memory": False, "expert_workers": 3},
    ):
        found = planned(model, **settings)
        experts_bytes = model.experts_total * model.expert_bytes
        assert found.needed_bytes == preflight.memory_needed_bytes(
            Config(**settings), model.weight_bytes - experts_bytes, experts_bytes
        )
        assert found.refusal == ""


def test_every_expert_has_a_primary_and_its_shadow_elsewhere(model: MoeModel) -> None:
    found = planned(model, attention_workers=1, expert_workers=3)
    by_id = {worker.id: worker for worker in found.workers}
    assert list(by_id) == ["aw-0", "ew-0", "ew-1", "ew-2"]
    experts = [by_id[f"ew-{index}"] for index in range(3)]
    assert sum(worker.primaries for worker in experts) == model.experts_total
    assert sum(worker.shadows for worker in experts) == model.experts_total
    assert all(worker.weights_bytes == worker.primaries * model.expert_bytes for worker in experts)
    assert all(worker.shadow_bytes == 0 for worker in experts), "they share one copy"
    apart = planned(model, attention_workers=1, expert_workers=3, share_expert_memory=False)
    assert [worker.shadow_bytes for worker in apart.workers if worker.role == "expert"] == [
        worker.shadows * model.expert_bytes for worker in experts
    ]
    assert by_id["aw-0"].kv_cache_bytes == by_id["aw-0"].checkpoint_bytes == Config().kv_cache_bytes


def test_what_cannot_fit_is_refused_with_a_number_that_would(model: MoeModel) -> None:
    found = planned(model, 4 * GB, kv_cache_bytes=100 * GB)
    _, _, number = found.refusal.partition("--kv-cache-bytes ")
    kv_cache_bytes = int(number.split()[0])
    assert planned(model, 4 * GB, kv_cache_bytes=kv_cache_bytes).refusal == ""
    assert planned(model, 4 * GB, kv_cache_bytes=kv_cache_bytes + 10**6).refusal != ""


def test_fewer_shadows_are_proposed_where_no_cache_is_small_enough() -> None:
    config = Config(expert_workers=2, attention_workers=1, worker_overhead_bytes=0, share_expert_memory=False)
    sentence = preflight.what_fits(config, GB, 4 * GB, 6 * GB)
    assert sentence.endswith("would fit with --shadow-replicas 0")
    kv_cache_bytes = int(sentence.split()[1])
    fitting = Config(
        expert_workers=2,
        attention_workers=1,
        worker_overhead_bytes=0,
        shadow_replicas=0,
        kv_cache_bytes=kv_cache_bytes,
        share_expert_memory=False,
    )
    preflight.check_memory(fitting, GB, 4 * GB, 6 * GB)


def test_what_no_setting_can_help_is_told_with_the_least_it_needs() -> None:
    config = Config(attention_workers=4)
    assert preflight.what_fits(config, GB, 100 * GB, 10 * GB).startswith("even one attention and one expert")
    assert preflight.what_fits(config, 3 * GB, GB, 7 * GB).startswith(
        "--attention-workers 1 --expert-workers 1"
    )


def test_experts_that_do_not_fit_their_workers_name_the_bytes_that_would(model: MoeModel) -> None:
    with pytest.raises(
        PlacementError, match=r"do not fit on 2 expert worker\(s\): [\d,]+ bytes on each would do"
    ):
        planned(model, expert_memory_bytes_max=model.expert_bytes)


def test_numbers_in_short() -> None:
    assert ranges([]) == ""
    assert ranges([3]) == "3"
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2,4,6-7"


# ------------------------------------------------------------------ the command


def test_the_command_prints_the_placement_and_the_memory(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(preflight, "memory_available_bytes", lambda: PLENTY)
    assert cli.main(["serve", str(folder), "--dry-run", "--expert-workers", "2"]) == 0
    text = capsys.readouterr().out
    for part in (
        "MixtralForCausalLM",
        "ew-0",
        "ew-1",
        "aw-0",
        "aw-1",
        "KV cache",
        "checkpoints",
        "are needed",
    ):
        assert part in text


def test_json_is_the_same_for_programs(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "memory_available_bytes", lambda: PLENTY)
    assert cli.main(["serve", str(folder), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["memory_needed_bytes"] == sum(worker["total_bytes"] for worker in found["workers"])
    assert len(found["placement"]) == 3
    assert all({ids[0] for ids in row} == {"ew-0", "ew-1"} for row in found["placement"])
    assert found["experts"]["total"] == found["experts"]["with_shadow"]


def test_a_refusal_is_one_sentence_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "memory_available_bytes", lambda: 4 * GB)
    assert cli.main(["serve", str(folder), "--dry-run", "--json", "--kv-cache-bytes", str(10**12)]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fits"] is False
    [line] = captured.err.splitlines()
    assert line.startswith("tarragon: ")
    assert "would fit" in line
    assert cli.main(["serve", "/nowhere", "--dry-run"]) == 2
    assert cli.main(["serve", str(folder), "--json"]) == 2
    assert "--json goes with --dry-run only" in capsys.readouterr().err
