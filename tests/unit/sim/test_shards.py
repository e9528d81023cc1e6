"""Schedulers that share the requests: prefixes meet in one shard, owned instances are nobody else's."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.core.types import StepPrices
from memserve.scheduler.costs import Wire
from memserve.scheduler.policies import policy_by_name
from memserve.sim.journey import InOrder, Outcome, SimRequest
from memserve.sim.shards import Sharding
from memserve.sim.simulation import Simulation
from memserve.sim.site import Site
from memserve.sim.steps import Speed

PRICES = StepPrices(step=0.01, row=0.002, row_context=1e-7, token=1e-4, token_context=1e-9)
WIRE = Wire(bytes_per_token=1000.0, bandwidth=1e8, latency=0.001)
FAMILIES = 12


def simulate(sharding: Sharding | None) -> list[Outcome]:
    """Twelve families of prompts, each with a beginning of its own, on eight colocated instances."""
    requests = [
        SimRequest(
            0.05 * n,
            np.arange(
                1000 * (n % FAMILIES), 1000 * (n % FAMILIES) + 320 + 16 * (n // FAMILIES), dtype=np.int32
            ),
            np.arange(20, dtype=np.int32),
        )
        for n in range(120)
    ]
    done: list[Outcome] = []
    site = Site(0, 0, 8, Speed(PRICES, step_tokens=1000), 4096, WIRE)
    simulation = Simulation(site, policy_by_name("prompt-tree"), done.append, sharding=sharding)
    simulation.run(InOrder(iter(requests)))
    simulation.check()
    simulation.close()
    return done


@pytest.mark.parametrize("sharding", [None, Sharding(), Sharding(4), Sharding(4, owned=True)])
def test_families_meet_whatever_the_shards(sharding: Sharding | None) -> None:
    done = simulate(sharding)
    assert len(done) == 120
    assert not any(one.error for one in done)
    hits = sum(one.cached_tokens for one in done) / sum(one.prompt_tokens for one in done)
    assert hits > 0.7


def test_one_shard_is_one_scheduler() -> None:
    plain, shared = simulate(None), simulate(Sharding(1))
    assert [(one.number, one.ttft, one.jct) for one in plain] == [
        (one.number, one.ttft, one.jct) for one in shared
    ]


def test_owned_instances_serve_their_shard_alone() -> None:
    owners: dict[str, set[int]] = {}
    for one in simulate(Sharding(8, owned=True)):
        owners.setdefault(one.decision.prefill, set()).add(one.number % FAMILIES)
    families = [family for served in owners.values() for family in served]
    assert len(families) == len(set(families)) == FAMILIES


def test_a_key_that_all_share_names_one_shard() -> None:
    done = simulate(Sharding(8, key_tokens=0, owned=True))
    assert {one.decision.prefill for one in done} == {done[0].decision.prefill}
