"""The simulator: nothing is lost, times follow from the prices, equal runs are equal."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec
import numpy as np
import pytest

from memserve.core.types import StepPrices, Tokens
from memserve.engine.pace import Budget, PrefillPrices, prefill_share
from memserve.engine.share_out import share_out
from memserve.scheduler.costs import Wire
from memserve.scheduler.policies import Policy, policy_by_name
from memserve.scheduler.policies.cost import LeastCost
from memserve.sim.journey import InOrder, Outcome, SimRequest
from memserve.sim.simulation import Simulation
from memserve.sim.site import Site
from memserve.sim.steps import Span, Speed, plan_steps

PRICES = StepPrices(step=0.01, row=0.002, row_context=1e-7, token=1e-4, token_context=1e-9)
WIRE = Wire(bytes_per_token=1000.0, bandwidth=1e8, latency=0.001)


class Prefill(NamedTuple):
    computed: int
    pending: int


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
    (done,) = simulate(site(colocated=1), [SimRequest(1.0, tokens(0, 1000), tokens(0, 11))])
    prefill = 0.01 + 1000 * 1e-4 + 1e-9 * 1000**2 / 2
    assert done.ttft == pytest.approx(prefill)
    step = 0.01 + 0.002 + 1e-7 * (1000 + 11 / 2)
    assert done.jct - done.ttft == pytest.approx(10 * step)
    assert done.decision.predicted_ttft == pytest.approx(done.ttft, rel=1e-2)


def test_a_prompt_bears_whole_steps() -> None:
    (done,) = simulate(site(colocated=1), [SimRequest(1.0, tokens(0, 1100), tokens(0, 2))])
    assert done.ttft == pytest.approx(2 * 0.01 + 1100 * 1e-4 + 1e-9 * 1100**2 / 2)


def test_who_comes_in_a_step_waits_for_its_end() -> None:
    long, short = SimRequest(0.0, tokens(0, 1000), tokens(0, 2)), tokens(90_000, 16)
    step = 0.01 + 1000 * 1e-4 + 1e-9 * 1000**2 / 2
    _, done = simulate(site(colocated=1), [long, SimRequest(step / 10, short, tokens(0, 1))])
    decoding = 0.002 + 1e-7 * (1000 + 2 / 2)
    prefill = 0.01 + 16 * 1e-4 + 1e-9 * 16**2 / 2
    assert done.at + done.ttft == pytest.approx(step + decoding + prefill)


def test_of_two_that_come_at_once_the_second_uses_what_the_first_computes() -> None:
    prompts = [np.concatenate((tokens(0, 32), tokens(n, 400))) for n in (50_000, 90_000)]
    done = simulate(site(colocated=1), [SimRequest(0.0, one, tokens(0, 1)) for one in prompts])
    assert [one.cached_tokens for one in sorted(done, key=lambda one: one.number)] == [0, 32]


def test_a_step_gives_half_to_the_oldest_prompt_and_the_rest_to_the_shortest() -> None:
    prompts = [(500, 3000), (0, 2000), (0, 300)]
    first, *_ = plan_steps(Speed(PRICES, step_tokens=1000), prompts, 0, 0.0, 9, now=1.0)
    assert dict(first.chunks) == {0: 500, 1: 200, 2: 300}
    assert first.start == 1.0
    assert first.seconds == pytest.approx(
        0.01 + 1000 * 1e-4 + 1e-9 * (500 * 500 + (500**2 + 200**2 + 300**2) / 2)
    )


def test_a_plan_is_no_longer_than_the_first_prompt_and_the_first_stream() -> None:
    speed = Speed(PRICES, step_tokens=1000)
    assert [span.count for span in plan_steps(speed, [(0, 3500)], 0, 0.0, 99, 0.0)] == [1, 1, 1, 1]
    assert [span.count for span in plan_steps(speed, [(0, 3500)], 2, 100.0, 2, 0.0)] == [1, 1]
    assert [span.count for span in plan_steps(speed, [], 2, 100.0, 7, 0.0)] == [7]


def test_streams_keep_their_pace_while_a_prompt_is_prefilled() -> None:
    speed = Speed(PRICES, step_tokens=1000, target_tpot=0.05)
    paced = [span.seconds for span in plan_steps(speed, [(0, 3500)], 2, 100.0, 99, 0.0)]
    assert len(paced) > 4
    assert max(paced) <= 0.05
    assert min(paced[:-1]) > 0.049


def test_a_span_is_over_step_by_step_and_ends_with_the_running_one() -> None:
    span = Span(1.0, 0.5, 10)
    assert (span.finish(1.4), span.finish(2.0), span.finish(2.1)) == (0, 2, 0)
    span.cut(2.1)
    assert (span.count, span.end) == (3, 2.5)
    assert (span.finish(2.5), span.done) == (1, 3)


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


@pytest.mark.parametrize(("streams", "target"), [(0, 0.0), (3, 0.0), (3, 0.05)])
def test_a_lone_prompt_is_gets_what_an_engine_would_give_it(streams: int, target: float) -> None:
    speed = Speed(PRICES, step_tokens=1000, target_tpot=target)
    lone = list(plan_steps(speed, [(40, 3500)], streams, 100.0 * streams, 99, 2.0))
    costs = PrefillPrices(PRICES.token, PRICES.token_context)
    decoding = PRICES.step + PRICES.row * streams + PRICES.row_context * 100.0 * streams
    computed, pending, now = 40, 3500, 2.0
    for span in lone:
        left = prefill_share(costs, target, decoding, computed) if target and streams else math.inf
        ((_, count),) = share_out([Prefill(computed, pending)], Budget(costs, 1000 - streams, left))
        assert (span.start, span.chunks) == (now, ((0, count),))
        assert span.end - span.start == pytest.approx(decoding + costs.seconds_of(computed, count))
        computed, pending, now = computed + count, pending - count, span.end
    assert pending == 0 or len(lone) == 6
