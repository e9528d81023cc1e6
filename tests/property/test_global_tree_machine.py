"""The global prompt tree against brute force: a set of held prefixes per instance and namespace."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memserve.core.types import InstanceId, Namespace, as_tokens
from memserve.scheduler.tree import GlobalPromptTree

BLOCK = 2
INSTANCES = [InstanceId(f"i{n}") for n in range(4)]
NAMESPACES = [Namespace("m"), Namespace("m", salt="tenant")]
Blocks = tuple[int, ...]

instances = st.sampled_from(INSTANCES)
namespaces = st.sampled_from(NAMESPACES)
paths = st.lists(st.integers(0, 2), min_size=0, max_size=7).map(tuple)


def tokens_of(blocks: Blocks, rest: int = 0):
    """Each block number becomes BLOCK tokens that differ only in the last one, then an incomplete block."""
    return as_tokens([t for block in blocks for t in [7] * (BLOCK - 1) + [block]] + [9] * rest)


class TreeAgainstSets(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree = GlobalPromptTree(BLOCK)
        self.held: dict[tuple[InstanceId, Namespace], set[Blocks]] = {}
        self.asked: set[Blocks] = {()}

    def prefixes(self, instance: InstanceId, namespace: Namespace) -> set[Blocks]:
        return self.held.setdefault((instance, namespace), set())

    @rule(instance=instances, namespace=namespaces, blocks=paths, rest=st.integers(0, BLOCK - 1))
    def store(self, instance: InstanceId, namespace: Namespace, blocks: Blocks, rest: int) -> None:
        self.tree.store(instance, namespace, tokens_of(blocks, rest))
        self.prefixes(instance, namespace).update(blocks[:n] for n in range(1, len(blocks) + 1))
        self.asked.add(blocks)

    @rule(instance=instances, namespace=namespaces, blocks=paths, keep=st.integers(0, 7))
    def remove(self, instance: InstanceId, namespace: Namespace, blocks: Blocks, keep: int) -> None:
        self.tree.remove(instance, namespace, tokens_of(blocks), keep * BLOCK)
        gone = blocks[: keep + 1]
        if len(gone) > keep:
            mine = self.prefixes(instance, namespace)
            self.held[instance, namespace] = {p for p in mine if p[: keep + 1] != gone}

    @rule(instance=instances)
    def drop(self, instance: InstanceId) -> None:
        self.tree.drop_instance(instance)
        for namespace in NAMESPACES:
            self.held[instance, namespace] = set()

    @rule(instance=instances)
    def forget(self, instance: InstanceId) -> None:
        self.tree.forget(instance)
        for namespace in NAMESPACES:
            self.held[instance, namespace] = set()

    @rule(instance=instances, snapshot=st.lists(paths, max_size=3))
    def replace_by_snapshot(self, instance: InstanceId, snapshot: list[Blocks]) -> None:
        self.drop(instance)
        for blocks in snapshot:
            self.store(instance, NAMESPACES[0], blocks, 0)

    @rule(namespace=namespaces, blocks=paths)
    def match(self, namespace: Namespace, blocks: Blocks) -> None:
        self.compare(namespace, blocks)

    @invariant()
    def agrees(self) -> None:
        self.tree.check()
        for instance in INSTANCES:
            total = sum(len(self.prefixes(instance, namespace)) for namespace in NAMESPACES)
            assert self.tree.held_tokens(instance) == total * BLOCK
        for namespace in NAMESPACES:
            for blocks in self.asked:
                self.compare(namespace, blocks)

    @invariant()
    def keeps_nothing_unheld(self) -> None:
        if not any(self.held.values()):
            assert self.tree.nodes == 0

    def compare(self, namespace: Namespace, blocks: Blocks) -> None:
        holdings = self.tree.match(namespace, tokens_of(blocks, rest=1))
        expected = {}
        for instance in INSTANCES:
            mine = self.prefixes(instance, namespace)
            longest = max((n for n in range(len(blocks) + 1) if blocks[:n] in mine), default=0)
            if longest:
                expected[instance] = longest * BLOCK
            assert holdings.tokens(instance) == longest * BLOCK
        assert holdings.by_instance() == expected
        depths = [tier.tokens for tier in holdings.tiers]
        assert depths == sorted(depths, reverse=True)


TestTreeAgainstSets = TreeAgainstSets.TestCase
TestTreeAgainstSets.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
