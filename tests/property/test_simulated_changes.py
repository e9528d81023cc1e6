"""Whatever befalls whichever instances and whenever: every request is answered once, or told why not."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.core.errors import ConfigError
from memserve.core.types import InstanceId, Role, StepPrices
from memserve.scheduler.costs import Wire
from memserve.scheduler.policies import policy_by_name
from memserve.sim.journey import InOrder, Outcome, SimRequest
from memserve.sim.simulation import Simulation
from memserve.sim.site import Change, Loss, RoleChange, Site
from memserve.sim.steps import Speed

PRICES = StepPrices(step=0.01, row=0.002, row_context=1e-7, token=1e-4, token_context=1e-9)
SITE = Site(2, 2, 1, Speed(PRICES, step_tokens=1000), 160, Wire(1000.0, 1e8, 0.001))
NAMES = [name for name, _ in SITE.instances()]
REQUESTS = 25

instances, times = st.sampled_from(NAMES), st.floats(0.0, 6.0)
losses = st.builds(Loss, instances, times, st.none() | st.floats(0.01, 3.0))
role_changes = st.builds(RoleChange, instances, st.sampled_from(Role), times)


def requests() -> InOrder:
    """Five sessions whose prompts grow, in pools that hold three of them."""
    return InOrder(
        SimRequest(
            0.2 * n,
            np.arange(300 + 120 * (n // 5), dtype=np.int32) + 10_000 * (n % 5),
            np.arange(40 + n, dtype=np.int32) + 90_000,
            f"s{n % 5}",
        )
        for n in range(REQUESTS)
    )


def simulate(changes: list[Change], policy: str) -> list[Outcome]:
    done: list[Outcome] = []
    simulation = Simulation(SITE, policy_by_name(policy), done.append, changes=changes)
    try:
        simulation.run(requests())
        simulation.check()
    finally:
        simulation.close()
    return done


@settings(max_examples=40, deadline=None)
@given(st.lists(losses | role_changes, max_size=6), st.sampled_from(["cost", "prompt-tree", "round-robin"]))
def test_every_request_ends_once_and_equal_runs_are_equal(changes: list[Change], policy: str) -> None:
    try:
        done = simulate(changes, policy)
    except ConfigError:
        # A role that nobody would be left for.
        return
    assert sorted(one.number for one in done) == list(range(REQUESTS))
    for one in done:
        assert one.at <= one.ended
        if not one.error:
            assert one.at < one.first_token <= one.ended
            assert one.ledger.prompt == one.prompt_tokens
        names = [decision.request for decision in one.decisions]
        assert len(set(names)) == len(names)
    assert msgspec.json.encode(done) == msgspec.json.encode(simulate(changes, policy))


def test_the_storm_is_one() -> None:
    """Losing everybody in turn moves requests, so the property above is not about nothing."""
    storm: list[Change] = [Loss(InstanceId(name), 1.0 + 0.5 * n, 1.0) for n, name in enumerate(NAMES)]
    done = simulate(storm, "cost")
    assert any(len(one.decisions) > 2 for one in done)
    assert not any(one.error for one in done)
