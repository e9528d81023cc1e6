"""A prefix that everybody wants: its first holder gets company, and nobody computes it twice."""

from __future__ import annotations

import numpy as np

from memserve.core.types import StepPrices
from memserve.scheduler.costs import Wire
from memserve.scheduler.policies.cost import LeastCost
from memserve.sim.journey import InOrder, Outcome, SimRequest
from memserve.sim.simulation import Simulation
from memserve.sim.site import Site
from memserve.sim.steps import Speed

PRICES = StepPrices(step=0.01, row=0.002, row_context=1e-7, token=1e-4, token_context=1e-9)
WIRE = Wire(bytes_per_token=1000.0, bandwidth=1e9, latency=0.001)
PREFIX, OWN, REQUESTS = 16_000, 1600, 40


def requests() -> list[SimRequest]:
    """A first one alone, then four times as many per second as one instance gets done."""
    hot = np.arange(PREFIX, dtype=np.int32)
    return [
        SimRequest(
            0.0 if n == 0 else 5.0 + 0.05 * n,
            np.concatenate((hot, np.arange(OWN, dtype=np.int32) + 100_000 * (n + 1))),
            np.zeros(2, np.int32),
        )
        for n in range(REQUESTS)
    ]


def simulate(policy: LeastCost) -> list[Outcome]:
    done: list[Outcome] = []
    simulation = Simulation(Site(0, 0, 4, Speed(PRICES, step_tokens=1000), 8192, WIRE), policy, done.append)
    simulation.run(InOrder(requests()))
    simulation.check()
    simulation.close()
    return done


def test_a_hot_prefix_is_replicated_where_its_holder_is_busy() -> None:
    done = simulate(LeastCost())
    assert {one.decision.prefill for one in done} == {f"colocated-{n}" for n in range(4)}
    fetched = [one for one in done if one.decision.fetch_from is not None]
    assert len(fetched) >= 3
    assert sum(one.prompt_tokens - one.cached_tokens for one in done) == PREFIX + REQUESTS * OWN


def test_that_is_quicker_than_waiting_for_the_one_holder() -> None:
    replicated, alone = (simulate(LeastCost(fetches=given)) for given in (True, False))
    assert np.mean([one.ttft for one in replicated]) < 0.9 * np.mean([one.ttft for one in alone])
