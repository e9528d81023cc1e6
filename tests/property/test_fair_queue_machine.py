"""Any arrivals, departures and turns: nothing is lost, nobody starves, tenants get what their weights say."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.core.types import RequestId
from memserve.scheduler.fair_queue import PATIENCE_URGENT, QUANTUM, FairQueue, Waiting

WEIGHTS = {"a": 1.0, "b": 1.0, "c": 3.0, "d": 0.25}
TOKENS = st.one_of(st.integers(1, 40), st.integers(1, 6000))


@dataclass
class Lead:
    """Weighted tokens that one tenant has had more than another while both waited, and its extremes."""

    now: float = 0.0
    least: float = 0.0
    most: float = 0.0

    def add(self, tokens: float) -> None:
        self.now += tokens
        self.least, self.most = min(self.least, self.now), max(self.most, self.now)


@dataclass
class Tenant:
    """What is known of one tenant's requests: in order of arrival, and the largest since it began to wait."""

    waiting: dict[RequestId, Waiting] = field(default_factory=dict)
    largest: int = 0
    passed: int = 0
    largest_passed: int = 0


class FairQueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(WEIGHTS.__getitem__)
        self.tenants = {name: Tenant() for name in WEIGHTS}
        self.leads: dict[tuple[str, str], Lead] = {}
        self.added = 0

    @rule(name=st.sampled_from(sorted(WEIGHTS)), tokens=TOKENS, priority=st.integers(-1, 1))
    def add(self, name: str, tokens: int, priority: int) -> None:
        self.added += 1
        waiting = Waiting(RequestId(f"r{self.added}"), name, tokens, priority)
        tenant = self.tenants[name]
        if not tenant.waiting:
            tenant.largest = tenant.passed = tenant.largest_passed = 0
        tenant.waiting[waiting.request] = waiting
        tenant.largest = max(tenant.largest, tokens)
        self.queue.add(waiting)
        for other, has in self.tenants.items():
            if other != name and has.waiting:
                self.leads.setdefault((min(name, other), max(name, other)), Lead())

    @rule(
        name=st.sampled_from(sorted(WEIGHTS)),
        sizes=st.lists(TOKENS, min_size=2, max_size=12),
        priority=st.integers(-1, 1),
    )
    def burst(self, name: str, sizes: list[int], priority: int) -> None:
        for tokens in sizes:
            self.add(name, tokens, priority)

    @precondition(lambda self: any(tenant.waiting for tenant in self.tenants.values()))
    @rule(turns=st.integers(1, 8))
    def take(self, turns: int) -> None:
        for _ in range(min(turns, len(self.queue))):
            self.take_one()

    @rule()
    def peek(self) -> None:
        first = self.queue.peek()
        assert first is self.queue.peek()
        assert (first is None) == (not len(self.queue))

    def take_one(self) -> None:
        first, taken = self.queue.peek(), self.queue.take()
        assert taken is not None
        assert taken is first
        tenant = self.tenants[taken.tenant]
        oldest = next(iter(tenant.waiting.values()))
        assert tenant.waiting.pop(taken.request) is taken
        for pair, lead in self.leads.items():
            if taken.tenant in pair:
                sign = 1 if taken.tenant == pair[0] else -1
                lead.add(sign * taken.tokens / WEIGHTS[taken.tenant])
                self.check_share(pair, lead)
        if taken is oldest:
            tenant.passed = tenant.largest_passed = 0
        else:
            tenant.passed += taken.tokens
            tenant.largest_passed = max(tenant.largest_passed, taken.tokens)
            assert tenant.passed <= PATIENCE_URGENT * oldest.tokens + tenant.largest_passed
        self.forget_empty(taken.tenant)

    def check_share(self, pair: tuple[str, str], lead: Lead) -> None:
        largest = sum(self.tenants[name].largest / WEIGHTS[name] for name in pair)
        assert lead.most - lead.least <= (QUANTUM + largest) * (1 + 1e-9), pair

    @precondition(lambda self: any(tenant.waiting for tenant in self.tenants.values()))
    @rule(choice=st.randoms(use_true_random=False))
    def discard(self, choice) -> None:  # type: ignore[no-untyped-def]
        name = choice.choice([name for name, tenant in self.tenants.items() if tenant.waiting])
        tenant = self.tenants[name]
        request = choice.choice(list(tenant.waiting))
        if request == next(iter(tenant.waiting)):
            tenant.passed = tenant.largest_passed = 0
        del tenant.waiting[request]
        self.queue.discard(request)
        self.queue.discard(request)
        self.forget_empty(name)

    def forget_empty(self, name: str) -> None:
        if not self.tenants[name].waiting:
            self.leads = {pair: lead for pair, lead in self.leads.items() if name not in pair}

    @invariant()
    def holds_who_waits(self) -> None:
        self.queue.check()
        waiting = {name: tenant for name, tenant in self.tenants.items() if tenant.waiting}
        assert {name: list(lane) for name, lane in self.queue.lanes().items()} == {
            name: list(tenant.waiting.values()) for name, tenant in waiting.items()
        }

    def teardown(self) -> None:
        while len(self.queue):
            self.take_one()
        assert self.queue.take() is None
        assert not any(tenant.waiting for tenant in self.tenants.values()), "somebody is left"


TestFairQueue = FairQueueMachine.TestCase
TestFairQueue.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
