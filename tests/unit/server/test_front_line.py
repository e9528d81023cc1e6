"""Streams that wait in front of the instances: who is begun when, and every way out of the line."""

from __future__ import annotations

import asyncio

import pytest

from dispatching import PROMPT, D, P, add, cluster, run, until
from memserve.core.errors import MemServeError, NoInstance, Overloaded, Refusal
from memserve.core.messages import Cancel, Heartbeat, LoadReport, RequestClosed, TokenChunk
from memserve.core.types import FinishReason, InstanceId, Ledger, RequestId, SamplingParams
from memserve.scheduler.admission import LineLimits
from memserve.scheduler.places import Work
from memserve.server.backend import Generated, GenerationRequest
from memserve.server.dispatch import Dispatcher

P1 = InstanceId("prefill-1")
ONE_STREAM = LineLimits(max_running=1)
"""Two requests are in flight at most: one that runs and one behind it."""
Answer = asyncio.Task[list[Generated]]


class Cluster:
    """A prefill and a decode instance, and tasks that ask them."""

    def __init__(
        self, limits: LineLimits = ONE_STREAM, policy: str = "prompt-tree", **weights: float
    ) -> None:
        self.dispatcher, self.outbox = cluster(
            limits, weight=lambda tenant: weights.get(tenant, 1.0), policy=policy
        )
        self.tasks: dict[str, Answer] = {}

    async def ask(
        self, name: str, tenant: str = "a", *, priority: int = 0, slo: float | None = None
    ) -> Answer:
        wanted = GenerationRequest(
            RequestId(name),
            PROMPT + len(self.tasks) * 100,
            SamplingParams(max_tokens=9),
            tenant=tenant,
            priority=priority,
            slo_ttft=slo,
        )
        task = self.tasks[name] = asyncio.create_task(collect(self.dispatcher, wanted))
        await asyncio.sleep(0)
        return task

    def begun(self) -> list[str]:
        return [str(message.request) for _, message in self.outbox.submitted()]

    async def answer(self, name: str) -> None:
        """The instances do all that is to be done for a request."""
        request = RequestId(name)
        self.dispatcher.on_message(P, TokenChunk(request, 0, (1,), ledger=Ledger(computed=64)))
        self.dispatcher.on_message(D, TokenChunk(request, 1, (2,), finish=FinishReason.STOP))
        self.dispatcher.on_message(D, RequestClosed(request, D))
        await self.tasks[name]

    def waiting(self) -> dict[str, int]:
        return {tenant.tenant: tenant.waiting for tenant in self.dispatcher.line().tenants if tenant.waiting}

    def refusals(self) -> dict[str, float]:
        return {refusal.name: refusal.value for refusal in self.dispatcher.line().refusals}

    async def end(self) -> None:
        """Nothing may be left anywhere once all have gone."""
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        line = self.dispatcher._line
        assert (len(line._line), line._turns, line._in_flight) == (0, {}, set())
        assert self.dispatcher._streams == {}
        state = self.dispatcher._scheduler.state
        state.check()
        line._line.queue.check()
        assert all(instance.booked == Work() for instance in state.instances())


async def collect(dispatcher: Dispatcher, wanted: GenerationRequest) -> list[Generated]:
    return [piece async for piece in dispatcher.generate(wanted)]


async def error_of(task: Answer) -> MemServeError:
    with pytest.raises(MemServeError) as raised:
        await task
    return raised.value


def test_with_room_a_request_goes_straight_through() -> None:
    async def scenario() -> None:
        at = Cluster(LineLimits())
        for number in range(8):
            await at.ask(f"r{number}")
        assert len(at.begun()) == 8
        assert at.dispatcher.line().tenants == ()
        await at.end()

    run(scenario())


def test_without_room_tenants_take_turns() -> None:
    async def scenario() -> None:
        at = Cluster()
        for number in range(6):
            await at.ask(f"a{number}")
        for number in range(2):
            await at.ask(f"b{number}", "b")
        assert at.begun() == ["a0", "a1"]
        assert at.waiting() == {"a": 4, "b": 2}
        for number in range(8):
            await until(lambda wanted=number: len(at.begun()) > wanted)  # type: ignore[misc]
            await at.answer(at.begun()[number])
        assert at.begun() == ["a0", "a1", "a2", "b0", "a3", "b1", "a4", "a5"]
        await at.end()

    run(scenario())


def test_an_engine_gets_two_steps_of_prompts_behind_the_first() -> None:
    async def scenario() -> None:
        at = Cluster(LineLimits())
        for number in range(40):
            await at.ask(f"r{number}")
        state = at.dispatcher._scheduler.state
        (place,) = (one for one in state.instances() if one.instance == P)
        step = place.step_tokens * place.prices.token
        each = next(iter(place.line._whole.values()))
        behind = (len(at.begun()) - 1) * each
        assert 2 * step <= behind < 2 * step + each
        await at.end()

    run(scenario())


@pytest.mark.parametrize(("policy", "used"), [("cost", {P, D}), ("prompt-tree", {P})])
def test_a_decode_instance_takes_prompts_off_the_line_if_the_policy_would(
    policy: str, used: set[InstanceId]
) -> None:
    async def scenario() -> None:
        at = Cluster(LineLimits(), policy)
        for number in range(80):
            await at.ask(f"r{number}")
        assert {place for place, _ in at.outbox.submitted()} == used
        waiting = at.waiting()["a"]
        assert waiting > 0, "nobody gets more than its lead"
        at.dispatcher.on_heartbeat(Heartbeat(D, 1, LoadReport(blocks=1024)))
        assert at.waiting()["a"] == waiting, "nothing has been done there meanwhile"
        await at.end()

    run(scenario())


def test_a_first_token_lets_the_next_one_through() -> None:
    async def scenario() -> None:
        at = Cluster(LineLimits())
        for number in range(40):
            await at.ask(f"r{number}")
        before = len(at.begun())
        chunk = TokenChunk(RequestId("r0"), 0, (1,), ledger=Ledger(computed=64))
        at.dispatcher.on_message(P, chunk)
        assert len(at.begun()) == before + 1
        await at.end()

    run(scenario())


def test_a_client_that_leaves_leaves_the_line_and_sends_nothing() -> None:
    async def scenario() -> None:
        at = Cluster()
        for name in ("r0", "r1", "r2", "r3"):
            await at.ask(name)
        at.tasks["r2"].cancel()
        await asyncio.gather(at.tasks["r2"], return_exceptions=True)
        assert at.waiting() == {"a": 1}
        assert not any(isinstance(message, Cancel) for _, message in at.outbox.sent)
        await at.answer("r0")
        assert at.begun() == ["r0", "r1", "r3"]
        await at.end()

    run(scenario())


def test_one_that_leaves_in_the_moment_of_its_turn_is_not_begun() -> None:
    async def scenario() -> None:
        at = Cluster()
        for name in ("r0", "r1", "r2", "r3"):
            await at.ask(name)
        at.tasks["r2"].cancel()
        at.dispatcher.on_message(P, TokenChunk(RequestId("r0"), 0, (1,), finish=FinishReason.STOP))
        at.dispatcher.on_message(P, RequestClosed(RequestId("r0"), P))
        await at.tasks["r0"]
        await until(lambda: "r3" in at.begun())
        assert "r2" not in at.begun()
        await at.end()

    run(scenario())


def test_a_full_queue_of_its_own_and_a_full_line_are_told_apart() -> None:
    async def scenario() -> None:
        at = Cluster(LineLimits(requests=3, tenant_requests=2, max_running=1))
        for number in range(4):
            await at.ask(f"a{number}")
        own = await error_of(await at.ask("a4"))
        assert isinstance(own, Overloaded)
        assert own.reason is Refusal.TENANT_QUEUE_FULL
        assert own.retry_after > 0
        await at.ask("b0", "b")
        whole = await error_of(await at.ask("c0", "c"))
        assert isinstance(whole, Overloaded)
        assert whole.reason is Refusal.QUEUE_FULL
        assert at.refusals() == {"queue_full": 1, "tenant_queue_full": 1}
        await at.end()

    run(scenario())


def test_tokens_are_limited_as_well_but_one_request_may_always_wait() -> None:
    async def scenario() -> None:
        at = Cluster(LineLimits(tenant_tokens=70, max_running=1))
        for number in range(3):
            await at.ask(f"a{number}")
        refused = await error_of(await at.ask("a3"))
        assert isinstance(refused, Overloaded)
        assert "73 tokens" in str(refused)
        assert at.waiting() == {"a": 1}
        await at.end()

    run(scenario())


def test_what_cannot_be_in_time_is_refused_with_the_time_to_come_back() -> None:
    async def scenario() -> None:
        at = Cluster()
        for number in range(12):
            await at.ask(f"a{number}")
        refused = await error_of(await at.ask("hasty", slo=0.2))
        assert isinstance(refused, Overloaded)
        assert refused.reason is Refusal.SLO_TTFT
        predicted = at.dispatcher.line()
        assert predicted.refusals[0].name == "slo_ttft"
        patient = await at.ask("patient", slo=60.0)
        assert not patient.done()
        later = await error_of(await at.ask("hastier", slo=0.1))
        assert isinstance(later, Overloaded)
        assert later.retry_after > refused.retry_after, "more are before it, and it can wait for less"
        await at.end()

    run(scenario())


def test_another_tenant_is_promised_its_own_part() -> None:
    async def scenario() -> None:
        at = Cluster()
        for number in range(30):
            await at.ask(f"a{number}")
        mine = await error_of(await at.ask("a", slo=0.01))
        other = await error_of(await at.ask("b", "b", slo=0.01))
        assert isinstance(mine, Overloaded)
        assert isinstance(other, Overloaded)
        assert other.retry_after < mine.retry_after / 4
        await at.end()

    run(scenario())


def test_a_wait_ends_when_the_first_token_would_be_late_anyway() -> None:
    async def scenario() -> None:
        at = Cluster()
        for name in ("r0", "r1"):
            await at.ask(name)
        # Foreseen to be in time, but the instances do nothing.
        refused = await error_of(await at.ask("r2", slo=0.5))
        assert isinstance(refused, Overloaded)
        assert refused.reason is Refusal.SLO_TTFT
        assert at.waiting() == {}
        assert "r2" not in at.begun()
        await at.end()

    run(scenario())


def test_at_once_means_refused_by_what_the_engine_needs_alone() -> None:
    async def scenario() -> None:
        at = Cluster()
        refused = await error_of(await at.ask("r0", slo=1e-4))
        assert isinstance(refused, Overloaded)
        assert at.begun() == []
        await at.ask("r1", slo=30.0)
        assert at.begun() == ["r1"]
        await at.end()

    run(scenario())


def test_closing_ends_the_wait() -> None:
    async def scenario() -> None:
        at = Cluster()
        for name in ("r0", "r1", "r2"):
            await at.ask(name)
        at.dispatcher.close()
        for task in at.tasks.values():
            with pytest.raises(NoInstance, match="stopping"):
                await task
        await at.end()

    run(scenario())


def test_an_instance_that_arrives_lets_the_line_move() -> None:
    async def scenario() -> None:
        at = Cluster(LineLimits())
        for number in range(40):
            await at.ask(f"r{number}")
        before = len(at.begun())
        add(at.dispatcher, P1)
        assert len(at.begun()) > before
        assert P1 in {name for name, _ in at.outbox.submitted()}
        await at.end()

    run(scenario())


def test_a_lost_instance_leaves_the_line_as_it_was() -> None:
    async def scenario() -> None:
        at = Cluster(LineLimits(max_running=2))
        add(at.dispatcher, P1)
        for number in range(6):
            await at.ask(f"r{number}")
        assert at.waiting() == {"a": 2}
        at.outbox.gone.add(P1)
        at.dispatcher.on_lost(P1, "it died")
        await until(lambda: sum(name == P for name, _ in at.outbox.submitted()) == 4)
        assert at.waiting() == {"a": 2}
        assert not any(task.done() for task in at.tasks.values()), "nobody saw an error"
        await at.end()

    run(scenario())


class Restarting:
    """Stands where the supervisor does."""

    restarting: tuple[InstanceId, ...] = (D,)

    def became_ready(self, instance: InstanceId) -> bool:
        return True


@pytest.mark.parametrize("comes_back", [True, False])
def test_the_line_waits_for_who_is_on_the_way_back(comes_back: bool) -> None:
    async def scenario() -> None:
        at = Cluster()
        supervisor = Restarting()
        at.dispatcher.supervisor = supervisor  # type: ignore[assignment]
        for name in ("r0", "r1", "r2"):
            await at.ask(name)
        at.outbox.gone.add(D)
        at.dispatcher.on_lost(D, "it died")
        assert at.waiting() == {"a": 1}
        if comes_back:
            at.outbox.gone.clear()
            add(at.dispatcher, D, incarnation=2)
            await until(lambda: {"r0~1", "r1~1"} < set(at.begun()))
            assert not at.tasks["r2"].done()
        else:
            supervisor.restarting = ()
            for task in at.tasks.values():
                with pytest.raises(NoInstance, match="no decode or colocated"):
                    await task
        await at.end()

    run(scenario())


def test_nobody_there_is_said_at_once() -> None:
    async def scenario() -> None:
        at = Cluster()
        at.dispatcher.on_lost(D, "it died")
        for slo in (None, 5.0):
            with pytest.raises(NoInstance, match="no decode or colocated"):
                await (await at.ask(f"r{slo}", slo=slo))
        await at.end()

    run(scenario())


def test_the_line_does_not_move_while_the_batch_is_full() -> None:
    async def scenario() -> None:
        at = Cluster(LineLimits(max_running=1))
        await at.ask("r0")
        at.dispatcher.on_message(P, TokenChunk(RequestId("r0"), 0, (1,), ledger=Ledger(computed=64)))
        await at.ask("r1")
        assert at.waiting() == {"a": 1}, "the only stream is taken"
        at.dispatcher.on_heartbeat(Heartbeat(P, 1, LoadReport()))
        assert at.waiting() == {"a": 1}
        at.dispatcher.on_message(D, TokenChunk(RequestId("r0"), 1, (2,), finish=FinishReason.STOP))
        at.dispatcher.on_message(D, RequestClosed(RequestId("r0"), D))
        await until(lambda: at.begun() == ["r0", "r1"])
        await at.end()

    run(scenario())


def test_waits_are_counted_by_tenant() -> None:
    async def scenario() -> None:
        at = Cluster()
        for name in ("r0", "r1", "r2"):
            await at.ask(name)
        at.dispatcher._clock.advance(2.5)  # type: ignore[attr-defined]
        await at.answer("r0")
        (tenant,) = at.dispatcher.line().tenants
        assert (tenant.tenant, tenant.waiting, tenant.waited, tenant.waited_seconds) == ("a", 0, 1, 2.5)
        await at.end()

    run(scenario())
