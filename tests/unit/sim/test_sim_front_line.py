"""The line in front of simulated instances: who waits in it, in which order, and for whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from memserve.core.types import InstanceId, StepPrices, Tokens
from memserve.scheduler.costs import Wire
from memserve.scheduler.policies import policy_by_name
from memserve.sim.journey import InOrder, Outcome, SimRequest
from memserve.sim.shards import Sharding
from memserve.sim.simulation import Simulation
from memserve.sim.site import Change, Loss, Site
from memserve.sim.steps import Speed

PRICES = StepPrices(step=0.01, row=0.002, row_context=1e-7, token=1e-4, token_context=1e-9)
WIRE = Wire(bytes_per_token=1000.0, bandwidth=1e8, latency=0.001)
C0 = InstanceId("colocated-0")


def tokens(start: int, count: int) -> Tokens:
    return np.arange(start, start + count, dtype=np.int32)


def simulate(
    requests: Sequence[SimRequest],
    *changes: Change,
    prefill: int = 0,
    decode: int = 0,
    colocated: int = 0,
    policy: str = "cost",
    sharding: Sharding | None = None,
) -> list[Outcome]:
    done: list[Outcome] = []
    site = Site(prefill, decode, colocated, Speed(PRICES, step_tokens=1000), 1 << 14, WIRE)
    simulation = Simulation(site, policy_by_name(policy), done.append, changes=changes, sharding=sharding)
    simulation.run(InOrder(requests))
    simulation.check()
    simulation.close()
    return sorted(done, key=lambda one: one.number)


def burst(*lengths: int) -> list[SimRequest]:
    """All at once, nothing in common."""
    return [SimRequest(0.0, tokens(100_000 * n, length), tokens(7, 2)) for n, length in enumerate(lengths)]


def waited(outcome: Outcome) -> float:
    return outcome.decision.decided_at - outcome.at


def test_an_instance_gets_no_more_than_its_lead() -> None:
    done = simulate(burst(*[4000] * 6), colocated=1)
    assert [waited(one) == 0 for one in done] == [True, True, False, False, False, False]
    # The next one goes when the first is prefilled: about 0.4 s of tokens.
    assert waited(done[2]) == pytest.approx(done[0].ttft)


def test_who_has_room_takes_all_at_once() -> None:
    assert [waited(one) for one in simulate(burst(*[4000] * 6), colocated=8)] == [0.0] * 6


def test_of_those_who_wait_the_shortest_goes_first() -> None:
    done = simulate(burst(4000, 4000, 6000, 5000, 3000), colocated=1)
    assert waited(done[4]) < waited(done[3]) < waited(done[2])


def test_predictions_begin_with_the_decision() -> None:
    for one in simulate(burst(*[4000] * 6), colocated=1):
        assert one.served == one.ttft - waited(one)
        assert one.decision.predicted_ttft == pytest.approx(one.served, rel=0.3)


def test_who_waits_goes_on_when_an_instance_comes_back() -> None:
    done = simulate(burst(*[4000] * 6), Loss(C0, 0.2, back=1.0), colocated=1)
    assert not any(one.error for one in done)
    assert waited(done[5]) > 1.0


def test_who_waits_is_told_that_nobody_is_left() -> None:
    done = simulate(burst(*[4000] * 6), Loss(C0, 0.2), colocated=1)
    assert ["no prefill or colocated instance" in one.error for one in done] == [True] * 6
    assert [len(one.decisions) for one in done] == [1, 1, 0, 0, 0, 0]
    assert all(one.ended == pytest.approx(0.2) for one in done)


def test_each_shard_has_a_line() -> None:
    done = simulate(burst(*[4000] * 24), colocated=4, sharding=Sharding(4))
    assert not any(one.error for one in done)
    assert 4 < sum(waited(one) == 0 for one in done) < 24


@pytest.mark.parametrize(("policy", "helped"), [("cost", True), ("prompt-tree", False)])
def test_a_decode_instance_helps_those_who_wait_if_the_policy_knows_how(policy: str, helped: bool) -> None:
    done = simulate(burst(*[4000] * 10), prefill=1, decode=1, policy=policy)
    assert any(one.decision.prefill == "decode-0" for one in done) is helped
    # Neither crowds the prefill instance meanwhile.
    assert all(one.served < 3 * done[0].ttft for one in done)


def test_who_waits_makes_helping_worth_more() -> None:
    """One alone would wait for the prefill instance; with others behind it the streams have to bear it."""
    streams = [SimRequest(0.0, tokens(10_000 * n, 16), tokens(7, 3000)) for n in range(3)]
    prompts = [SimRequest(2.0, tokens(500_000 + 10_000 * n, 4000), tokens(7, 2)) for n in range(12)]
    few = simulate([*streams, *prompts[:2]], prefill=1, decode=1)
    many = simulate([*streams, *prompts], prefill=1, decode=1)
    assert [one.decision.prefill for one in few[3:]] == ["prefill-0"] * 2
    assert "decode-0" in [one.decision.prefill for one in many[3:]]
