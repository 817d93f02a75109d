"""Who runs a request, what becomes of it when its worker is lost, and which outputs may reach the client."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from tarragon.gateway.continuing import with_seed
from tarragon.gateway.streams import Action, Fail, Send, Streams
from tarragon.gateway.wire import Abort, Add, Hold, Origin


def request(request_id: str, *, temperature: float = 1.0, seed: int | None = None) -> EngineCoreRequest:
    params = SamplingParams(temperature=temperature, seed=seed)
    return EngineCoreRequest(request_id, [1, 2, 3], None, params, None, 0.0, None, None, None)


def streams(*workers: str, failovers_max: int = 3, waiting_max: int = 2, **settings: Any) -> Streams:
    seeds = itertools.count(100)
    made = Streams(
        failovers_max=failovers_max,
        waiting_max=waiting_max,
        wait_s=10.0,
        draw_seed=lambda: next(seeds),
        **settings,
    )
    for worker in workers:
        assert made.worker_up(worker, 1, 0.0) == []
    return made


def sent_to(actions: list[Action]) -> tuple[str, int]:
    """Worker and attempt of the only action, which gives a request to a worker."""
    (action,) = actions
    assert isinstance(action, Send)
    assert isinstance(action.message, Add)
    return action.worker, action.message.attempt


def seed_in(actions: list[Action]) -> int | None:
    (action,) = actions
    assert isinstance(action, Send)
    assert isinstance(action.message, Add)
    seed: int | None = action.message.request.sampling_params.seed
    return seed


def added(actions: list[Action]) -> Add:
    """The only action's message, which gives a request to a worker."""
    (action,) = actions
    assert isinstance(action, Send)
    assert isinstance(action.message, Add)
    return action.message


def failure(actions: list[Action]) -> str:
    (action,) = actions
    assert isinstance(action, Fail)
    return action.message


def output(request_id: str, *tokens: int, last: bool = False) -> EngineCoreOutput:
    return EngineCoreOutput(request_id, list(tokens), finish_reason=FinishReason.STOP if last else None)


def test_a_request_goes_to_one_worker_and_ends_with_its_last_output() -> None:
    live = streams("aw-0", "aw-1")
    assert sent_to(live.add(request("r"), 0.0)) == ("aw-0", 1)
    assert len(live.accept("aw-0", {"r": 1}, [output("r", 5)], 0.0)) == 1
    assert live.live["r"].sent == [5]
    assert len(live.accept("aw-0", {"r": 1}, [output("r", 6, last=True)], 0.0)) == 1
    assert not live.live
    assert live.loads["aw-0"].tokens == 0


def test_outputs_of_others_than_the_owner_are_dropped_and_counted() -> None:
    live = streams("aw-0", "aw-1")
    live.add(request("r"), 0.0)
    assert live.accept("aw-1", {"r": 1}, [output("r", 5)], 0.0) == []
    assert live.accept("aw-0", {"r": 2}, [output("r", 5)], 0.0) == []
    assert live.counters.outputs_stale == 2
    assert live.accept("aw-0", {"gone": 1}, [output("gone", 5)], 0.0) == []
    assert live.counters.outputs_unknown == 1
    assert live.live["r"].sent == []


def test_a_request_without_tokens_starts_again_with_its_seed() -> None:
    live = streams("aw-0", "aw-1")
    first = live.add(request("r"), 0.0)
    assert sent_to(first) == ("aw-0", 1)
    again = live.worker_down("aw-0", "killed", 1.0)
    assert sent_to(again) == ("aw-1", 2)
    seeds = [seed_in(first), seed_in(again)]
    assert seeds == [100, 100]
    assert live.counters.restarts == 1
    # What the lost worker still had on its way is of the old attempt.
    assert live.accept("aw-0", {"r": 1}, [output("r", 5)], 0.0) == []
    assert live.accept("aw-1", {"r": 1}, [output("r", 5)], 0.0) == []
    assert len(live.accept("aw-1", {"r": 2}, [output("r", 5)], 0.0)) == 1


def test_a_request_with_tokens_goes_on_behind_them() -> None:
    live = streams("aw-0", "aw-1", "aw-2")
    live.add(request("r"), 0.0)
    live.accept("aw-0", {"r": 1}, [output("r", 5, 6)], 0.0)
    add = added(live.worker_down("aw-0", "killed by SIGKILL", 1.0))
    assert (add.attempt, add.sent, add.origins) == (2, [5, 6], [Origin("aw-0", 1, 1)])
    # A second loss without a token in between: its rows are still those of the first attempt.
    add = added(live.worker_down("aw-1", "killed", 1.0))
    assert (add.attempt, add.sent) == (3, [5, 6])
    assert add.origins == [Origin("aw-1", 1, 2), Origin("aw-0", 1, 1)]
    assert live.accept("aw-0", {"r": 1}, [output("r", 7)], 1.0) == []
    assert len(live.accept("aw-2", {"r": 3}, [output("r", 7)], 1.0)) == 1
    live.worker_up("aw-0", 9, 2.0)
    add = added(live.worker_down("aw-2", "killed", 3.0))
    assert (add.sent, add.origins) == ([5, 6, 7], [Origin("aw-2", 1, 3)]), "older ones are of no use"
    assert live.counters.outputs_stale == 1
    assert live.counters.failovers == {"closed": 3}


def test_a_request_that_sent_nothing_has_origins_too() -> None:
    live = streams("aw-0", "aw-1")
    live.add(request("r"), 0.0)
    add = added(live.worker_down("aw-0", "killed", 1.0))
    assert (add.sent, add.origins) == ([], [Origin("aw-0", 1, 1)]), "its prompt may be committed"


def test_the_stall_is_told_with_the_next_token() -> None:
    stalls: list[float] = []
    live = streams("aw-0", "aw-1", "aw-2", on_stall=stalls.append)
    live.add(request("r"), 0.0)
    live.accept("aw-0", {"r": 1}, [output("r", 5)], 0.5)
    live.worker_down("aw-0", "killed", 1.0)
    live.worker_down("aw-1", "killed", 2.0)
    live.accept("aw-2", {"r": 3}, [output("r", 6)], 2.5)
    live.accept("aw-2", {"r": 3}, [output("r", 7)], 9.0)
    assert stalls == [1.5]


def test_a_token_clears_a_request() -> None:
    live = streams("aw-0", "aw-1", failovers_max=2)
    live.add(request("r"), 0.0)
    for death in range(10):
        owner = live.live["r"].owner
        assert owner is not None
        live.accept(owner, {"r": death + 1}, [output("r", death)], 0.0)
        assert sent_to(live.worker_down(owner, "killed", 0.0))[1] == death + 2
        live.worker_up(owner, death + 2, 0.0)
    assert live.live["r"].failovers == 1


def test_suspects_run_one_at_a_time_and_innocents_are_cleared() -> None:
    live = streams("aw-0", waiting_max=0)
    for name in ("killer", "a", "b"):
        live.add(request(name), 0.0)
    live.worker_down("aw-0", "killed", 0.0)
    assert len(live.worker_up("aw-0", 2, 0.0)) == 3
    live.worker_down("aw-0", "killed", 0.0)
    assert all(stream.is_suspect for stream in live.live.values())
    # The killer, alone, takes its worker with it a third time; then the others get their turns.
    assert sent_to(live.worker_up("aw-0", 3, 0.0)) == ("aw-0", 3)
    assert live.live["killer"].owner == "aw-0"
    assert live.worker_down("aw-0", "killed", 0.0) == []
    assert sent_to(live.worker_up("aw-0", 4, 0.0)) == ("aw-0", 3)
    assert live.worker_up("aw-1", 1, 0.0) == [], "another worker does not mean another suspect"
    assert live.due() == []
    live.accept("aw-0", {"a": 3}, [output("a", 1)], 0.0)
    assert live.live["a"].failovers == 0
    assert sent_to(live.due()) == ("aw-1", 3)
    # One that ends before its first token makes room, too.
    actions = live.abort(["b"])
    assert actions[0] == Send("aw-1", Abort({"b": 3}))
    assert sent_to(actions[1:]) == ("aw-1", 4)
    actions = live.worker_down("aw-1", "killed", 0.0)
    assert "4 attention workers were lost under this request" in failure(actions)
    assert isinstance(actions[0], Fail)
    assert actions[0].harmful
    assert list(live.live) == ["a"]


def test_a_suspect_gets_a_worker_of_its_own() -> None:
    live = streams("aw-0", waiting_max=0)
    live.add(request("killer"), 0.0)
    live.worker_down("aw-0", "killed", 0.0)
    live.worker_up("aw-0", 2, 0.0)
    live.worker_up("aw-1", 1, 0.0)
    live.worker_down("aw-0", "killed", 0.0)
    assert live.live["killer"].owner == "aw-1"
    live.worker_up("aw-0", 3, 0.0)
    live.add(request("innocent"), 0.0)
    assert live.live["innocent"].owner == "aw-0", "nothing joins a suspect"
    # The third death: the survivor is emptied for it.
    actions = live.worker_down("aw-1", "killed", 0.0)
    assert live.live["killer"].owner == "aw-0"
    assert live.live["innocent"].owner == "aw-0", "there is no other worker"
    live.worker_up("aw-1", 2, 0.0)
    live.add(request("late"), 0.0)
    assert live.live["late"].owner == "aw-1"
    live.accept("aw-0", {"killer": 4}, [output("killer", 1)], 0.0)
    live.add(request("later"), 0.0)
    assert {live.live[name].owner for name in ("late", "later")} <= {"aw-0", "aw-1"}
    assert len(actions) == 1


def test_what_a_suspects_worker_runs_goes_to_the_others() -> None:
    live = streams("aw-0", "aw-1", "aw-2")
    live.add(request("killer"), 0.0)
    live.add(request("a"), 0.0)
    live.add(request("b"), 0.0)
    live.live["killer"].failovers = 1
    actions = live.worker_down("aw-0", "killed", 0.0)
    owner = live.live["killer"].owner
    assert owner is not None
    held, moved, killer = actions
    assert isinstance(held, Send)
    assert isinstance(moved, Send)
    assert isinstance(killer, Send)
    assert isinstance(moved.message, Add)
    assert held == Send(owner, Hold({moved.message.request.request_id: 1}))
    assert moved.message.origins == [Origin(owner, 1, 1, living=True)], "it must not be fenced"
    assert killer.worker == owner != moved.worker
    assert live.counters.moved == 1
    assert live.loads[owner].running == {"killer": 3}


def test_a_suspect_does_not_wait_for_its_turn_for_ever() -> None:
    live = streams("aw-0")
    for name in ("a", "b"):
        live.add(request(name), 0.0)
    live.worker_down("aw-0", "killed", 0.0)
    live.worker_up("aw-0", 2, 0.0)
    live.worker_down("aw-0", "killed", 5.0)
    live.worker_up("aw-0", 3, 6.0)
    assert "its turn did not come within 10 s" in failure(live.expire(15.0))


def test_a_worker_that_hung_up_gets_nothing_new() -> None:
    live = streams("aw-0", "aw-1", "aw-2")
    for name in ("a", "b"):
        live.add(request(name), 0.0)
    live.closing("aw-1")
    assert sent_to(live.worker_down("aw-0", "killed", 0.0)) == ("aw-2", 2)
    assert len(live.accept("aw-1", {"b": 1}, [output("b", 1)], 0.0)) == 1, "what it sent before counts"
    assert sent_to(live.worker_down("aw-1", "killed", 0.0)) == ("aw-2", 2)
    assert live.live["b"].failovers == 1


def test_requests_that_have_begun_may_wait_without_bound() -> None:
    live = streams("aw-0", waiting_max=1)
    for name in "abc":
        live.add(request(name), 0.0)
    assert live.worker_down("aw-0", "killed", 0.0) == []
    assert "too many requests wait" in failure(live.add(request("d"), 0.0))
    assert len(live.worker_up("aw-1", 1, 1.0)) == 3


def test_a_drain_seals_at_once_and_aborts_once_the_rows_are_taken_over() -> None:
    live = streams("aw-0", "aw-1")
    live.add(request("r"), 0.0)
    live.accept("aw-0", {"r": 1}, [output("r", 5)], 0.0)
    hold, *given = live.drain("aw-0", 1.0)
    assert hold == Send("aw-0", Hold({"r": 1}))
    add = added(given)
    assert (add.sent, add.origins) == ([5], [Origin("aw-0", 1, 1, living=True)])
    assert live.live["r"].failovers == 0, "nobody died"
    assert live.accept("aw-0", {"r": 1}, [output("r", 6)], 1.0) == []
    assert live.due() == []
    assert live.drained() == set(), "its rows are still needed"
    assert len(live.accept("aw-1", {"r": 2}, [output("r", 6)], 1.0)) == 1
    assert live.due() == [Send("aw-0", Abort({"r": 1}))]
    assert live.drained() == {"aw-0"}
    assert live.due() == []
    assert (live.counters.moved, live.counters.restarts) == (1, 0)


def test_the_worker_of_a_drained_request_may_die_and_the_request_may_end() -> None:
    live = streams("aw-0", "aw-1", "aw-2")
    live.add(request("a"), 0.0)
    live.add(request("b"), 0.0)
    live.drain("aw-0", 0.0)
    assert live.live["a"].owner == "aw-2"
    add = added(live.worker_down("aw-2", "killed", 1.0))
    assert add.origins == [Origin("aw-2", 1, 2), Origin("aw-0", 1, 1, living=True)], (
        "only the dead are fenced"
    )
    actions = live.abort(["a"])
    assert sorted(action.worker for action in actions if isinstance(action, Send)) == ["aw-0", "aw-1"]
    assert live.drained() == {"aw-0"}
    live.worker_up("aw-2", 2, 1.0)
    live.drain("aw-1", 1.0)
    live.worker_down("aw-1", "killed", 2.0)  # the old attempt is gone; the new one goes on
    live.accept("aw-2", {"b": 2}, [output("b", 1, last=True)], 2.0)
    assert live.due() == []
    assert not live.live


@pytest.mark.parametrize(("others", "owner"), [((), "aw-0"), (("aw-2",), "aw-2")])
def test_what_a_living_worker_holds_goes_to_it_again_only_if_there_is_no_other(
    others: tuple[str, ...], owner: str
) -> None:
    live = streams("aw-0", "aw-1")
    live.add(request("r"), 0.0)
    live.drain("aw-0", 0.0)
    live.draining.clear()  # as a worker that was emptied for a suspect
    for name in others:
        live.worker_up(name, 1, 0.0)
        live.loads[name].add("load", 1_000)
    assert sent_to(live.worker_down("aw-1", "killed", 1.0)) == (owner, 3)
    live.loads.pop("aw-2", None)
    aborts = {action.worker: action.message for action in live.abort(["r"]) if isinstance(action, Send)}
    assert aborts[owner] == Abort({"r": 3}), "the attempt that runs, not the one that is held"


def test_a_drained_worker_ends_what_nobody_else_can_take() -> None:
    live = streams("aw-0")
    live.add(request("r"), 0.0)
    assert live.drain("aw-0", 0.0) == []
    assert len(live.accept("aw-0", {"r": 1}, [output("r", 5, last=True)], 0.0)) == 1
    assert live.drained() == {"aw-0"}


def test_a_request_is_not_carried_from_worker_to_worker_for_ever() -> None:
    live = streams("aw-0", "aw-1", failovers_max=2)
    live.add(request("killer"), 0.0)
    assert sent_to(live.worker_down("aw-0", "killed", 0.0)) == ("aw-1", 2)
    live.worker_up("aw-0", 1, 0.0)
    assert sent_to(live.worker_down("aw-1", "killed", 0.0)) == ("aw-0", 3)
    live.worker_up("aw-1", 1, 0.0)
    assert "3 attention workers were lost under this request" in failure(
        live.worker_down("aw-0", "killed", 0.0)
    )
    assert live.loads["aw-1"].tokens == 0


def test_only_its_own_requests_are_touched_when_a_worker_is_lost() -> None:
    live = streams("aw-0", "aw-1")
    live.add(request("a"), 0.0)
    live.add(request("b"), 0.0)
    assert live.live["b"].owner == "aw-1"
    sent_to(live.worker_down("aw-0", "killed", 0.0))
    assert (live.live["b"].owner, live.live["b"].attempt) == ("aw-1", 1)
    assert live.worker_down("aw-0", "killed", 0.0) == []


def test_requests_wait_for_a_worker_in_order_within_bounds() -> None:
    live = streams()
    assert live.add(request("a"), 0.0) == []
    assert live.add(request("b"), 5.0) == []
    assert "too many requests wait" in failure(live.add(request("c"), 6.0))
    assert live.expire(9.9) == []
    assert "within 10 s" in failure(live.expire(10.0))
    actions = live.worker_up("aw-0", 1, 11.0)
    assert sent_to(actions) == ("aw-0", 1)
    assert list(live.live) == ["b"]
    assert not live.waiting


def test_a_waiting_request_can_be_aborted() -> None:
    live = streams()
    live.add(request("a"), 0.0)
    assert live.abort(["a", "a", "unknown"]) == []
    assert live.worker_up("aw-0", 1, 1.0) == []
    assert not live.live


def test_aborts_go_to_the_owner_with_the_attempt() -> None:
    live = streams("aw-0", "aw-1")
    for name in "abc":
        live.add(request(name), 0.0)
    live.worker_down("aw-1", "killed", 0.0)
    (action,) = live.abort(["a", "b"])
    assert action == Send("aw-0", Abort({"a": 1, "b": 2}))
    assert list(live.live) == ["c"]
    assert live.accept("aw-0", {"a": 1}, [output("a", 5)], 0.0) == []


def test_everything_ends_when_the_gateway_shuts_down() -> None:
    live = streams("aw-0")
    live.add(request("a"), 0.0)
    live.add(request("b"), 0.0)
    assert [action.request_id for action in live.shut("bye") if isinstance(action, Fail)] == ["a", "b"]
    assert not live.live


@pytest.mark.parametrize(
    ("temperature", "seed", "expected"), [(1.0, None, 7), (1.0, 3, 3), (0.0, None, None)]
)
def test_only_unseeded_sampling_is_given_a_seed(
    temperature: float, seed: int | None, expected: int | None
) -> None:
    original = request("r", temperature=temperature, seed=seed)
    before = original.sampling_params.seed
    assert with_seed(original, lambda: 7).sampling_params.seed == expected
    assert original.sampling_params.seed == before, "the front end's own parameters must not change"


def test_children_that_share_parameters_get_seeds_of_their_own() -> None:
    live = streams("aw-0")
    shared = SamplingParams(temperature=1.0)
    for child in range(3):
        made = request(f"{child}_r")
        made.sampling_params = shared
        live.add(made, 0.0)
    assert [stream.request.sampling_params.seed for stream in live.live.values()] == [100, 101, 102]


@pytest.mark.parametrize("seed", range(20))
def test_random_lives_leave_nothing_behind(seed: int) -> None:
    """Every request ends exactly once; loads always match the streams that workers own."""
    chance = random.Random(seed)
    live = streams("aw-0", "aw-1", waiting_max=50)
    ended: list[str] = []

    def take(actions: list[Action]) -> None:
        ended.extend(action.request_id for action in actions if isinstance(action, Fail))

    for number in range(300):
        event = chance.choice(["add", "add", "output", "output", "abort", "down", "up", "time"])
        names = sorted(live.live)
        match event:
            case "add":
                take(live.add(request(f"{chance.randrange(3)}_r{number}"), float(number)))
            case "output" if names:
                stream = live.live[chance.choice(names)]
                if stream.owner is not None:
                    name, last = stream.request.request_id, chance.random() < 0.3
                    passed = live.accept(
                        stream.owner, {name: stream.attempt}, [output(name, 1, last=last)], 0.0
                    )
                    ended.extend(name for _ in passed if last)
            case "abort" if names:
                name = chance.choice(names)
                live.abort([name])
                ended.append(name)
            case "down" if live.loads:
                take(live.worker_down(chance.choice(sorted(live.loads)), "killed", float(number)))
            case "up":
                missing = [name for name in ("aw-0", "aw-1") if name not in live.loads]
                if missing:
                    take(live.worker_up(missing[0], 1, float(number)))
            case "time":
                take(live.expire(float(number)))
        owned: dict[str, set[str]] = {name: set() for name in live.loads}
        for stream in live.live.values():
            if stream.owner is not None:
                owned[stream.owner].add(stream.request.request_id)
        assert {name: set(load.running) for name, load in live.loads.items()} == owned
        assert all(stream.owner is None for stream in live.waiting.values())
    take(live.shut("end"))
    assert len(ended) == len(set(ended)) == live.counters.requests
    assert all(load.tokens == 0 and not load.groups for load in live.loads.values())
