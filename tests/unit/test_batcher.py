"""The batcher's rules (5.2, 5.4), one by one."""

from __future__ import annotations

import pytest

from tarragon.config import Config
from tarragon.experts.batcher import IDLE, Batcher, BatchError, RunBatch, WaitUntil
from tarragon.messages import DataFlag, ProtocolError, RefusalReason

LAYERS = 6
COMPUTE_US, BATCH_US = 1_000, 300
CONTINUES, PREFILL, PRIORITY = int(DataFlag.CONTINUES), int(DataFlag.PREFILL), int(DataFlag.PRIORITY)


def make(*keys: str, layers: int = LAYERS, **settings: int) -> Batcher:
    batcher = Batcher(layers, Config(**settings))
    for key in keys:
        batcher.worker_joined(key, 0)
    return batcher


def run(batcher: Batcher, now: int) -> RunBatch:
    action = batcher.next_action(now)
    assert isinstance(action, RunBatch)
    return action


def run_to_end(batcher: Batcher, now: int) -> list[str]:
    """Run one batch; returns whose frames are finished."""
    run(batcher, now)
    return [member.key for member in batcher.batch_done(now)]


def keys_of(batch: RunBatch) -> list[str]:
    return sorted(member.key for member in batch.members)


def taught(*keys: str, paces: dict[str, int] | None = None, **settings: int) -> tuple[Batcher, int]:
    """A batcher that knows its workers' habits, each between layer 1 and 2 of a step, answered now.

    Each takes COMPUTE_US (or its pace) from an answer to its next frame, a batch takes BATCH_US.
    """
    batcher, now = make(*keys, batch_join_wait_us_max=0), 0
    paces = paces or {}
    for step in range(4):
        layers = LAYERS if step < 3 else 2
        for key in keys:
            batcher.step_begin(key, 0, now, False)
        for layer in range(layers):
            for key in sorted(keys, key=lambda k: paces.get(k, COMPUTE_US)):
                assert not batcher.rows(key, layer, 10, step, CONTINUES, now + paces.get(key, COMPUTE_US))
            now += max([COMPUTE_US, *paces.values()])
            assert keys_of(run(batcher, now)) == sorted(keys)
            now += BATCH_US
            batcher.batch_done(now)
    # Learnt without waits, used with them.
    ready = Batcher(LAYERS, Config(**settings))
    ready._workers, ready._serving = batcher._workers, batcher._serving
    return ready, now


# ---------------------------------------------------------------------- who is where


def test_an_empty_frame_is_answered_at_once_and_moves_its_worker_on() -> None:
    batcher = make("a")
    batcher.step_begin("a", 0, 0, False)
    assert batcher.rows("a", 0, 0, 1, 0, 10) is True
    assert batcher.next_action(10) is IDLE
    assert batcher.rows("a", 1, 5, 1, 0, 20) is False
    assert run(batcher, 20).members == [("a", 1, 0, 5, 1, True)]


def test_layers_come_in_order_and_a_refused_frame_changes_nothing() -> None:
    batcher = make("a")
    batcher.step_begin("a", 2, 0, False)
    for layer in (0, 1, 3, LAYERS, -1):
        with pytest.raises(BatchError) as refused:
            batcher.rows("a", layer, 5, 1, 0, 10)
        assert refused.value.reason == RefusalReason.BAD_LAYER
    assert batcher.next_action(10) is IDLE
    batcher.rows("a", 2, 5, 1, 0, 10)
    assert run_to_end(batcher, 10) == ["a"]
    with pytest.raises(BatchError):
        batcher.rows("a", 2, 5, 1, 0, 20)
    batcher.rows("a", 3, 5, 1, 0, 20)


@pytest.mark.parametrize("continues", [True, False])
def test_after_the_last_layer_comes_layer_0_only_if_the_frame_said_so(continues: bool) -> None:
    batcher = make("a")
    batcher.step_begin("a", LAYERS - 1, 0, False)
    batcher.rows("a", LAYERS - 1, 5, 1, CONTINUES if continues else 0, 10)
    run_to_end(batcher, 10)
    if not continues:
        with pytest.raises(BatchError):
            batcher.rows("a", 0, 5, 2, 0, 20)
        batcher.step_begin("a", 0, 20, False)
    batcher.rows("a", 0, 5, 2, 0, 30)
    assert run(batcher, 30).layer == 0


def test_an_ended_step_takes_no_more_frames() -> None:
    batcher = make("a")
    batcher.step_begin("a", 0, 0, False)
    batcher.step_end("a", 5)
    with pytest.raises(BatchError):
        batcher.rows("a", 0, 5, 1, 0, 10)


def test_one_frame_of_a_worker_at_a_time() -> None:
    batcher = make("a")
    batcher.step_begin("a", 0, 0, False)
    batcher.rows("a", 0, 5, 1, 0, 10)
    for running in (False, True):
        if running:
            run(batcher, 10)
        for event in (
            lambda: batcher.rows("a", 0, 5, 1, 0, 20),
            lambda: batcher.rows("a", 1, 5, 1, PRIORITY, 20),
            lambda: batcher.step_begin("a", 0, 20, False),
            lambda: batcher.step_end("a", 20),
        ):
            with pytest.raises(BatchError):
                event()
    assert [member.key for member in batcher.batch_done(30)] == ["a"]


def test_unknown_workers_doubles_and_bad_counts_are_refused() -> None:
    batcher = make("a")
    assert "a" in batcher
    assert "b" not in batcher
    for event in (
        lambda: batcher.rows("b", 0, 5, 1, 0, 0),
        lambda: batcher.step_begin("b", 0, 0, False),
        lambda: batcher.step_end("b", 0),
        lambda: batcher.worker_joined("a", 0),
    ):
        with pytest.raises(ProtocolError) as refused:
            event()
        assert refused.value.reason == RefusalReason.STALE_EPOCH
    with pytest.raises(BatchError) as refused:
        batcher.rows("a", 0, -1, 1, 0, 0)
    assert refused.value.reason == RefusalReason.BAD_COUNT
    for layer in (-1, LAYERS):
        with pytest.raises(BatchError):
            batcher.step_begin("a", layer, 0, False)
    batcher.worker_left("b", 0)  # leaving twice is no fault


def test_a_new_worker_is_where_its_first_frame_says() -> None:
    batcher = make("a")
    with pytest.raises(BatchError):
        batcher.rows("a", LAYERS, 5, 1, 0, 10)
    batcher.rows("a", 3, 5, 1, 0, 10)
    assert run(batcher, 10).layer == 3
    batcher.batch_done(20)
    with pytest.raises(BatchError):
        batcher.rows("a", 2, 5, 1, 0, 30)
    batcher.rows("a", 4, 5, 1, 0, 30)


@pytest.mark.parametrize("layer", [2, LAYERS - 1])
def test_a_replay_repeats_the_layer_answered_last_as_often_as_need_be(layer: int) -> None:
    batcher = make("a")
    batcher.step_begin("a", layer, 0, False)
    batcher.rows("a", layer, 5, 1, 0, 10)
    run_to_end(batcher, 10)
    with pytest.raises(BatchError):
        batcher.rows("a", layer, 7, 1, 0, 20, first=5)
    for first in (5, 12):
        batcher.rows("a", layer, 7, 1, PRIORITY, 20, first=first)
        assert run(batcher, 20).members == [("a", layer, first, 7, 1, True)]
        batcher.batch_done(20)
    with pytest.raises(BatchError):
        batcher.rows("a", layer - 1, 7, 1, PRIORITY, 30)
    if layer + 1 < LAYERS:
        batcher.rows("a", layer + 1, 5, 1, 0, 30)
    else:
        batcher.step_begin("a", 0, 30, False)
        with pytest.raises(BatchError):
            batcher.rows("a", layer, 7, 2, PRIORITY, 30)


def test_a_replay_in_a_model_of_one_layer() -> None:
    batcher = make("a", layers=1)
    batcher.step_begin("a", 0, 0, False)
    batcher.rows("a", 0, 5, 1, 0, 10)
    run_to_end(batcher, 10)
    batcher.rows("a", 0, 5, 1, PRIORITY, 20)
    assert run_to_end(batcher, 20) == ["a"]


def test_who_leaves_is_left_out_whatever_its_frame_is_doing() -> None:
    batcher = make("a", "b", "c")
    for key in "abc":
        batcher.rows(key, 0, 5, 1, 0, 10)
    batcher.worker_left("a", 11)
    assert keys_of(run(batcher, 12)) == ["b", "c"]
    batcher.worker_left("b", 13)
    assert [member.key for member in batcher.batch_done(14)] == ["c"]
    assert batcher.next_action(15) is IDLE


def test_a_key_that_is_used_again_does_not_inherit_the_running_frame() -> None:
    batcher = make("a")
    batcher.rows("a", 0, 5, 1, 0, 10)
    run(batcher, 10)
    batcher.worker_left("a", 11)
    batcher.worker_joined("a", 12)
    batcher.rows("a", 4, 6, 1, 0, 13)
    assert batcher.batch_done(14) == []
    assert run(batcher, 15).members == [("a", 4, 0, 6, 1, True)]


# ---------------------------------------------------------------------- what runs first, and together


def test_a_batch_is_one_layer_with_all_its_frames_the_lowest_first() -> None:
    batcher = make("a", "b", "c", "d")
    for key, layer in (("a", 4), ("b", 1), ("c", 4), ("d", 1)):
        batcher.rows(key, layer, 5, 1, 0, 10)
    first = run(batcher, 10)
    assert (first.layer, keys_of(first), first.pairs, first.prefill) == (1, ["b", "d"], 10, False)
    batcher.batch_done(20)
    second = run(batcher, 20)
    assert (second.layer, keys_of(second)) == (4, ["a", "c"])


def test_replays_run_first_and_take_along_who_waits_at_their_layer() -> None:
    batcher = make("a", "b", "c")
    batcher.rows("a", 1, 5, 1, 0, 10)
    batcher.rows("b", 4, 5, 1, 0, 10)
    batcher.rows("c", 4, 5, 1, PRIORITY, 10)
    assert keys_of(run(batcher, 10)) == ["b", "c"]


@pytest.mark.parametrize("flags", [0, PRIORITY])
def test_decodes_run_before_prefills_even_replayed_ones(flags: int) -> None:
    batcher = make("a", "b")
    batcher.rows("a", 0, 600, 1, PREFILL | flags, 10)
    batcher.rows("b", 5, 5, 1, 0, 11)
    assert keys_of(run(batcher, 12)) == ["b"]
    batcher.batch_done(13)
    batch = run(batcher, 14)
    assert (keys_of(batch), batch.prefill) == (["a"], True)


def test_among_prefills_the_replayed_runs_first() -> None:
    batcher = make("a", "b")
    batcher.rows("a", 0, 600, 1, PREFILL, 10)
    batcher.rows("b", 3, 600, 1, PREFILL | PRIORITY, 10)
    assert keys_of(run(batcher, 10)) == ["b"]


def test_a_big_frame_counts_as_prefill_without_the_flag() -> None:
    batcher = make("a", decode_pairs_max=100)
    batcher.rows("a", 0, 101, 1, 0, 10)
    assert run(batcher, 10).prefill


def test_a_prefill_is_cut_and_decodes_get_in_between() -> None:
    batcher = make("p", "d", batch_pairs_max=1000)
    batcher.rows("p", 2, 2500, 7, PREFILL, 10, first=40)
    assert run(batcher, 10).members == [("p", 2, 40, 1000, 7, False)]
    batcher.rows("d", 5, 8, 1, 0, 11)
    assert batcher.batch_done(20) == []
    assert keys_of(run(batcher, 20)) == ["d"]
    batcher.batch_done(30)
    assert run(batcher, 30).members == [("p", 2, 1040, 1000, 7, False)]
    assert batcher.batch_done(40) == []
    assert run(batcher, 40).members == [("p", 2, 2040, 500, 7, True)]
    assert [member.key for member in batcher.batch_done(50)] == ["p"]
    batcher.rows("p", 3, 2500, 7, PREFILL, 60)


def test_what_was_begun_is_finished_before_its_equals() -> None:
    batcher = make("a", "b", batch_pairs_max=1000)
    batcher.rows("a", 2, 1500, 1, PREFILL, 10)
    run(batcher, 10)
    batcher.rows("b", 2, 800, 1, PREFILL, 11)
    batcher.batch_done(20)
    assert run(batcher, 20).members == [("a", 2, 1000, 500, 1, True)]


def test_a_prefill_lets_only_so_many_decodes_pass() -> None:
    batcher = make("p", "a", "b", batch_decodes_before_prefill_max=3, batch_pairs_max=1000)
    batcher.rows("p", 0, 2000, 1, PREFILL, 0)
    ran, now = [], 0
    layers = {"a": 0, "b": 0}
    for _ in range(8):
        for key in layers:
            if batcher._workers[key].frame == 0:
                batcher.rows(key, layers[key] % LAYERS, 5, 1, CONTINUES, now)
                layers[key] += 1
        batch = run(batcher, now)
        ran.append("p" if batch.prefill else "d")
        now += BATCH_US
        batcher.batch_done(now)
    assert "".join(ran) == "dddpdddp"


def test_a_replayed_decode_runs_even_before_a_prefill_whose_turn_it_is() -> None:
    batcher = make("p", "a", batch_decodes_before_prefill_max=0)
    batcher.rows("p", 0, 2000, 1, PREFILL, 0)
    batcher.rows("a", 1, 5, 1, PRIORITY, 0)
    assert keys_of(run(batcher, 0)) == ["a"]


def test_a_decode_batch_is_cut_between_frames() -> None:
    batcher = make("a", "b", "c", batch_pairs_max=100)
    for key in "abc":
        batcher.rows(key, 0, 45, 1, 0, 10)
    assert [member[:4] for member in run(batcher, 10).members] == [("a", 0, 0, 45), ("b", 0, 0, 45)]
    batcher.batch_done(20)
    assert keys_of(run(batcher, 20)) == ["c"]


def test_a_decode_frame_beyond_the_largest_batch_is_cut_itself() -> None:
    batcher = make("a", batch_pairs_max=100)
    batcher.rows("a", 0, 150, 1, 0, 10)
    assert run(batcher, 10).members == [("a", 0, 0, 100, 1, False)]
    batcher.batch_done(20)
    assert run(batcher, 20).members == [("a", 0, 100, 50, 1, True)]


def test_a_decode_batch_takes_small_prefills_of_its_layer_along() -> None:
    batcher = make("d", "small", "big", "elsewhere", batch_pairs_min=300)
    batcher.rows("d", 2, 10, 1, 0, 10)
    batcher.rows("small", 2, 290, 1, PREFILL, 10)
    batcher.rows("big", 2, 301, 1, PREFILL, 10)
    batcher.rows("elsewhere", 1, 10, 1, PREFILL, 10)
    batch = run(batcher, 10)
    assert (keys_of(batch), batch.prefill) == (["d", "small"], False)


def test_a_prefill_slice_takes_no_decode_along() -> None:
    batcher = make("d", "p", batch_decodes_before_prefill_max=0)
    batcher.rows("d", 2, 10, 1, 0, 10)
    batcher.rows("p", 2, 600, 1, PREFILL, 10)
    assert keys_of(run(batcher, 10)) == ["p"]


# ---------------------------------------------------------------------- what waits


def test_a_batch_waits_for_one_that_is_about_to_come_and_runs_with_it() -> None:
    batcher, now = taught("x", "y")
    batcher.rows("x", 2, 10, 9, CONTINUES, now + 900)
    wait = batcher.next_action(now + 900)
    assert wait == WaitUntil(now + 900 + 20_000, ("y",))
    batcher.rows("y", 2, 10, 9, CONTINUES, now + 1100)
    batch = run(batcher, now + 1100)
    assert (keys_of(batch), batch.missed) == (["x", "y"], ())
    assert (batcher.stats.waits, batcher.stats.waited_us, batcher.stats.waits_expired) == (1, 200, 0)


def test_an_empty_frame_ends_a_wait() -> None:
    batcher, now = taught("x", "y")
    batcher.rows("x", 2, 10, 9, CONTINUES, now + 900)
    assert isinstance(batcher.next_action(now + 900), WaitUntil)
    assert batcher.rows("y", 2, 0, 9, CONTINUES, now + 1000)
    assert keys_of(run(batcher, now + 1000)) == ["x"]


def test_nobody_waits_for_who_has_left_ended_or_turned_to_a_prefill() -> None:
    for event in ("left", "ended", "prefill"):
        batcher, now = taught("x", "y")
        batcher.rows("x", 2, 10, 9, CONTINUES, now + 900)
        assert isinstance(batcher.next_action(now + 900), WaitUntil)
        if event == "left":
            batcher.worker_left("y", now + 950)
        elif event == "ended":
            batcher.step_end("y", now + 950)
        else:
            batcher.step_begin("y", 2, now + 950, True)
        assert keys_of(run(batcher, now + 950)) == ["x"], event
        assert batcher.stats.waits_expired == 0


def test_nobody_waits_for_one_that_waits_at_another_layer() -> None:
    batcher, now = taught("x", "y")
    batcher.step_begin("x", 4, now, False)
    batcher.rows("x", 4, 10, 9, CONTINUES, now + 900)
    batcher.rows("y", 2, 10, 9, CONTINUES, now + 900)
    assert keys_of(run(batcher, now + 900)) == ["y"]


@pytest.mark.parametrize(("layer", "waits"), [(1, False), (2, True), (3, True), (4, True), (5, False)])
def test_a_batch_waits_only_for_those_at_its_layer_or_a_little_behind(layer: int, waits: bool) -> None:
    batcher, now = taught("x", "y")  # y comes to layer 2 next
    batcher.step_begin("x", layer, now, False)
    batcher.rows("x", layer, 10, 9, CONTINUES, now + 100)
    assert isinstance(batcher.next_action(now + 100), WaitUntil) is waits


def test_a_batch_follows_the_one_behind_layer_by_layer() -> None:
    batcher, now = taught("x", "y")
    batcher.step_begin("x", 3, now, False)
    batcher.rows("x", 3, 10, 9, CONTINUES, now + 900)
    assert isinstance(batcher.next_action(now + 900), WaitUntil)
    batcher.rows("y", 2, 10, 9, CONTINUES, now + 1000)
    assert keys_of(run(batcher, now + 1000)) == ["y"]
    now += 1000 + BATCH_US
    batcher.batch_done(now)
    assert isinstance(batcher.next_action(now), WaitUntil)
    batcher.rows("y", 3, 10, 9, CONTINUES, now + 1000)
    assert keys_of(run(batcher, now + 1000)) == ["x", "y"]
    assert batcher.stats.waits == 1


def test_enough_pairs_do_not_wait() -> None:
    for pairs, waits in ((63, True), (64, False)):
        batcher, now = taught("x", "y", batch_pairs_min=64)
        batcher.rows("x", 2, pairs, 9, CONTINUES, now + 900)
        assert isinstance(batcher.next_action(now + 900), WaitUntil) is waits


def test_replays_do_not_wait() -> None:
    batcher, now = taught("x", "y")
    batcher.rows("x", 2, 10, 9, CONTINUES | PRIORITY, now + 900)
    assert keys_of(run(batcher, now + 900)) == ["x"]


def test_nothing_waits_while_a_prefill_does() -> None:
    batcher, now = taught("x", "y", "p")
    batcher.rows("p", 2, 2000, 9, CONTINUES | PREFILL, now + 900)
    batcher.rows("x", 2, 10, 9, CONTINUES, now + 900)
    assert keys_of(run(batcher, now + 900)) == ["x"]
    batcher.batch_done(now + 1000)
    assert keys_of(run(batcher, now + 1000)) == ["p"]


def test_a_bound_of_zero_switches_waiting_off() -> None:
    batcher, now = taught("x", "y", batch_join_wait_us_max=0)
    batcher.rows("x", 2, 10, 9, CONTINUES, now + 900)
    assert keys_of(run(batcher, now + 900)) == ["x"]


def test_nobody_waits_for_strangers_to_its_habits() -> None:
    batcher, now = taught("x", "y")
    batcher.worker_left("y", now)
    batcher.worker_joined("y2", now)
    batcher.step_begin("y2", 2, now, False)
    batcher.rows("x", 2, 10, 9, CONTINUES, now + 900)
    assert keys_of(run(batcher, now + 900)) == ["x"]


def test_nobody_waits_for_one_that_comes_too_late_or_is_late() -> None:
    batcher, now = taught("x", "y", batch_join_wait_us_max=200)
    batcher.rows("x", 2, 10, 9, CONTINUES, now + 500)
    assert keys_of(run(batcher, now + 500)) == ["x"], "y is due after half of the bound"
    batcher, now = taught("x", "y")
    batcher.rows("x", 2, 10, 9, CONTINUES, now + 8_000)
    assert keys_of(run(batcher, now + 8_000)) == ["x"], "y should have been here long ago"


@pytest.mark.parametrize(
    ("pace", "waits"), [(COMPUTE_US + BATCH_US - 20, True), (COMPUTE_US + BATCH_US + 20, False)]
)
def test_a_batch_waits_only_for_those_that_keep_pace(pace: int, waits: bool) -> None:
    batcher, now = taught("x", "y", paces={"y": pace})
    batcher.rows("x", 2, 10, 9, CONTINUES, now + COMPUTE_US)
    assert isinstance(batcher.next_action(now + COMPUTE_US), WaitUntil) is waits


def test_the_slow_one_waits_for_the_fast_one() -> None:
    batcher, now = taught("x", "y", paces={"y": 5 * COMPUTE_US})
    batcher.rows("y", 2, 10, 9, CONTINUES, now + 900)
    assert isinstance(batcher.next_action(now + 900), WaitUntil)


def test_a_wait_that_reaches_its_bound_is_counted_and_not_repeated() -> None:
    batcher, now = taught("x", "y")
    deadline = now + 900 + 20_000
    batcher.rows("x", 2, 10, 9, CONTINUES, now + 900)
    assert isinstance(batcher.next_action(now + 900), WaitUntil)
    assert isinstance(batcher.next_action(deadline - 1), WaitUntil)
    assert batcher.stats.waits_expired == 0
    batch = run(batcher, deadline)
    assert (keys_of(batch), batch.missed) == (["x"], ("y",))
    assert (batcher.stats.waits_expired, batcher.stats.waited_us) == (1, 20_000)
    batcher.batch_done(deadline + BATCH_US)
    batcher.rows("x", 3, 10, 9, CONTINUES, deadline + 1_300)
    assert keys_of(run(batcher, deadline + 1_300)) == ["x"], "one that hangs costs one wait"
    batcher.batch_done(deadline + 1_600)
    assert batcher.stats.waits_expired == 1


def test_who_comes_back_is_waited_for_again() -> None:
    batcher, now = taught("x", "y")
    batcher._workers["y"].overdue = True
    batcher.step_begin("x", 3, now, False)
    batcher.rows("x", 3, 10, 9, CONTINUES, now + 900)
    assert run_to_end(batcher, now + 900) == ["x"]
    batcher.rows("y", 2, 10, 9, CONTINUES, now + 1000)
    assert run_to_end(batcher, now + 1000) == ["y"]
    batcher.step_begin("x", 3, now + 1000, False)
    batcher.rows("x", 3, 10, 9, CONTINUES, now + 1900)
    assert batcher.next_action(now + 1900) == WaitUntil(now + 21_900, ("y",))


def test_nobody_counts_on_a_step_that_has_not_begun() -> None:
    batcher, now = taught("x", "y")
    for key in "xy":
        batcher.step_begin(key, LAYERS - 1, now, False)
        batcher.rows(key, LAYERS - 1, 10, 9, CONTINUES, now + 1000)
    run_to_end(batcher, now + 1000)
    now += 1000
    batcher.step_begin("x", 0, now, False)
    batcher.rows("x", 0, 10, 10, CONTINUES, now + 900)
    assert keys_of(run(batcher, now + 900)) == ["x"], "y is between steps: it may be held elsewhere"
    batcher.batch_done(now + 1000)
    batcher.step_begin("y", 0, now + 1000, False)
    batcher.rows("x", 1, 10, 10, CONTINUES, now + 1900)
    assert isinstance(batcher.next_action(now + 1900), WaitUntil), "now y has begun"


def test_batches_that_need_not_wait_pass_those_that_do() -> None:
    batcher, now = taught("x", "y", "z")
    batcher.step_begin("z", 5, now, False)
    batcher.rows("x", 2, 10, 9, CONTINUES, now + 900)
    batcher.rows("z", 5, 10, 9, CONTINUES, now + 900)
    assert keys_of(run(batcher, now + 900)) == ["z"], "y is more than two layers behind z"
    batcher.batch_done(now + 1000)
    assert isinstance(batcher.next_action(now + 1000), WaitUntil)


def test_one_batch_at_a_time() -> None:
    batcher = make("a", "b")
    batcher.rows("a", 0, 5, 1, 0, 10)
    run(batcher, 10)
    with pytest.raises(AssertionError):
        batcher.next_action(11)
    batcher.batch_done(12)
    with pytest.raises(AssertionError):
        batcher.batch_done(13)
