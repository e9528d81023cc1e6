"""KV below the device costs what bringing it up takes, or computing it again: planned and looked back at."""

from __future__ import annotations

from random import Random

import pytest

from memserve.core.clock import VirtualClock
from memserve.core.types import InstanceId, RequestId, StepPrices
from memserve.scheduler.decision import Decision, decide, decide_recorded
from memserve.scheduler.hindsight import Outcome
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.policies.cost import LeastCost
from memserve.scheduler.record import Candidate
from memserve.scheduler.service import GlobalScheduler

PRICES = StepPrices(step=0.01, row=0.001, row_context=1e-6, token=1e-3, token_context=1e-6)


@pytest.fixture
def swapped(cluster):
    fill(cluster)
    return cluster


def fill(cluster) -> None:
    """c0 and c1 hold thirty of forty blocks; c0 has all but ten of them below its device."""
    cluster.add("c0", "c1")
    cluster.apply("c1", 0, cluster.stored(0, 30))
    cluster.snapshot("c0", 1, cluster.stored(0, 30), moved=(cluster.moved(0, 30, 10),))
    cluster.set_wire(bytes_per_token=1e9)
    price(cluster)


def price(cluster, swap: float = 1e-4) -> None:
    for name in ("c0", "c1"):
        cluster.report(name, prices=PRICES, swap=swap if name == "c0" else 0.0)


def place(cluster) -> Decision:
    return decide(cluster.request("r", blocks=40), cluster.state, LeastCost(), 0.0)


def weigh(cluster) -> dict[str, Candidate]:
    _, record = decide_recorded(cluster.request("r", blocks=40), cluster.state, LeastCost(), 0.0)
    return {one.instance: one for one in record.prefill_candidates()}


def test_what_lies_below_the_device_makes_another_place_win(swapped) -> None:
    assert place(swapped).prefill == "c1"
    swapped.apply("c0", 1, swapped.moved(0, 30, 10, "device"))
    assert place(swapped).prefill == "c0", "equal places go by id"


def test_it_costs_its_seconds_once_and_others_theirs(swapped) -> None:
    seen = weigh(swapped)
    seconds = 320 * 1e-4
    assert (seen["c0"].swap, seen["c1"].swap) == (pytest.approx(seconds), 0.0)
    assert seen["c0"].prefill == pytest.approx(seen["c1"].prefill + seconds)
    # Its own, and one for whoever comes behind.
    assert seen["c0"].total == pytest.approx(seen["c1"].total + 2 * seconds)


def test_streams_do_not_stretch_it_and_stand_still_meanwhile(swapped) -> None:
    beside = {"running": 2}
    swapped.report("c0", prices=PRICES, swap=1e-4, **beside)
    swapped.report("c1", prices=PRICES, **beside)
    seen = weigh(swapped)
    seconds = 320 * 1e-4
    assert seen["c0"].total == pytest.approx(seen["c1"].total + (2 + 2) * seconds)
    streams = swapped.state.fleet.columns.stretch
    assert float(streams[0]) > 1


def test_the_line_behind_it_waits_for_it(swapped) -> None:
    swapped.state.drop_instance(InstanceId("c1"))
    dear = place(swapped)
    swapped.apply("c0", 1, swapped.moved(0, 30, 10, "device"))
    cheap = place(swapped)
    seconds = 320 * 1e-4
    assert dear.predicted_prefill == pytest.approx(cheap.predicted_prefill + seconds)
    assert dear.prefill_share().seconds == dear.predicted_prefill
    assert dear.predicted_ttft == pytest.approx(cheap.predicted_ttft + seconds)
    assert (dear.matched_prefill, dear.believed) == (480, 480)


def test_where_computing_is_quicker_it_stays_below(swapped) -> None:
    """The engine does so: what is believed to be found, and to be computed, is what it will."""
    swapped.state.drop_instance(InstanceId("c1"))
    price(swapped, swap=1.0)
    decision = place(swapped)
    assert (decision.matched_prefill, decision.left_below, decision.believed) == (480, 320, 160)
    assert decision.prefill_share().work.prefill_tokens == 640 - 160
    assert weigh(swapped)["c0"].swap == 0.0
    swapped.apply("c0", 1, swapped.removed(0, 11, 10))
    assert place(swapped).predicted_prefill == decision.predicted_prefill


def test_a_slow_tier_makes_a_fetch_worth_it_elsewhere(swapped) -> None:
    """c2 has nothing, c1 is busy: c2 fetches what it would not compute, rather than c0 swapping in."""
    swapped.add("c2")
    swapped.report("c2", prices=PRICES)
    swapped.report("c1", prices=PRICES, waiting=9, tokens_to_prefill=9000)
    swapped.set_wire(bytes_per_token=1.0, bandwidth=1e5, latency=1e-4)
    assert place(swapped).prefill == "c2"
    assert (place(swapped).fetch_from, place(swapped).fetch_tokens) == ("c1", 480)
    price(swapped, swap=1e-7)
    swapped.report("c1", prices=PRICES, waiting=9, tokens_to_prefill=9000)
    assert (place(swapped).prefill, place(swapped).fetch_from) == ("c0", None)


def test_what_lies_below_is_not_fetched(swapped) -> None:
    """A sender sends what is on its device."""
    swapped.state.drop_instance(InstanceId("c1"))
    swapped.add("c2")
    swapped.report("c2", prices=PRICES)
    swapped.report("c0", prices=PRICES, waiting=9, tokens_to_prefill=9000)
    swapped.set_wire(bytes_per_token=1.0, bandwidth=1e6, latency=1e-4)
    decision = place(swapped)
    assert (decision.prefill, decision.fetch_from, decision.fetch_tokens) == ("c2", "c0", 160)


def test_who_receives_swaps_in_first(swapped) -> None:
    """A longer prefix fetched from c1 adds to what c0 has, of which a part is below."""
    swapped.apply("c1", 1, swapped.stored(0, 39))
    swapped.report("c1", prices=PRICES, waiting=9, tokens_to_prefill=9000)
    swapped.set_wire(bytes_per_token=1.0, bandwidth=1e6, latency=1e-4)
    price(swapped, swap=5e-4)
    swapped.report("c1", prices=PRICES, waiting=9, tokens_to_prefill=9000)
    decision, seen = place(swapped), weigh(swapped)["c0"]
    assert (decision.prefill, decision.fetch_tokens) == ("c0", 624)
    assert seen.swap == pytest.approx(320 * 5e-4)
    assert seen.prefill == pytest.approx(decision.predicted_prefill)


def test_where_it_decodes_it_costs_too(cluster) -> None:
    cluster.add("p0", "d0", "d1")
    cluster.apply("d1", 0, cluster.stored(0, 30))
    cluster.snapshot("d0", 1, cluster.stored(0, 30), moved=(cluster.moved(0, 30, 0),))
    for name in ("p0", "d0", "d1"):
        cluster.report(name, prices=PRICES, swap=1e-3)
    cluster.apply("p0", 0, cluster.stored(0, 40))
    assert place(cluster).decode == "d1"
    cluster.apply("d0", 1, cluster.moved(0, 30, 0, "device"))
    assert place(cluster).decode == "d0"


def begin_to_answer(scheduler: GlobalScheduler, clock: VirtualClock, decision: Decision) -> Outcome:
    """The first token comes when it was foreseen, with what thirty blocks hold."""
    clock.advance(decision.predicted_ttft)
    scheduler.first_token(decision.request, cached=480)
    why = scheduler.explain(decision.request)
    assert why is not None
    assert why.outcome is not None
    return why.outcome


def test_hindsight_prices_what_lay_below(cluster) -> None:
    """c1 had it on the device: that much sooner. c0 has it there by now, but had to bring it up."""
    clock = VirtualClock(5.0)
    scheduler = GlobalScheduler(policy_by_name("round-robin"), clock)
    cluster.state = scheduler.state
    fill(cluster)
    decision = scheduler.route(cluster.request("r", blocks=40))
    assert decision.prefill == "c0"
    cluster.apply("c0", 1, cluster.moved(0, 30, 10, "device"))
    outcome = begin_to_answer(scheduler, clock, decision)
    c0, c1 = outcome.places
    seconds = 320 * 1e-4
    assert (c0.cached_tokens, c1.cached_tokens) == (480, 480)
    assert c0.prefill == pytest.approx(c1.prefill + seconds)
    assert outcome.regret == pytest.approx(seconds)
    assert outcome.best == "c1"


def test_hindsight_knows_what_others_have_lowered_since(cluster) -> None:
    clock = VirtualClock(5.0)
    scheduler = GlobalScheduler(policy_by_name("round-robin"), clock)
    cluster.state = scheduler.state
    fill(cluster)
    cluster.apply("c0", 1, cluster.moved(0, 30, 10, "device"))
    scheduler.finish(scheduler.route(cluster.request("q", blocks=40)).request)
    decision = scheduler.route(cluster.request("r", blocks=40))
    assert decision.prefill == "c1"
    cluster.apply("c0", 2, cluster.moved(0, 30, 20))
    outcome = begin_to_answer(scheduler, clock, decision)
    c0, c1 = outcome.places
    assert c0.prefill == pytest.approx(c1.prefill + 160 * 1e-4)


def test_the_explanation_leads_to_the_choice_again(cluster) -> None:
    """A busy life in which KV goes down and up: the least total is the chosen place, with its swap in it."""
    clock, random = VirtualClock(5.0), Random(1)
    scheduler = GlobalScheduler(LeastCost(), clock)
    cluster.state = scheduler.state
    names, numbers = ("c0", "c1", "c2"), dict.fromkeys(("c0", "c1", "c2"), 1)
    cluster.add(*names)
    for name in names:
        stored = cluster.stored(0, 10)
        cluster.snapshot(name, 1, stored, moved=(cluster.moved(0, 10, 9),))
    swaps = 0
    for n in range(200):
        clock.advance(random.expovariate(20))
        name, path, blocks = random.choice(names), 1000 * random.randrange(3), random.randrange(2, 50)
        stored = cluster.stored(path, blocks)
        tier = random.choice(["host", "disk", "device"])
        moved = cluster.moved(path, blocks, 0 if tier == "device" else random.randrange(blocks), tier)
        cluster.apply(name, numbers[name], stored, moved)
        numbers[name] += 2
        prices = StepPrices(token=random.uniform(1e-4, 3e-3))
        cluster.report(name, prices=prices, swap=random.uniform(0, 1e-3))
        request = cluster.request(f"r{n}", 1000 * random.randrange(3), random.randrange(1, 60))
        decision = scheduler.route(request)
        why = scheduler.explain(decision.request)
        assert why is not None
        places = why.prefill_candidates
        assert min(places, key=lambda one: one.total).instance == decision.prefill
        chosen = next(one for one in places if one.chosen)
        assert chosen.prefill == pytest.approx(decision.predicted_prefill)
        swaps += chosen.swap > 0
        if n >= 9:
            scheduler.first_token(request_name(n - 9), cached=0)
        if n >= 20:
            scheduler.finish(request_name(n - 20))
    scheduler.state.check()
    assert swaps > 10


def request_name(n: int) -> RequestId:
    return RequestId(f"r{n}")
