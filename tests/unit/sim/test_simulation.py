"""The simulator: nothing is lost, times follow from the prices, equal runs are equal."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from memserve.core.types import StepPrices, Tokens
from memserve.scheduler.costs import Wire
from memserve.scheduler.policies import Policy, policy_by_name
from memserve.scheduler.policies.cost import LeastCost
from memserve.sim.engine import Speed
from memserve.sim.journey import InOrder, Outcome, SimRequest
from memserve.sim.simulation import Simulation
from memserve.sim.site import Site

PRICES = StepPrices(step=0.01, row=0.002, row_context=1e-7, token=1e-4, token_context=1e-9)
WIRE = Wire(bytes_per_token=1000.0, bandwidth=1e8, latency=0.001)


def tokens(start: int, count: int) -> Tokens:
    return np.arange(start, start + count, dtype=np.int32)


def site(prefill: int = 0, decode: int = 0, colocated: int = 0, blocks: int = 4096) -> Site:
    return Site(prefill, decode, colocated, Speed(PRICES, step_tokens=1000), blocks, WIRE)


def simulate(where: Site, requests: list[SimRequest], policy: Policy | None = None) -> list[Outcome]:
    done: list[Outcome] = []
    simulation = Simulation(where, policy or policy_by_name("cost"), done.append)
    simulation.run(InOrder(requests))
    simulation.check()
    simulation.close()
    return done


def sessions(count: int) -> list[SimRequest]:
    """Several sessions whose prompts grow, a few requests per second."""
    return [
        SimRequest(0.2 * n, tokens(10_000 * (n % 5), 400 + 160 * (n // 5)), tokens(7, 20 + n), f"s{n % 5}")
        for n in range(count)
    ]


def test_one_request_takes_what_its_steps_cost() -> None:
    (done,) = simulate(site(colocated=1), [SimRequest(1.0, tokens(0, 800), tokens(0, 11))])
    prefill = 800 * (1e-4 + 0.01 / 1000) + 1e-9 * 800**2 / 2
    assert done.ttft == pytest.approx(prefill)
    step = 0.01 + 0.002 + 1e-7 * (800 + 11 / 2)
    assert done.jct - done.ttft == pytest.approx(10 * step)
    assert done.decision.predicted_ttft == pytest.approx(done.ttft, rel=1e-2)


def test_a_prefix_is_not_computed_again() -> None:
    first, second = simulate(
        site(colocated=1),
        [SimRequest(0.0, tokens(0, 800), tokens(0, 4)), SimRequest(5.0, tokens(0, 960), tokens(0, 4))],
    )
    assert (first.cached_tokens, second.cached_tokens) == (0, 800)
    assert second.ttft < first.ttft / 3


def test_handing_over_moves_kv_and_brings_the_answer_back() -> None:
    answer = tokens(50_000, 160)
    first = SimRequest(0.0, tokens(0, 800), answer)
    second = SimRequest(9.0, np.concatenate((tokens(0, 800), answer)), tokens(0, 4))
    done = simulate(site(prefill=1, decode=1), [first, second])
    assert [one.decision.decode for one in done] == ["decode-0", "decode-0"]
    assert done[1].cached_tokens == 944


def test_streams_beside_it_stretch_a_prefill() -> None:
    alone, beside = (
        simulate(site(colocated=1), [*others, SimRequest(2.0, tokens(90_000, 900), tokens(0, 2))])[0]
        for others in ([], [SimRequest(0.0, tokens(n * 1000, 100), tokens(0, 3000)) for n in range(4)])
    )
    assert beside.ttft > alone.ttft


@pytest.mark.parametrize("where", [site(colocated=3), site(prefill=2, decode=1), site(1, 1, 1)])
@pytest.mark.parametrize("policy", ["cost", "prompt-tree", "round-robin"])
def test_all_are_answered_and_equal_runs_are_equal(where: Site, policy: str) -> None:
    runs = [simulate(where, sessions(40), policy_by_name(policy)) for _ in range(2)]
    assert len(runs[0]) == 40
    assert all(one.at < one.first_token <= one.ended for one in runs[0])
    assert msgspec.json.encode(runs[0]) == msgspec.json.encode(runs[1])


def test_small_pools_make_requests_wait_and_lose_none() -> None:
    done = simulate(site(colocated=1, blocks=120), sessions(25))
    assert len(done) == 25


def test_a_full_decode_place_is_asked_again() -> None:
    where = Site(1, 1, 0, Speed(PRICES, step_tokens=1000), 120, WIRE)
    requests = [SimRequest(0.01 * n, tokens(n * 5000, 900), tokens(0, 50)) for n in range(4)]
    assert len(simulate(where, requests)) == 4


def test_a_busy_holder_sends_its_prefix_elsewhere() -> None:
    long = tokens(0, 8000)
    requests = [
        SimRequest(0.0, long, tokens(0, 2)),
        SimRequest(4.0, np.concatenate((long, tokens(90_000, 6000))), tokens(0, 2)),
        SimRequest(4.1, np.concatenate((long, tokens(70_000, 160))), tokens(0, 2)),
    ]
    where = Site(0, 0, 2, Speed(PRICES, step_tokens=1000), 4096, Wire(1000.0, 1e9, 0.001))
    stays, fetches = (
        {one.at: one for one in simulate(where, requests, LeastCost(fetches=given))}[4.1]
        for given in (False, True)
    )
    assert fetches.decision.fetch_from is not None
    assert fetches.cached_tokens == 8000
    assert fetches.ttft < stays.ttft
