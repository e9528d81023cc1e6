"""Least cost: each term alone tips the choice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memserve.core.errors import NoInstance
from memserve.core.types import InstanceId, RequestId, StepPrices
from memserve.scheduler.costs import Wire
from memserve.scheduler.decision import Decision, decide, decide_recorded
from memserve.scheduler.places import Work
from memserve.scheduler.policies.cost import LeastCost, Weights
from memserve.scheduler.predictions import Forecast
from memserve.scheduler.record import Candidate
from memserve.scheduler.state import Share

PRICES = StepPrices(step=0.01, row=0.001, row_context=1e-6, token=1e-3, token_context=1e-6)


@pytest.fixture
def priced(cluster):
    """A cluster whose instances all report ``PRICES``."""

    def add(*names: str) -> None:
        cluster.add(*names)
        for name in names:
            cluster.report(name, prices=PRICES)

    cluster.add_priced = add
    return cluster


def place(cluster, policy: LeastCost | None = None, blocks: int = 40, now: float = 0.0) -> Decision:
    return decide(cluster.request("r", blocks=blocks), cluster.state, policy or LeastCost(), now)


def weigh(cluster, policy: LeastCost | None = None) -> tuple[Candidate, ...]:
    """The places to prefill as they are recorded."""
    _, record = decide_recorded(cluster.request("r", blocks=40), cluster.state, policy or LeastCost(), 0.0)
    return record.prefill_candidates()


def occupy(cluster, name: str, seconds: float) -> None:
    """Put ``seconds`` of prefill into the line of ``name``."""
    share = Share(InstanceId(name), Work(prefill_tokens=1), seconds)
    other = Share(InstanceId(name), Work(context_tokens=1, requests=1))
    cluster.state.book(RequestId(f"{name}-line"), share, other, 0.0)


def test_equal_places_go_by_id(priced) -> None:
    priced.add_priced("c2", "c0", "c1")
    assert place(priced).prefill == "c0"


def test_prefix_wins_until_the_line_costs_more_than_it_saves(priced) -> None:
    priced.add_priced("c0", "c1")
    priced.apply("c1", 0, priced.stored(0, 20))
    saved = weigh(priced)
    gain = saved[0].total - saved[1].total
    assert place(priced).prefill == "c1"
    occupy(priced, "c1", gain - 0.01)
    assert place(priced).prefill == "c1"
    occupy(priced, "c1", gain + 0.01)
    assert place(priced).prefill == "c0"


def test_slower_instance_is_avoided(priced) -> None:
    priced.add_priced("c0", "c1")
    priced.report("c0", prices=StepPrices(token=2e-3))
    assert place(priced).prefill == "c1"


def test_streams_beside_it_count(priced) -> None:
    priced.add_priced("c0", "c1")
    first, second = (Share(InstanceId("c0"), Work()), Share(InstanceId("c0"), Work(context_tokens=10)))
    priced.state.book(RequestId("s"), first, second)
    priced.state.finish_prefill(RequestId("s"))
    assert place(priced).prefill == "c1"


def test_a_short_prompt_gets_half_of_the_steps_beside_a_long_one(priced) -> None:
    priced.add_priced("c0")
    occupy(priced, "c0", 3.0)
    decision = place(priced, blocks=4, now=1.0)
    prefill = 64 * (1e-3 + 0.01 / 512) + 1e-6 * 64 * 64 / 2
    assert decision.predicted_prefill == pytest.approx(prefill)
    assert decision.forecast == Forecast(pytest.approx(2 * prefill), pytest.approx(512 * 1e-3))


def test_an_idle_place_makes_nobody_wait(priced) -> None:
    priced.add_priced("c0")
    decision = place(priced, blocks=4)
    assert decision.forecast == Forecast(decision.predicted_prefill, 0.0)
    assert decision.predicted_ttft == decision.predicted_prefill


def test_work_that_others_have_sent_counts(priced) -> None:
    priced.add_priced("c0", "c1")
    priced.report("c0", prices=PRICES, waiting=3, tokens_to_prefill=2000)
    assert place(priced).prefill == "c1"
    assert place(priced).forecast == Forecast(place(priced).predicted_prefill, 0.0)
    priced.report("c1", prices=PRICES, waiting=5, tokens_to_prefill=4000)
    decision = place(priced)
    assert decision.prefill == "c0"
    assert decision.forecast.served == pytest.approx(2000 * PRICES.token + decision.predicted_prefill)


def test_streams_that_others_have_sent_count(priced) -> None:
    priced.add_priced("c0", "c1")
    priced.report("c0", prices=PRICES, running=4)
    assert place(priced).prefill == "c1"


def test_a_report_of_what_is_booked_here_adds_nothing(priced) -> None:
    priced.add_priced("c0", "c1")
    occupy(priced, "c0", 0.01)
    before = place(priced)
    priced.report("c0", prices=PRICES, waiting=1, tokens_to_prefill=5000)
    assert place(priced).forecast == before.forecast


def test_hands_over_where_streams_would_suffer(priced) -> None:
    priced.add_priced("c0", "d0", "p0")
    assert place(priced).decode in (None, "d0")
    for n in range(6):
        share = Share(InstanceId("c0"), Work())
        priced.state.book(RequestId(f"s{n}"), share, Share(InstanceId("c0"), Work(context_tokens=500)))
        priced.state.finish_prefill(RequestId(f"s{n}"))
    decision = place(priced)
    assert (decision.prefill, decision.decode) == ("p0", "d0")


def test_of_equal_lines_the_one_with_fewer_prompts_is_taken(priced) -> None:
    priced.add_priced("c0", "c1")
    lines = {"c0": (1.0, 0.1, 0.1, 0.1), "c1": (1.0, 0.35)}
    for name, prompts in lines.items():
        for number, seconds in enumerate(prompts):
            share = Share(InstanceId(name), Work(prefill_tokens=1), seconds)
            other = Share(InstanceId(name), Work(context_tokens=1, requests=1))
            priced.state.book(RequestId(f"{name}-{number}"), share, other, 0.0)
    assert place(priced).prefill == "c1"
    assert place(priced, LeastCost(Weights(line=0.0))).prefill == "c0", "its line is shorter in seconds"


def test_who_waits_in_front_makes_a_decode_instance_help(priced) -> None:
    priced.add_priced("p0", "d0")
    occupy(priced, "p0", 0.5)
    for n in range(2):
        share = Share(InstanceId("p0"), Work())
        priced.state.book(RequestId(f"s{n}"), share, Share(InstanceId("d0"), Work(context_tokens=500)))
        priced.state.finish_prefill(RequestId(f"s{n}"))
    request = priced.request("r", blocks=40)
    calm, crowded = (
        decide(replace(request, behind=behind), priced.state, LeastCost(), 0.0) for behind in (0, 8)
    )
    assert (calm.prefill, crowded.prefill) == ("p0", "d0")
    assert "in line" not in calm.reason
    assert "8.0 in line per place to prefill" in crowded.reason


def test_a_full_decode_place_is_the_last_resort(priced) -> None:
    priced.add_priced("p0", "d0", "d1")
    priced.report("d0", blocks=1024, active_blocks=1000, prices=PRICES)
    assert place(priced).decode == "d1"


def test_fetches_where_it_is_quicker_than_computing(priced) -> None:
    priced.add_priced("c0", "c1")
    priced.apply("c1", 0, priced.stored(0, 39))
    occupy(priced, "c1", 5.0)
    stays = place(priced, LeastCost(fetches=False))
    assert (stays.prefill, stays.fetch_from) == ("c0", None)
    fetched = place(priced, LeastCost(fetches=True))
    assert (fetched.prefill, fetched.fetch_from, fetched.fetch_tokens) == ("c0", "c1", 39 * 16)
    assert fetched.predicted_ttft < stays.predicted_ttft / 2


def test_does_not_fetch_over_a_slow_wire(priced) -> None:
    priced.add_priced("c0", "c1")
    priced.apply("c1", 0, priced.stored(0, 39))
    occupy(priced, "c1", 5.0)
    priced.set_wire(bandwidth=1e-3)
    assert place(priced, LeastCost(fetches=True)).fetch_from is None


def test_no_place_is_an_error_that_names_the_role(priced) -> None:
    with pytest.raises(NoInstance, match="no prefill or colocated"):
        place(priced)
    priced.add_priced("p0")
    with pytest.raises(NoInstance, match="no decode or colocated"):
        place(priced)


def test_records_the_chosen_and_the_cheapest(priced) -> None:
    priced.add_priced(*(f"c{n:02}" for n in range(20)))
    for n in range(20):
        occupy(priced, f"c{n:02}", float(20 - n))
    recorded = weigh(priced, LeastCost(Weights(opportunity=0.0)))
    assert [c.instance for c in recorded] == ["c17", "c18", "c19"]
    assert [c.instance for c in recorded if c.chosen] == ["c19"]
    assert min(recorded, key=lambda c: c.total).chosen


def test_a_decode_place_prefills_what_little_is_missing_there(priced) -> None:
    priced.add_priced("p0", "d0")
    assert (place(priced).prefill, place(priced).decode) == ("p0", "d0")
    priced.apply("d0", 0, priced.stored(0, 39))
    appended = place(priced, LeastCost(fetches=False))
    assert (appended.prefill, appended.decode, appended.matched_prefill) == ("d0", None, 39 * 16)


def test_streams_of_a_decode_place_are_spared(priced) -> None:
    priced.add_priced("p0", "d0")
    for n in range(4):
        share = Share(InstanceId("d0"), Work())
        priced.state.book(RequestId(f"s{n}"), share, Share(InstanceId("d0"), Work(context_tokens=500)))
        priced.state.finish_prefill(RequestId(f"s{n}"))
    assert (place(priced).prefill, place(priced).decode) == ("p0", "d0")


def test_a_link_is_learnt_from_what_went_over_it() -> None:
    wire, true = Wire(100.0, 2e9, 2e-3), Wire(100.0, 5e8, 8e-3)
    for size in [10_000, 50_000_000] * 200:
        wire = wire.learn(size, true.latency + size / true.bandwidth)
    assert wire.seconds(1) == pytest.approx(true.seconds(1), rel=0.05)
    assert wire.seconds(500_000) == pytest.approx(true.seconds(500_000), rel=0.05)


def test_one_odd_transfer_moves_a_link_little() -> None:
    wire = Wire(100.0, 2e9, 2e-3)
    assert wire.seconds(500) < wire.learn(50_000, 60.0).seconds(500) < 1.2 * wire.seconds(500)
    assert wire.learn(0, 1.0) == wire
