"""When the line moves, who may join it, and how long one is expected to wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memserve.core.errors import Overloaded, Refusal
from memserve.core.types import InstanceId, RequestId
from memserve.scheduler.admission import (
    LEAD_STEPS,
    LineLimits,
    Pace,
    Room,
    WaitingLine,
    is_served,
    price_rate,
)
from memserve.scheduler.fair_queue import FairQueue, Waiting
from memserve.scheduler.places import Work
from memserve.scheduler.state import SchedulerState, Share

from .conftest import Cluster

RATE = 1000.0


def waiting(
    name: str, tokens: int = 100, tenant: str = "a", priority: int = 0, since: float = 0.0
) -> Waiting:
    return Waiting(RequestId(name), tenant, tokens, priority, since)


def line(limits: LineLimits | None = None, **weights: float) -> WaitingLine:
    return WaitingLine(limits or LineLimits(), FairQueue(lambda tenant: weights.get(tenant, 1.0)))


def lead_of(state: SchedulerState) -> float:
    (place,) = (one for one in state.instances() if one.role.prefills)
    return LEAD_STEPS * place.step_tokens * place.prices.token


def nobody_asks() -> InstanceId:
    raise AssertionError("the policy is asked without need")


def has_room(
    state: SchedulerState,
    max_running: int,
    in_flight: int,
    where: Callable[[], InstanceId] = nobody_asks,
) -> bool:
    room = Room(state, max_running)
    room.look_everywhere()
    return room.is_left(in_flight, where)


def book(state: SchedulerState, name: str, seconds: float, place: str = "c1", tokens: int = 100) -> None:
    share = Share(state.instances()[0].instance, Work(prefill_tokens=tokens), seconds)
    assert share.instance == place
    state.book(RequestId(name), share, Share(share.instance, Work(requests=1)), 0.0)


def test_one_prompt_however_long_leaves_room_for_two_steps_behind_it(cluster: Cluster) -> None:
    cluster.add("c1")
    state, lead = cluster.state, lead_of(cluster.state)
    book(state, "long", 100 * lead)
    book(state, "short", 0.9 * lead)
    assert has_room(state, 64, 2)
    book(state, "more", 0.2 * lead)
    assert not has_room(state, 64, 3)
    state.finish_prefill(RequestId("long"), 0.0)
    assert has_room(state, 64, 3), "the next one is not behind, it is being computed"


def test_work_that_takes_longer_than_expected_does_not_make_room(cluster: Cluster) -> None:
    cluster.add("c1")
    state, lead = cluster.state, lead_of(cluster.state)
    for name in ("a", "b"):
        book(state, name, lead)
    assert not has_room(state, 64, 2)
    (place,) = state.instances()
    place.line.forecast(100 * lead, 1.0)
    assert place.line.free_at < 100 * lead, "by the forecast all should be done"
    assert not has_room(state, 64, 2)


def test_one_place_with_room_is_enough(cluster: Cluster) -> None:
    cluster.add("c1")
    lead = lead_of(cluster.state)
    for name in ("a", "b"):
        book(cluster.state, name, lead)
    assert not has_room(cluster.state, 64, 2)
    cluster.add("c2")
    assert has_room(cluster.state, 64, 2)
    assert not has_room(cluster.state, 1, 4), "as many again as both can run are on their way"


@pytest.mark.parametrize("names", [("c1",), ("p1", "d1")])
def test_a_full_batch_or_full_memory_closes(cluster: Cluster, names: tuple[str, ...]) -> None:
    cluster.add(*names)
    state, place = cluster.state, names[-1]
    for number in range(3):
        cluster.book(f"r{number}", names[0], place, 16)
        state.finish_prefill(RequestId(f"r{number}"))
    assert has_room(state, 4, 3)
    assert not has_room(state, 3, 3)
    cluster.report(place, blocks=1024, active_blocks=1000)
    assert not has_room(state, 4, 3)
    for number in range(3):
        state.unbook(RequestId(f"r{number}"))
    assert has_room(state, 4, 0), "nothing of ours runs there: there is nothing to wait for"


def test_a_small_pool_runs_several_beside_each_other(cluster: Cluster) -> None:
    cluster.add("c1")
    cluster.book("r", "c1", "c1", 16)
    cluster.report("c1", blocks=32, active_blocks=28)
    assert has_room(cluster.state, 64, 1), "512 tokens in all are less than two steps"
    cluster.report("c1", blocks=32, active_blocks=29)
    assert not has_room(cluster.state, 64, 1)


def test_room_is_looked_for_where_something_changed(cluster: Cluster) -> None:
    cluster.add("p1", "p2", "d1")
    where, room = lambda: InstanceId("p1"), Room(cluster.state, 64)
    assert not room.is_left(0, where), "nobody has told of anything"
    room.look_at(InstanceId("p1"))
    assert not room.is_left(0, where), "nobody is known to decode"
    room.look_at(InstanceId("d1"))
    assert room.is_left(0, where)
    cluster.state.drop_instance(InstanceId("p1"))
    assert not room.is_left(0, where)
    room.look_everywhere()
    assert room.is_left(0, where)


def fill_prefill(cluster: Cluster) -> None:
    """A prefill instance without room beside a decode instance that has nothing to do yet."""
    cluster.add("d1", "p1")
    for name in ("a", "b"):
        share = Share(InstanceId("p1"), Work(prefill_tokens=100), lead_of(cluster.state))
        cluster.state.book(RequestId(name), share, Share(InstanceId("d1"), Work(requests=1)), 0.0)


@pytest.mark.parametrize(("chosen", "room"), [("d1", True), ("p1", False), ("gone", False)])
def test_a_decode_instance_has_room_for_whom_the_policy_would_begin_there(
    cluster: Cluster, chosen: str, room: bool
) -> None:
    fill_prefill(cluster)
    assert has_room(cluster.state, 64, 2, lambda: InstanceId(chosen)) is room


def test_who_helps_is_asked_for_once_until_something_changes_there(cluster: Cluster) -> None:
    fill_prefill(cluster)
    asked: list[InstanceId] = []

    def where() -> InstanceId:
        asked.append(InstanceId("p1"))
        return asked[-1]

    room = Room(cluster.state, 64)
    room.look_everywhere()
    for changed, times in (("p1", 1), ("p1", 1), ("d1", 2)):
        room.look_at(InstanceId(changed))
        assert not room.is_left(2, where)
        assert len(asked) == times


@pytest.mark.parametrize(
    ("names", "served"), [((), False), (("p1",), False), (("d1",), False), (("c1",), True)]
)
def test_served_means_both_legs(cluster: Cluster, names: tuple[str, ...], served: bool) -> None:
    cluster.add(*names)
    assert is_served(cluster.state) == served


def test_limits_are_per_tenant_and_in_all() -> None:
    at = line(LineLimits(requests=3, tokens=1000, tenant_requests=2, tenant_tokens=500))
    at.join(waiting("1"), RATE)
    with pytest.raises(Overloaded, match="tenant 'a' has 1 requests of 100 tokens") as own:
        at.join(waiting("2", 401), RATE)
    assert own.value.reason is Refusal.TENANT_QUEUE_FULL
    at.join(waiting("3", 900, tenant="b"), RATE)
    with pytest.raises(Overloaded, match="there are 2 requests of 1000 tokens") as whole:
        at.join(waiting("4", 1, tenant="c"), RATE)
    assert whole.value.reason is Refusal.QUEUE_FULL
    assert len(at) == 2
    assert at.refusals == {Refusal.TENANT_QUEUE_FULL: 1, Refusal.QUEUE_FULL: 1}
    at.queue.check()


def test_a_wait_is_what_is_before_one_at_the_pace_of_the_line() -> None:
    at = line()
    for number in range(10):
        at.join(waiting(str(number)), RATE)
    assert at.predict_wait(waiting("new"), RATE) == pytest.approx(1.1)
    assert at.predict_wait(waiting("urgent", priority=-1), RATE) == pytest.approx(0.1)
    assert at.predict_wait(waiting("b", tenant="b"), RATE) == pytest.approx(0.2), "turn by turn with a"


def test_a_heavier_tenant_waits_for_less_of_the_others() -> None:
    at = line(heavy=4.0)
    for number in range(10):
        at.join(waiting(str(number)), RATE)
    assert at.predict_wait(waiting("new", tenant="heavy"), RATE) == pytest.approx(0.125)


def test_predictions_agree_with_what_the_line_does() -> None:
    at = line(heavy=2.0)
    for number in range(40):
        at.join(waiting(f"a{number}"), RATE)
        at.join(waiting(f"h{number}", tenant="heavy"), RATE)
    new = waiting("new", tenant="heavy")
    expected = at.predict_wait(new, RATE)
    at.join(new, RATE)
    now = 0.0
    while (taken := at.take(now)) is not new:
        assert taken is not None
        now += taken.tokens / RATE
    assert now == pytest.approx(expected, rel=0.05)


def test_the_pace_is_learnt_while_somebody_waits() -> None:
    at = line()
    for number in range(10):
        at.join(waiting(str(number), since=100.0), RATE)
    for number in range(9):
        at.take(100.0 + 0.5 * (number + 1))
    assert at.pace.rate(RATE) == pytest.approx(200.0)
    at.take(200.0)
    assert at.pace.rate(RATE) < 200.0
    slow = at.pace.rate(RATE)
    at.join(waiting("later", since=9000.0), RATE)
    at.take(9000.5)
    assert at.pace.rate(RATE) > slow, "the time in which nobody waited says nothing"


def test_a_pace_is_the_prices_until_enough_was_seen() -> None:
    pace = Pace()
    pace.start(0.0)
    for number in range(3):
        pace.learn(100, number + 1.0, last=False)
        assert pace.rate(RATE) == RATE
    pace.learn(100, 4.0, last=False)
    assert pace.rate(RATE) == pytest.approx(100.0)


def test_prices_say_what_all_who_prefill_can_do(cluster: Cluster) -> None:
    assert price_rate(cluster.state) > 0, "nobody there is no division by zero"
    cluster.add("p1", "d1")
    one = price_rate(cluster.state)
    cluster.add("p2")
    assert price_rate(cluster.state) == pytest.approx(2 * one)


def test_names_that_clients_make_up_do_not_fill_the_memory() -> None:
    at = line()
    for number in range(400):
        at.join(waiting(str(number), tenant=f"t{number}"), RATE)
        at.take(0.0)
    assert len(at.waits) == 257
    assert sum(waits.requests for waits in at.waits.values()) == 400
