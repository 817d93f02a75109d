"""Faults at random moments: `make test` runs a few rounds of them, `make campaign` a hundred.

TARRAGON_CAMPAIGN_ROUNDS and TARRAGON_CAMPAIGN_SEED choose how many and which; a round's number and seed
say all that is needed to run it again.
"""

from __future__ import annotations

import os
import random

import pytest
from tests.cluster.observe import replaced
from tests.cluster.test_attention_failover import FULL_CAPACITY_S, Once, assert_same
from tests.streams import read_all, streamed_tokens
from tests.undisturbed import Undisturbed

from tarragon.cluster import Cluster

ROUNDS = int(os.environ.get("TARRAGON_CAMPAIGN_ROUNDS", "3"))
SEED = int(os.environ.get("TARRAGON_CAMPAIGN_SEED", "2026"))
ROUND_TIMEOUT_S = 300

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(ROUND_TIMEOUT_S)]


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_fault_at_a_random_moment_changes_no_stream(
    cluster: Cluster, model_name: str, undisturbed: Undisturbed, number: int
) -> None:
    bodies, wanted = undisturbed.of_every_kind(cluster, model_name)
    rng = random.Random(SEED * 1_000 + number)
    victim = rng.choice(["aw-0", "aw-1", "aw-0", "aw-1", "ew-0", "ew-1"])
    signal = rng.choice(["SIGKILL", "SIGKILL", "SIGKILL", "SIGSTOP"])
    moment = rng.randrange(streamed_tokens(bodies.values(), wanted) - 20)
    cluster.wait_for("full_capacity", FULL_CAPACITY_S)
    pids = cluster.pids()
    fault = Once(lambda: cluster.kill(victim, signal), moment)

    got = read_all(cluster.url, model_name, list(bodies.values()), fault)

    fault.join()
    assert_same(bodies, got, wanted)
    replaced(cluster, pids, victim)
