"""What decisions turn out to be worth: lines that end sooner or later, prefixes that are not there."""

from __future__ import annotations

import math

import pytest

from memserve.core.clock import VirtualClock
from memserve.core.types import InstanceId, RequestId, StepPrices
from memserve.scheduler.hindsight import Hindsight, Outcome
from memserve.scheduler.line import PrefillLine
from memserve.scheduler.policies import Policy, policy_by_name
from memserve.scheduler.policies.cost import LeastCost
from memserve.scheduler.service import GlobalScheduler

TOKEN = 0.01
PRICES = StepPrices(step=0.0, row=0.0, row_context=0.0, token=TOKEN, token_context=0.0)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(100.0)


def started(cluster, clock: VirtualClock, policy: Policy, *names: str) -> GlobalScheduler:
    scheduler = GlobalScheduler(policy, clock)
    for name in names:
        scheduler.member_ready(cluster.member(name), cluster.ready(name))
        scheduler.on_heartbeat(cluster.heartbeat(name, prices=PRICES))
    return scheduler


def outcome(scheduler: GlobalScheduler, name: str) -> Outcome:
    why = scheduler.explain(RequestId(name))
    assert why is not None
    assert why.outcome is not None
    return why.outcome


def place(found: Outcome, name: str) -> Hindsight:
    return next(one for one in found.places if one.instance == name)


def two_busy_places(cluster, clock: VirtualClock) -> GlobalScheduler:
    """``a`` and ``b`` prefill 64 tokens each on c0 and c1, ``r`` waits behind ``a``."""
    scheduler = started(cluster, clock, policy_by_name("round-robin"), "c0", "c1")
    for name, start in (("a", 0), ("b", 1000), ("r", 2000)):
        scheduler.route(cluster.request(name, start))
    return scheduler


def test_the_other_line_was_free_sooner(cluster, clock: VirtualClock) -> None:
    scheduler = two_busy_places(cluster, clock)
    clock.advance(0.2)
    scheduler.first_token(RequestId("b"), 0)
    clock.advance(1.8)
    scheduler.first_token(RequestId("a"), 0)
    clock.advance(1.0)
    scheduler.first_token(RequestId("r"), 0)
    found = outcome(scheduler, "r")
    assert found.ttft == pytest.approx(3.0)
    assert place(found, "c0").ttft == pytest.approx(2.0 + 64 * TOKEN)
    assert place(found, "c1").ttft == pytest.approx(0.2 + 64 * TOKEN)
    assert (found.best, found.regret) == ("c1", pytest.approx(1.8))
    assert found.unexplained == pytest.approx(3.0 - 2.64)
    assert found.regret_total is None


def test_what_came_to_the_other_place_later_does_not_count(cluster, clock: VirtualClock) -> None:
    scheduler = two_busy_places(cluster, clock)
    scheduler.route(cluster.request("later", 3000))
    clock.advance(0.5)
    scheduler.first_token(RequestId("b"), 0)
    clock.advance(1.5)
    scheduler.first_token(RequestId("a"), 0)
    scheduler.first_token(RequestId("r"), 0)
    assert place(outcome(scheduler, "r"), "c1").waited == pytest.approx(0.5)


def test_a_line_that_is_still_busy_was_no_better(cluster, clock: VirtualClock) -> None:
    scheduler = two_busy_places(cluster, clock)
    clock.advance(1.0)
    scheduler.first_token(RequestId("a"), 0)
    clock.advance(1.0)
    scheduler.first_token(RequestId("r"), 0)
    found = outcome(scheduler, "r")
    assert place(found, "c1").still_busy
    assert (found.best, found.regret) == ("c0", 0.0)


def test_a_first_token_before_the_line_ended_bounds_the_chosen(cluster, clock: VirtualClock) -> None:
    scheduler = two_busy_places(cluster, clock)
    clock.advance(0.1)
    scheduler.first_token(RequestId("r"), 0)
    found = outcome(scheduler, "r")
    assert (found.regret, found.unexplained) == (0.0, 0.0)
    assert place(found, "c0").ttft == pytest.approx(0.1)


def test_a_prefix_that_was_not_there_is_regretted(cluster, clock: VirtualClock) -> None:
    scheduler = started(cluster, clock, policy_by_name("prompt-tree"), "c0", "c1")
    scheduler.on_pool_events(cluster.events("c0", 0, cluster.stored(0, 2)))
    scheduler.on_pool_events(cluster.events("c1", 0, cluster.stored(0, 3)))
    assert scheduler.route(cluster.request("r")).prefill == "c1"
    clock.advance(0.64)
    scheduler.first_token(RequestId("r"), cached=0)
    found = outcome(scheduler, "r")
    assert (found.cached_tokens, place(found, "c0").cached_tokens) == (0, 32)
    assert (found.best, found.regret) == ("c0", pytest.approx(32 * TOKEN))


def test_what_left_another_place_meanwhile_is_not_counted_on(cluster, clock: VirtualClock) -> None:
    scheduler = started(cluster, clock, policy_by_name("round-robin"), "c0", "c1")
    scheduler.on_pool_events(cluster.events("c1", 0, cluster.stored(0, 3)))
    scheduler.route(cluster.request("r"))
    scheduler.on_pool_events(cluster.events("c1", 1, cluster.removed(0, 3, 0)))
    clock.advance(0.64)
    scheduler.first_token(RequestId("r"), cached=0)
    assert outcome(scheduler, "r").regret == pytest.approx(0.0)


def test_prices_are_those_learnt_since(cluster, clock: VirtualClock) -> None:
    scheduler = started(cluster, clock, policy_by_name("round-robin"), "c0", "c1")
    scheduler.route(cluster.request("r"))
    for name, token in (("c0", 2 * TOKEN), ("c1", TOKEN / 2)):
        prices = StepPrices(step=0, token=token, token_context=0)
        scheduler.on_heartbeat(cluster.heartbeat(name, prices=prices))
    clock.advance(2.0)
    scheduler.first_token(RequestId("r"), 0)
    found = outcome(scheduler, "r")
    assert found.regret == pytest.approx(64 * TOKEN * 1.5)
    assert found.unexplained == pytest.approx(2.0 - 64 * TOKEN * 2)


def test_a_place_that_was_lost_is_no_candidate_any_more(cluster, clock: VirtualClock) -> None:
    scheduler = two_busy_places(cluster, clock)
    scheduler.member_lost(InstanceId("c1"))
    clock.advance(2.0)
    scheduler.first_token(RequestId("r"), 0)
    assert [one.instance for one in outcome(scheduler, "r").places] == ["c0"]
    scheduler.state.check()


def test_regret_of_the_total_leaves_room_for_others_sake(cluster, clock: VirtualClock) -> None:
    scheduler = started(cluster, clock, LeastCost(fetches=False), "c0", "c1")
    scheduler.on_pool_events(cluster.events("c1", 0, cluster.stored(0, 3)))
    assert scheduler.route(cluster.request("r")).prefill == "c1"
    clock.advance(0.7)
    scheduler.first_token(RequestId("r"), cached=16)
    found = outcome(scheduler, "r")
    assert (found.regret, found.regret_total, found.best) == (0.0, 0.0, "c1")
    why = scheduler.explain(RequestId("r"))
    total = {one.instance: one.total for one in why.prefill_candidates}
    assert place(found, "c1").total == pytest.approx(total["c1"] + 32 * TOKEN)
    assert place(found, "c0").total == pytest.approx(total["c0"])


def test_nobody_can_send_what_the_holder_did_not_have(cluster, clock: VirtualClock) -> None:
    scheduler = started(cluster, clock, LeastCost(fetches=True), "c0", "c1")
    scheduler.on_pool_events(cluster.events("c1", 0, cluster.stored(0, 3)))
    assert scheduler.route(cluster.request("r")).prefill == "c1"
    planned = scheduler.explain(RequestId("r")).prefill_candidates[0]
    assert (planned.instance, planned.fetch_tokens) == ("c0", 48)
    clock.advance(0.7)
    scheduler.first_token(RequestId("r"), cached=16)
    found = outcome(scheduler, "r")
    assert (place(found, "c0").cached_tokens, found.regret) == (16, 0.0)


def test_sums_by_policy(cluster, clock: VirtualClock) -> None:
    scheduler = two_busy_places(cluster, clock)
    clock.advance(0.2)
    for name in "bar":
        scheduler.first_token(RequestId(name), 0)
        scheduler.first_token(RequestId(name), 0)
        clock.advance(1.0)
    assert outcome(scheduler, "b").regret == 0.0
    (sums,) = scheduler.regrets().values()
    assert (sums.decisions, sums.others, sums.totals) == (3, 1, 0)
    assert sums.regret == pytest.approx(outcome(scheduler, "r").regret)
    assert 0 < sums.regret < sums.ttft


def test_a_request_without_a_token_has_no_outcome(cluster, clock: VirtualClock) -> None:
    scheduler = two_busy_places(cluster, clock)
    scheduler.finish(RequestId("r"))
    scheduler.first_token(RequestId("r"))
    why = scheduler.explain(RequestId("r"))
    assert (why.outcome, len(why.prefill_candidates)) == (None, 2)
    assert scheduler.regrets() == {}


def test_without_explanations_decisions_are_the_same_and_bare(cluster, clock: VirtualClock) -> None:
    bare = GlobalScheduler(policy_by_name("cost"), clock, explains=False)
    bare.member_ready(cluster.member("c0"), cluster.ready("c0"))
    full = GlobalScheduler(policy_by_name("cost"), clock)
    full.member_ready(cluster.member("c0"), cluster.ready("c0"))
    assert bare.route(cluster.request("r")) == full.route(cluster.request("r"))
    bare.first_token(RequestId("r"), 0)
    why = bare.explain(RequestId("r"))
    assert (why.prefill_candidates, why.decode_candidates, why.outcome) == ((), (), None)


def test_marks_learn_when_all_ahead_have_gone() -> None:
    line = PrefillLine()
    assert line.mark().at == -math.inf
    for name in "abc":
        line.join(RequestId(name), 1.0, 1.0)
        if name == "b":
            mark, same = line.mark(), line.mark()
    last = line.mark()
    assert mark is same
    for name, at, ends in (("b", 2.0, None), ("c", 3.0, None), ("a", 4.0, 4.0)):
        assert mark.at is None
        line.leave(RequestId(name), at)
        assert mark.at == ends
    assert last.at == 4.0
