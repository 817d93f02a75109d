"""REFE's exchange: whatever dies and answers in whatever order, every row is answered exactly once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tarragon.refe.exchange import Exchange, Send


def test_one_frame_per_live_link_and_done_after_all_answers() -> None:
    exchange = Exchange()
    assert exchange.begin((0, 2), [3, 9, 0]) == [Send(0, 0, 3, False), Send(2, 0, 0, False)]
    assert not exchange.done
    assert exchange.answered(0) is None
    assert exchange.answered(2) is None
    assert exchange.done


def test_a_second_answer_changes_nothing() -> None:
    exchange = Exchange()
    exchange.begin((0,), [1])
    exchange.answered(0)
    assert exchange.answered(0) is None
    assert exchange.done


def test_replay_waits_for_the_answer_that_its_link_still_owes() -> None:
    exchange = Exchange()
    exchange.begin((0, 1), [4, 2])
    assert exchange.lost(0)
    assert exchange.replay([0, 4]) == []
    assert exchange.answered(1) == Send(1, 2, 4, True)
    assert not exchange.done
    assert exchange.answered(1) is None
    assert exchange.done


def test_replay_goes_out_at_once_to_a_link_that_has_answered() -> None:
    exchange = Exchange()
    exchange.begin((0, 1), [4, 2])
    exchange.answered(1)
    assert exchange.lost(0)
    assert exchange.replay([0, 4]) == [Send(1, 2, 4, True)]


def test_two_losses_extend_the_waiting_replay() -> None:
    exchange = Exchange()
    exchange.begin((0, 1, 2), [1, 2, 3])
    exchange.lost(0)
    exchange.replay([0, 0, 1])
    exchange.lost(1)
    exchange.replay([0, 0, 2])
    assert exchange.answered(2) == Send(2, 3, 3, True)


def test_nothing_is_replayed_for_a_link_that_had_answered_or_had_no_rows() -> None:
    exchange = Exchange()
    exchange.begin((0, 1), [4, 0])
    exchange.answered(0)
    assert not exchange.lost(0)
    assert not exchange.lost(1)
    assert exchange.done


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_row_is_answered_once_whatever_dies(data: st.DataObject) -> None:
    """Model: slots hold rows; a death hands the rows that it owed to a random survivor."""
    slots = data.draw(st.integers(2, 5))
    counts = data.draw(st.lists(st.integers(0, 5), min_size=slots, max_size=slots))
    exchange = Exchange()
    in_hand: dict[int, list[Send]] = {s: [] for s in range(slots)}
    alive = set(range(slots))

    def deliver(sends: list[Send]) -> None:
        for send in sends:
            assert not in_hand[send.slot], "one frame of a worker at a time"
            in_hand[send.slot].append(send)

    deliver(exchange.begin(tuple(range(slots)), counts))
    answered: dict[int, int] = dict.fromkeys(range(slots), 0)
    owed_rows = sum(counts)
    while not exchange.done:
        slot = data.draw(st.sampled_from(sorted(s for s in alive if in_hand[s])))
        if len(alive) > 1 and data.draw(st.booleans()):
            alive.discard(slot)
            rows = exchange.rows_of(slot)
            if exchange.lost(slot):
                owed_rows += answered[slot]  # its answered rows are computed again: wasteful, not wrong
                target = data.draw(st.sampled_from(sorted(alive)))
                moved = [0] * slots
                moved[target] = rows
                deliver(exchange.replay(moved))
            in_hand[slot].clear()
        else:
            send = in_hand[slot].pop()
            answered[slot] += send.pairs
            follow_up = exchange.answered(slot)
            deliver([follow_up] if follow_up else [])
    assert sum(answered[s] for s in range(slots)) == owed_rows
