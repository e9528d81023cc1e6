"""Equal prompts at one simulated engine: one computes, the others use what it has done."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.core.types import Namespace, StepPrices, Tokens
from memserve.scheduler.costs import Wire
from memserve.scheduler.policies import policy_by_name
from memserve.sim.following import Prefill, lead_of
from memserve.sim.journey import InOrder, Outcome, SimRequest
from memserve.sim.simulation import Simulation
from memserve.sim.site import Site
from memserve.sim.steps import Speed

PRICES = StepPrices(step=0.01, row=0.002, row_context=1e-7, token=1e-4, token_context=1e-9)
SPACE = Namespace("m")


def tokens(start: int, count: int) -> Tokens:
    return np.arange(start, start + count, dtype=np.int32)


def simulate(*requests: SimRequest) -> list[Outcome]:
    done: list[Outcome] = []
    site = Site(0, 0, 1, Speed(PRICES, step_tokens=1000), 4096, Wire(1000.0, 1e8, 0.001))
    simulation = Simulation(site, policy_by_name("cost"), done.append)
    simulation.run(InOrder(requests))
    simulation.check()
    simulation.close()
    return sorted(done, key=lambda one: one.at)


def test_the_lead_is_who_shares_most_and_is_worth_waiting_for_while_much_is_coming() -> None:
    running = [Prefill(SPACE, tokens(0, 400), 0), Prefill(SPACE, tokens(0, 900), 500)]
    lead = lead_of(SPACE, tokens(0, 800), running, 16)
    assert lead is not None
    assert (lead.leader, lead.tokens, lead.worth_waiting(800)) == (1, 784, True)
    done = lead_of(SPACE, tokens(0, 800), [Prefill(SPACE, tokens(0, 900), 780)], 16)
    assert done is not None
    assert not done.worth_waiting(800)
    assert lead_of(Namespace("other"), tokens(0, 800), running, 16) is None
    assert lead_of(SPACE, tokens(5000, 800), running, 16) is None


def test_equal_prompts_at_once_are_computed_once() -> None:
    prompt, answer = tokens(0, 3200), tokens(0, 4)
    first, second = simulate(SimRequest(0.0, prompt, answer), SimRequest(0.01, prompt, answer))
    assert (first.cached_tokens, second.cached_tokens) == (0, 3184)
    assert second.first_token == pytest.approx(first.first_token, rel=0.1)


def test_a_follower_goes_on_when_the_common_part_is_done() -> None:
    prefix, answer = tokens(0, 1600), tokens(0, 4)
    long = SimRequest(0.0, np.concatenate((prefix, tokens(50_000, 6400))), answer)
    short = SimRequest(0.01, np.concatenate((prefix, tokens(90_000, 160))), answer)
    first, second = simulate(long, short)
    assert second.cached_tokens == 1600
    assert second.first_token < first.first_token
