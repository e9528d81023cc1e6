"""Whose turn it is, in cases that can be counted by hand; tests/property has all the others."""

from __future__ import annotations

from collections import Counter

from memserve.core.types import RequestId
from memserve.scheduler.fair_queue import PATIENCE_URGENT, QUANTUM, FairQueue, Waiting


def queue(**weights: float) -> FairQueue:
    return FairQueue(lambda tenant: weights.get(tenant, 1.0))


def add(line: FairQueue, name: str, tokens: int = 100, tenant: str = "a", priority: int = 0) -> None:
    line.add(Waiting(RequestId(name), tenant, tokens, priority))


def order(line: FairQueue) -> list[str]:
    taken = []
    while (waiting := line.take()) is not None:
        line.check()
        taken.append(str(waiting.request))
    return taken


def test_equal_requests_of_one_tenant_go_as_they_came() -> None:
    line = queue()
    for at in range(20):
        add(line, str(at))
    assert order(line) == [str(at) for at in range(20)]


def test_a_late_tenant_does_not_wait_for_an_earlier_ones_burst() -> None:
    line = queue()
    for at in range(100):
        add(line, f"a{at}", QUANTUM)
    for at in range(3):
        add(line, f"b{at}", QUANTUM, tenant="b")
    assert order(line)[:6] == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_tokens_count_not_requests() -> None:
    line = queue()
    for at in range(50):
        add(line, f"a{at}", 4 * QUANTUM)
    for at in range(50):
        add(line, f"b{at}", QUANTUM, tenant="b")
    first = Counter(name[0] for name in order(line)[:50])
    assert first == Counter(a=10, b=40)


def test_weights_share_the_tokens() -> None:
    line = queue(a=3.0)
    for at in range(60):
        add(line, f"a{at}", QUANTUM)
        add(line, f"b{at}", QUANTUM, tenant="b")
    assert Counter(name[0] for name in order(line)[:40]) == Counter(a=30, b=10)


def test_an_idle_tenant_saves_nothing_up() -> None:
    line = queue()
    add(line, "b", 1, tenant="b")
    for at in range(20):
        add(line, f"a{at}", QUANTUM)
    for _ in range(10):
        line.take()
    for at in range(8):
        add(line, f"b{at}", QUANTUM, tenant="b")
    assert Counter(name[0] for name in order(line)[:8]) == Counter(a=4, b=4)


def test_the_lower_priority_goes_first_within_a_tenant_only() -> None:
    line = queue()
    add(line, "late", priority=1)
    add(line, "normal")
    add(line, "urgent", priority=-1)
    add(line, "other", tenant="b", priority=5)
    names = order(line)
    assert [name for name in names if name != "other"] == ["urgent", "normal", "late"]
    other = queue()
    for at in range(20):
        add(other, f"a{at}", QUANTUM, priority=-9)
    add(other, "b", QUANTUM, tenant="b", priority=9)
    assert order(other).index("b") == 1, "urgency takes nothing from other tenants"


def test_the_oldest_is_passed_by_a_bounded_part() -> None:
    line = queue()
    add(line, "patient", 100, priority=1)
    for at in range(40):
        add(line, f"urgent{at}", 100)
    assert order(line).index("patient") == PATIENCE_URGENT


def test_short_ones_pass_a_long_one_until_they_have_had_as_much() -> None:
    line = queue()
    add(line, "long", 1000)
    for at in range(30):
        add(line, f"short{at}", 100)
    assert order(line).index("long") == 10


def test_a_tiny_weight_gets_through_without_many_rounds() -> None:
    line = queue(a=1e-3, b=1e-3)
    add(line, "a", 1 << 20)
    add(line, "b", 1 << 20, tenant="b")
    assert order(line) == ["a", "b"]


def test_the_heap_does_not_keep_those_who_left() -> None:
    line = queue()
    add(line, "stays", 1)
    lane = line.lanes()["a"]
    for at in range(1000):
        add(line, str(at), 50)
        line.discard(RequestId(str(at)))
    assert len(lane._by_urgency) < 32
    assert order(line) == ["stays"]
