"""Which attention worker a request goes to."""

from __future__ import annotations

import random

from tarragon.gateway.balance import Load, choose, sibling_group


def loads(*names: str) -> dict[str, Load]:
    return {name: Load() for name in names}


def test_nobody_is_chosen_when_there_is_nobody() -> None:
    assert choose({}, "r", 5) is None


def test_ties_go_to_the_smallest_id() -> None:
    assert choose(loads("aw-1", "aw-0", "aw-2"), "r", 5) == "aw-0"


def test_prompt_tokens_left_weigh_until_the_first_token() -> None:
    workers = loads("aw-0", "aw-1")
    workers["aw-0"].add("long", 1000)
    workers["aw-1"].add("short", 10)
    workers["aw-1"].add("short2", 10)
    assert choose(workers, "r", 1) == "aw-1"
    workers["aw-0"].first_token("long")
    assert workers["aw-0"].tokens == 1
    assert choose(workers, "r", 1) == "aw-0"


def test_running_requests_weigh_one_token_each() -> None:
    workers = loads("aw-0", "aw-1")
    for name, worker in (("a", "aw-0"), ("b", "aw-0"), ("c", "aw-1")):
        workers[worker].add(name, 7)
        workers[worker].first_token(name)
    assert choose(workers, "r", 1) == "aw-1"
    workers["aw-0"].remove("a")
    workers["aw-0"].remove("a")
    assert choose(workers, "r", 1) == "aw-0"


def test_siblings_share_a_worker_until_it_is_behind_by_their_prompt() -> None:
    workers = loads("aw-0", "aw-1")
    placed = []
    for child in range(200):
        name = choose(workers, f"{child}_cmpl-7", 100)
        assert name is not None
        workers[name].add(f"{child}_cmpl-7", 100)
        workers[name].first_token(f"{child}_cmpl-7")
        placed.append(name)
    assert placed[:101] == ["aw-0"] * 101
    assert "aw-1" in placed


def test_a_group_is_forgotten_with_its_last_child() -> None:
    load = Load()
    load.add("0_cmpl-7", 50)
    load.add("1_cmpl-7", 50)
    assert load.tokens == 52  # the second child's prompt comes from the prefix cache
    load.remove("0_cmpl-7")
    load.remove("1_cmpl-7")
    assert load == Load()


def test_only_children_are_no_siblings() -> None:
    assert sibling_group("3_cmpl-ab-12") == "cmpl-ab-12"
    assert sibling_group("cmpl_7-ab") is None
    assert sibling_group("cmpl-7") is None


def test_avoided_workers_are_the_last_resort() -> None:
    workers = loads("aw-0", "aw-1")
    assert choose(workers, "r", 5, avoid=["aw-0"]) == "aw-1"
    assert choose(workers, "r", 5, avoid=["aw-0", "aw-1"]) == "aw-0"


def test_random_traffic_stays_balanced_and_leaves_nothing() -> None:
    chance = random.Random(1)
    workers, where = loads("aw-0", "aw-1", "aw-2"), {}
    for number in range(600):
        name = choose(workers, f"r{number}", chance.randrange(1, 40))
        assert name is not None
        workers[name].add(f"r{number}", 7)
        workers[name].first_token(f"r{number}")
        where[f"r{number}"] = name
        if number % 2:
            done = chance.choice(sorted(where))
            workers[where.pop(done)].remove(done)
        counts = [len(load.running) for load in workers.values()]
        assert max(counts) - min(counts) <= 12
        assert all(load.prompt_tokens == sum(load.running.values()) == 0 for load in workers.values())
    for request, worker in where.items():
        workers[worker].remove(request)
    assert all(load == Load() for load in workers.values())
