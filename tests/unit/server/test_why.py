"""What clients learn about where a request went: attempts, header, metrics; and what the scheduler learns."""

from __future__ import annotations

import asyncio

from dispatching import PROMPT, D, Outbox, P, Quiet, R, add, chunk, cluster, run, start, until
from memserve.core.clock import VirtualClock
from memserve.core.messages import RequestClosed, TokenChunk
from memserve.core.types import FinishReason, InstanceId, Ledger, RequestId, SamplingParams
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.service import GlobalScheduler
from memserve.server.backend import ClusterView, Counter, GenerationRequest, RegretView
from memserve.server.dispatch import Dispatcher
from memserve.server.metrics import Metrics
from memserve.server.why import RecentIds, route_header

P1, D1 = InstanceId("prefill-1"), InstanceId("decode-1")
AGAIN = RequestId("r~1")


def test_all_attempts_are_shown_for_any_of_their_names() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        for name in (P1, D1):
            add(dispatcher, name)
        task = await start(dispatcher, outbox)
        assert route_header(dispatcher.decisions(R)) == {
            "x-memserve-route": "prefill=prefill-0; decode=decode-0; policy=prompt-tree; matched=0"
        }
        outbox.gone.add(P)
        dispatcher.on_lost(P, "it died")
        await until(lambda: len(outbox.submitted()) == 2)
        ledger = Ledger(computed=48, local=16)
        dispatcher.on_message(P1, TokenChunk(AGAIN, 0, (7,), finish=FinishReason.LENGTH, ledger=ledger))
        await task
        for name in (R, AGAIN):
            first, second = dispatcher.why(name)
            assert (first.decision.request, first.decision.prefill, first.outcome) == (R, P, None)
            assert (second.decision.request, second.decision.prefill) == (AGAIN, P1)
            assert second.outcome is not None
            assert second.outcome.cached_tokens == 16
        (header,) = route_header(dispatcher.decisions(R)).values()
        assert header.startswith("prefill=prefill-1; ")
        assert header.endswith("; attempt=2")
        assert dispatcher.why(RequestId("rr")) == ()

    run(scenario())


def test_nothing_is_said_of_a_forgotten_route() -> None:
    assert route_header(()) == {}


def by_cost() -> tuple[Dispatcher, Outbox]:
    clock, outbox = VirtualClock(), Outbox()
    scheduler = GlobalScheduler(policy_by_name("cost"), clock)
    dispatcher = Dispatcher(scheduler, clock, Quiet(), model="m")
    dispatcher.manager = outbox  # type: ignore[assignment]
    for name in (P, D):
        add(dispatcher, name)
    return dispatcher, outbox


async def answer(dispatcher: Dispatcher, outbox: Outbox, name: str, max_tokens: int) -> float:
    """Let a request be answered with one token; returns what its place was thought to cost."""
    request = GenerationRequest(RequestId(name), PROMPT, SamplingParams(max_tokens=max_tokens))

    async def read() -> None:
        async for _ in dispatcher.generate(request):
            pass

    task = asyncio.create_task(read())
    await until(lambda: any(submit.request == name for _, submit in outbox.submitted()))
    (why,) = dispatcher.why(request.request)
    dispatcher.on_message(
        P, TokenChunk(request.request, 0, (7,), finish=FinishReason.STOP, ledger=Ledger(64))
    )
    await task
    for place in (P, D):
        dispatcher.on_message(place, RequestClosed(request.request, place))
    total = next(one.total for one in why.prefill_candidates if one.chosen)
    assert total is not None
    return total


def test_the_scheduler_learns_how_long_answers_are_and_may_become() -> None:
    async def scenario() -> None:
        dispatcher, outbox = by_cost()
        first = await answer(dispatcher, outbox, "a", 200)
        second = await answer(dispatcher, outbox, "b", 200)
        assert second < first, "one answer was short, so others are expected to be"
        assert await answer(dispatcher, outbox, "c", 2) < second / 2

    run(scenario())


def test_request_ids_are_bounded_and_the_latest_counts() -> None:
    ids = RecentIds()
    for number in range(2000):
        ids.note(f"x{number}", f"cmpl-{number}")
    ids.note("x1999", "cmpl-again")
    assert ids.answer_of("x1999") == "cmpl-again"
    assert ids.answer_of("x0") == "x0"
    assert ids.answer_of("cmpl-5") == "cmpl-5"


def test_regret_and_errors_are_metrics() -> None:
    metrics = Metrics(VirtualClock())
    regrets = (RegretView("cost", 10, 3, 0.5, 9, 0.25, 0.08, 0.2),)
    metrics.show_cluster(ClusterView("m", "cost", "pd-basic", 16, 4096, regrets=regrets))
    lines = metrics.render().decode().splitlines()
    for line in (
        'memserve_regret_seconds_count{of="ttft",policy="cost"} 10.0',
        'memserve_regret_seconds_sum{of="ttft",policy="cost"} 0.5',
        'memserve_regret_seconds_count{of="total",policy="cost"} 9.0',
        'memserve_regret_seconds_sum{of="total",policy="cost"} 0.25',
        'memserve_regretted_decisions_total{policy="cost"} 3.0',
        'memserve_ttft_prediction_error{policy="cost",quantile="0.5"} 0.08',
        'memserve_ttft_prediction_error{policy="cost",quantile="0.9"} 0.2',
    ):
        assert line in lines


def test_losses_are_metrics() -> None:
    metrics = Metrics(VirtualClock())
    view = ClusterView("m", "cost", "pd-basic", 16, 4096, losses=(Counter("decode-0", 2),), failovers=5)
    metrics.show_cluster(view)
    lines = metrics.render().decode().splitlines()
    assert 'memserve_instance_losses_total{instance="decode-0"} 2.0' in lines
    assert "memserve_failovers_total 5.0" in lines


def test_the_first_chunk_settles_the_decision() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, chunk(0, 10))
        (why,) = dispatcher.why(R)
        assert why.outcome is not None
        assert why.outcome.cached_tokens == 0
        dispatcher.on_message(D, chunk(1, 11, finish=FinishReason.LENGTH))
        await task

    run(scenario())
