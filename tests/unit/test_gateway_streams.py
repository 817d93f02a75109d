"""Who runs a request, what becomes of it when its worker is lost, and which outputs may reach the client."""

from __future__ import annotations

import itertools
import random

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from tarragon.gateway.streams import Action, Fail, Send, Streams, with_seed
from tarragon.gateway.wire import Abort, Add


def request(request_id: str, *, temperature: float = 1.0, seed: int | None = None) -> EngineCoreRequest:
    params = SamplingParams(temperature=temperature, seed=seed)
    return EngineCoreRequest(request_id, [1, 2, 3], None, params, None, 0.0, None, None, None)


def streams(*workers: str, failovers_max: int = 3, waiting_max: int = 2) -> Streams:
    seeds = itertools.count(100)
    made = Streams(
        failovers_max=failovers_max, waiting_max=waiting_max, wait_s=10.0, draw_seed=lambda: next(seeds)
    )
    for worker in workers:
        assert made.worker_up(worker, 0.0) == []
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


def failure(actions: list[Action]) -> str:
    (action,) = actions
    assert isinstance(action, Fail)
    return action.message


def output(request_id: str, *tokens: int, last: bool = False) -> EngineCoreOutput:
    return EngineCoreOutput(request_id, list(tokens), finish_reason=FinishReason.STOP if last else None)


def test_a_request_goes_to_one_worker_and_ends_with_its_last_output() -> None:
    live = streams("aw-0", "aw-1")
    assert sent_to(live.add(request("r"), 0.0)) == ("aw-0", 1)
    assert len(live.accept("aw-0", {"r": 1}, [output("r", 5)])) == 1
    assert live.live["r"].sent == [5]
    assert len(live.accept("aw-0", {"r": 1}, [output("r", 6, last=True)])) == 1
    assert not live.live
    assert live.loads["aw-0"].tokens == 0


def test_outputs_of_others_than_the_owner_are_dropped_and_counted() -> None:
    live = streams("aw-0", "aw-1")
    live.add(request("r"), 0.0)
    assert live.accept("aw-1", {"r": 1}, [output("r", 5)]) == []
    assert live.accept("aw-0", {"r": 2}, [output("r", 5)]) == []
    assert live.counters.outputs_stale == 2
    assert live.accept("aw-0", {"gone": 1}, [output("gone", 5)]) == []
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
    assert live.accept("aw-0", {"r": 1}, [output("r", 5)]) == []
    assert live.accept("aw-1", {"r": 1}, [output("r", 5)]) == []
    assert len(live.accept("aw-1", {"r": 2}, [output("r", 5)])) == 1


def test_a_request_with_tokens_ends_with_a_reason() -> None:
    live = streams("aw-0", "aw-1")
    live.add(request("r"), 0.0)
    live.accept("aw-0", {"r": 1}, [output("r", 5, 6)])
    why = failure(live.worker_down("aw-0", "killed by SIGKILL", 1.0))
    assert why == "attention worker aw-0 was lost (killed by SIGKILL) after 2 tokens of this text"
    assert not live.live
    assert live.counters.failed == 1


def test_a_request_is_not_carried_from_worker_to_worker_for_ever() -> None:
    live = streams("aw-0", "aw-1", failovers_max=2)
    live.add(request("killer"), 0.0)
    assert sent_to(live.worker_down("aw-0", "killed", 0.0)) == ("aw-1", 2)
    live.worker_up("aw-0", 0.0)
    assert sent_to(live.worker_down("aw-1", "killed", 0.0)) == ("aw-0", 3)
    live.worker_up("aw-1", 0.0)
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
    actions = live.worker_up("aw-0", 11.0)
    assert sent_to(actions) == ("aw-0", 1)
    assert list(live.live) == ["b"]
    assert not live.waiting


def test_a_waiting_request_can_be_aborted() -> None:
    live = streams()
    live.add(request("a"), 0.0)
    assert live.abort(["a", "a", "unknown"]) == []
    assert live.worker_up("aw-0", 1.0) == []
    assert not live.live


def test_aborts_go_to_the_owner_with_the_attempt() -> None:
    live = streams("aw-0", "aw-1")
    for name in "abc":
        live.add(request(name), 0.0)
    live.worker_down("aw-1", "killed", 0.0)
    (action,) = live.abort(["a", "b"])
    assert action == Send("aw-0", Abort({"a": 1, "b": 2}))
    assert list(live.live) == ["c"]
    assert live.accept("aw-0", {"a": 1}, [output("a", 5)]) == []


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
                    passed = live.accept(stream.owner, {name: stream.attempt}, [output(name, 1, last=last)])
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
                    take(live.worker_up(missing[0], float(number)))
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
