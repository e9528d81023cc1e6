"""Promises against a plain list of them: who promises how much of a prompt, whatever was taken back."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memserve.core.types import InstanceId, Namespace, RequestId, Tokens, as_tokens
from memserve.scheduler.holdings import Holdings, Numbers
from memserve.scheduler.promises import Promises

BLOCK, SECONDS = 2, 10.0
INSTANCES = [InstanceId(f"i{n}") for n in range(3)]
NAMESPACES = [Namespace("m"), Namespace("m", salt="tenant")]
Blocks = tuple[int, ...]

requests = st.integers(0, 5).map(lambda n: RequestId(f"r{n}"))
instances = st.sampled_from(INSTANCES)
namespaces = st.sampled_from(NAMESPACES)
paths = st.lists(st.integers(0, 1), min_size=0, max_size=6).map(tuple)


def tokens_of(blocks: Blocks) -> Tokens:
    return as_tokens([t for block in blocks for t in [7] * (BLOCK - 1) + [block]])


class PromisesAgainstList(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.numbers = Numbers()
        self.promises = Promises(BLOCK, self.numbers, SECONDS)
        self.open: dict[RequestId, tuple[InstanceId, Namespace, Blocks, float]] = {}

    @rule(request=requests, instance=instances, namespace=namespaces, blocks=paths)
    def make(self, request: RequestId, instance: InstanceId, namespace: Namespace, blocks: Blocks) -> None:
        self.promises.make(request, instance, namespace, tokens_of(blocks), self.now)
        self.open.pop(request, None)
        if blocks:
            self.open[request] = (instance, namespace, blocks, self.now + SECONDS)

    @rule(request=requests)
    def end(self, request: RequestId) -> None:
        self.promises.end(request)
        self.open.pop(request, None)

    @rule(instance=instances, namespace=namespaces, blocks=paths)
    def confirm(self, instance: InstanceId, namespace: Namespace, blocks: Blocks) -> None:
        self.promises.confirm(instance, namespace, tokens_of(blocks))
        self.keep(lambda i, n, path, _: (i, n) != (instance, namespace) or blocks[: len(path)] != path)

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0]))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        self.promises.expire(self.now)
        self.keep(lambda *one: one[3] > self.now)

    @rule(instance=instances)
    def drop(self, instance: InstanceId) -> None:
        self.promises.drop_instance(instance)
        self.numbers.dismiss(instance)
        self.keep(lambda *one: one[0] != instance)

    def keep(self, wanted) -> None:
        self.open = {request: one for request, one in self.open.items() if wanted(*one)}

    @rule(namespace=namespaces, blocks=paths)
    def match(self, namespace: Namespace, blocks: Blocks) -> None:
        expected: dict[InstanceId, int] = {}
        for instance, other, path, _ in self.open.values():
            same = next((n for n in range(len(blocks)) if blocks[n : n + 1] != path[n : n + 1]), len(blocks))
            if same and other == namespace:
                expected[instance] = max(expected.get(instance, 0), same * BLOCK)
        assert Holdings(self.promises.match(namespace, tokens_of(blocks))).by_instance() == expected

    @invariant()
    def agrees(self) -> None:
        self.promises.check()
        assert len(self.promises) == len(self.open)


TestPromisesAgainstList = PromisesAgainstList.TestCase
TestPromisesAgainstList.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
