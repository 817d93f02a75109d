"""The real batchers under simulated traffic and failures: hundreds of seeds, no broken promise (5.2, 5.4)."""

from __future__ import annotations

from collections.abc import Iterable
from unittest.mock import patch

import msgspec
import pytest

from tarragon.config import Config
from tarragon.experts.batcher import Batcher, Member
from tarragon.experts.frontier import Frontier
from tarragon.simulate import LOADS, Load, Report, main, run, sweep

SEEDS = range(36)
NO_WAITS = Config(batch_join_wait_us_max=0)


def shortened(load: Load) -> Load:
    return msgspec.structs.replace(load, steps=max(6, load.steps * 2 // 5))


def mean(reports: Iterable[Report], name: str) -> float:
    values = [getattr(report, name) for report in reports]
    return sum(values) / len(values)


# 36 seeds on each load, over all 12 shapes of 2 to 4 attention and 1 to 4 expert workers. The audit
# demands: everything finishes; every frame is answered once, and all its rows computed once; no wait
# reaches its bound without a failure; none is for a prefill, nor for one who is here or has left.
@pytest.mark.parametrize("name", LOADS)
def test_no_seed_breaks_a_promise(name: str) -> None:
    reports = list(sweep(SEEDS, loads={name: shortened(LOADS[name])}))
    assert [(r.seed, r.violations) for r in reports if r.violations] == []
    assert {(r.attention_workers, r.expert_workers) for r in reports} == {
        (aws, ews) for aws in (2, 3, 4) for ews in (1, 2, 3, 4)
    }
    assert all(r.batches and r.frames for r in reports)
    assert sum(r.waits for r in reports) > 0


def test_the_faults_happen() -> None:
    reports = list(sweep(range(12), loads={"faults": LOADS["faults"]}))
    assert sum(r.replayed_frames for r in reports) > 0
    assert sum(r.waits_expired_in_faults for r in reports) > 0
    # A hang costs each expert worker one wait for it at most, not one a layer.
    crashes = LOADS["faults"].attention_crashes + LOADS["faults"].expert_crashes
    assert all(r.waits_expired_in_faults <= 4 * crashes for r in reports)


def test_a_seed_is_repeatable() -> None:
    load = shortened(LOADS["faults"])
    assert run(7, 3, 2, load) == run(7, 3, 2, load)
    assert run(7, 3, 2, load) != run(8, 3, 2, load)


def test_waiting_fills_batches_and_pays_where_experts_are_the_bottleneck() -> None:
    waiting = [run(seed, 4, 2, LOADS["heavy experts"]) for seed in range(4)]
    without = [run(seed, 4, 2, LOADS["heavy experts"], NO_WAITS) for seed in range(4)]
    assert mean(waiting, "batch_fill") > 2.7
    assert mean(without, "batch_fill") < 2.0
    assert mean(waiting, "decode_step_us") < 0.9 * mean(without, "decode_step_us")
    assert mean(waiting, "waiting_share") < 0.12


def test_a_slow_worker_does_not_slow_the_fast_ones() -> None:
    def fast(config: Config) -> float:
        runs = [run(seed, 2, 2, LOADS["uneven"], config) for seed in range(4)]
        return sum(r.decode_step_us_by_pace["1.0"] for r in runs) / len(runs)

    assert fast(Config()) < 1.05 * fast(NO_WAITS)


# ---------------------------------------------------------------------- the simulator finds what is wrong


def violations() -> str:
    load = Load(moe_layers=2, steps=30, pause_share=0.2)
    return "\n".join(v for seed in range(3) for v in run(seed, 3, 3, load).violations)


def test_it_finds_a_cycle_of_waits() -> None:
    answered = Frontier.answered

    def counts_on_the_next_step(self: Frontier, now: int, layers: int) -> None:
        answered(self, now, layers)
        if self.next_layer == 0:
            self.due_us = now + 4_000

    with patch.object(Frontier, "answered", counts_on_the_next_step):
        assert "reached its bound" in violations()


def test_it_finds_a_frame_that_is_never_answered() -> None:
    batch_done = Batcher.batch_done

    def forgets_one(self: Batcher, now: int) -> list[Member]:
        return batch_done(self, now)[:1]

    with patch.object(Batcher, "batch_done", forgets_one):
        found = violations()
    assert "stands still" in found
    assert "never answered" in found


def test_it_finds_rows_that_are_left_out() -> None:
    def halves(self: Batcher, worker: Frontier, prefill: bool, total: int) -> int:
        return max(1, worker.pairs // 2)

    load = Load(steps=3)
    with patch.object(Batcher, "_slice", halves), patch.object(Batcher, "batch_done", _all_answered):
        found = "\n".join(run(1, 2, 1, load).violations)
    assert "did not compute" in found


def _all_answered(self: Batcher, now: int) -> list[Member]:
    batch, self._running = self._running, None
    assert batch is not None
    for member in batch.members:
        self._workers[member.key].answered(now, self._layers)
    return batch.members


def test_it_finds_a_wait_for_a_prefill() -> None:
    arrive = Frontier.arrive

    def hides_prefills(
        self: Frontier, layer: int, step: int, continues: bool, prefill: bool, now: int
    ) -> None:
        arrive(self, layer, step, continues, False, now)

    load = Load(prompt_share=0.4, prompt_pairs=(600, 900), layer_pair_us=0.0)
    with patch.object(Frontier, "arrive", hides_prefills):
        assert "for the prefill of" in "\n".join(v for s in range(3) for v in run(s, 3, 2, load).violations)


def test_the_command_prints_a_table_and_fails_on_violations(
    capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    assert main(["--seeds", "1", "--load", "fast", "--json", f"{tmp_path}/runs.json"]) == 0
    assert "fast" in capsys.readouterr().out
    with open(f"{tmp_path}/runs.json", "rb") as file:
        (report,) = msgspec.json.decode(file.read(), type=list[Report])
    assert report.event_cost_us > 0
    with patch.object(Batcher, "batch_done", _all_answered), patch.object(Batcher, "_slice", lambda *_: 1):
        assert main(["--seeds", "1", "--load", "fast"]) == 1
    assert "did not compute" in capsys.readouterr().out
