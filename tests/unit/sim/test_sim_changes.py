"""Losses, returns and changes of role in the simulator: nothing is lost, nothing is said twice."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from memserve.core.errors import ConfigError
from memserve.core.types import InstanceId, Role, StepPrices, Tokens
from memserve.scheduler.costs import Wire
from memserve.scheduler.policies import policy_by_name
from memserve.sim.journey import InOrder, Outcome, SimRequest
from memserve.sim.simulation import Simulation
from memserve.sim.site import Change, Loss, RoleChange, Site
from memserve.sim.steps import Speed

PRICES = StepPrices(step=0.01, row=0.002, row_context=1e-7, token=1e-4, token_context=1e-9)
C0, P0, D0 = InstanceId("colocated-0"), InstanceId("prefill-0"), InstanceId("decode-0")


def tokens(start: int, count: int) -> Tokens:
    return np.arange(start, start + count, dtype=np.int32)


def site(prefill: int = 0, decode: int = 0, colocated: int = 0, blocks: int = 4096) -> Site:
    wire = Wire(bytes_per_token=1000.0, bandwidth=1e8, latency=0.001)
    return Site(prefill, decode, colocated, Speed(PRICES, step_tokens=1000), blocks, wire)


def simulate(where: Site, requests: list[SimRequest], *changes: Change) -> list[Outcome]:
    done: list[Outcome] = []
    simulation = Simulation(where, policy_by_name("cost"), done.append, changes=changes)
    simulation.run(InOrder(requests))
    simulation.check()
    simulation.close()
    return sorted(done, key=lambda one: one.number)


def sessions(count: int) -> list[SimRequest]:
    return [
        SimRequest(0.2 * n, tokens(10_000 * (n % 5), 400 + 160 * (n // 5)), tokens(7, 60 + n), f"s{n % 5}")
        for n in range(count)
    ]


ONE = SimRequest(0.0, tokens(0, 800), tokens(50_000, 101))
"""Prefilled after about 0.09 s; its answer takes a second more."""


def test_an_answer_goes_on_elsewhere_with_what_was_said() -> None:
    (undisturbed,) = simulate(site(colocated=2), [ONE])
    at = undisturbed.first_token + 30.5 * 0.01212
    (done,) = simulate(site(colocated=2), [ONE], Loss(undisturbed.decision.prefill, at))
    second = done.decisions[1]
    assert (second.prefill, second.request) == ("colocated-1", "r0~1")
    assert second.prompt_tokens == 800 + 31
    assert done.first_token == undisturbed.first_token
    assert done.ended > undisturbed.ended
    assert not done.error


@pytest.mark.parametrize(("lost", "attempts"), [(P0, 1), (D0, 2)])
def test_who_prefilled_matters_no_more_once_the_answer_is_decoded_elsewhere(lost: str, attempts: int) -> None:
    where = site(prefill=2, decode=2)
    (undisturbed,) = simulate(where, [ONE])
    assert (undisturbed.decision.prefill, undisturbed.decision.decode) == (P0, D0)
    (done,) = simulate(where, [ONE], Loss(InstanceId(lost), 0.6))
    assert len(done.decisions) == attempts
    assert not done.error


def test_what_survives_elsewhere_is_found_again() -> None:
    (done,) = simulate(site(prefill=1, decode=2), [ONE], Loss(D0, 0.6))
    assert done.decisions[1].matched_prefill == 800


def test_a_request_waits_for_whoever_comes_back() -> None:
    (done,) = simulate(site(colocated=1), [ONE], Loss(C0, 0.5, back=3.0))
    assert len(done.decisions) == 2
    assert done.ended > 3.5
    assert not done.error


def test_one_who_comes_back_is_empty() -> None:
    later = SimRequest(5.0, tokens(0, 800), tokens(0, 2))
    kept, lost = (
        simulate(site(colocated=1), [ONE, later], *changes)[1].cached_tokens
        for changes in ((), (Loss(C0, 3.0, back=1.0),))
    )
    assert (kept, lost) == (784, 0)


def test_without_anybody_left_requests_fail_and_say_so() -> None:
    running, coming = simulate(
        site(colocated=1), [ONE, SimRequest(2.0, tokens(0, 99), tokens(0, 2))], Loss(C0, 0.5)
    )
    assert "colocated-0 was lost" in running.error
    assert "no prefill or colocated instance" in coming.error
    assert coming.decisions == ()


def test_a_request_that_fits_nowhere_is_refused() -> None:
    (done,) = simulate(site(colocated=1, blocks=50), [ONE])
    assert "do not fit" in done.error


def test_a_role_changes_and_the_cache_stays() -> None:
    again = SimRequest(5.0, tokens(0, 960), tokens(0, 2))
    change = RoleChange(InstanceId("prefill-1"), Role.COLOCATED, 2.0)
    first, second = simulate(site(prefill=2, decode=1), [ONE, again], change)
    assert first.decision.decode == D0
    assert second.cached_tokens >= 784


STORM: Sequence[Change] = (
    Loss(InstanceId("colocated-1"), 1.0, back=2.0),
    RoleChange(InstanceId("prefill-1"), Role.DECODE, 2.0),
    Loss(D0, 3.3),
    Loss(InstanceId("prefill-0"), 4.0, back=0.5),
    Loss(InstanceId("colocated-1"), 6.0, back=1.0),
    RoleChange(InstanceId("prefill-1"), Role.COLOCATED, 7.0),
)


@pytest.mark.parametrize("where", [site(2, 1, 2), site(2, 1, 2, blocks=200)])
def test_in_a_storm_nothing_is_lost_and_equal_runs_are_equal(where: Site) -> None:
    runs = [simulate(where, sessions(60), *STORM) for _ in range(2)]
    assert [one.number for one in runs[0]] == list(range(60))
    assert not any(one.error for one in runs[0])
    assert any(len(one.decisions) > 1 for one in runs[0])
    assert all(one.at < one.first_token <= one.ended for one in runs[0])
    assert msgspec.json.encode(runs[0]) == msgspec.json.encode(runs[1])


@pytest.mark.parametrize("change", [Loss(InstanceId("colocated-9"), 1.0), Loss(C0, -1.0), Loss(C0, 1.0, 0.0)])
def test_changes_that_make_no_sense_are_refused(change: Change) -> None:
    with pytest.raises(ConfigError, match="colocated"):
        simulate(site(colocated=1), [ONE], change)


def test_a_role_nobody_is_left_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="nobody would be left to decode"):
        simulate(site(prefill=1, decode=1), [ONE], RoleChange(D0, Role.PREFILL, 0.5))
