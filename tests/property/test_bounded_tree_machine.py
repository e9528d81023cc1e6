"""A prompt tree with a limit against sets without: what it claims was stored, whatever it had to forget."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memserve.core.types import InstanceId, Namespace, Tokens, as_tokens
from memserve.scheduler.tree import NODE_BYTES, GlobalPromptTree

BLOCK = 2
INSTANCES = [InstanceId(f"i{n}") for n in range(3)]
NAMESPACES = [Namespace("m"), Namespace("m", salt="tenant")]
Blocks = tuple[int, ...]

instances = st.sampled_from(INSTANCES)
namespaces = st.sampled_from(NAMESPACES)
paths = st.lists(st.integers(0, 2), min_size=0, max_size=6).map(tuple)


def tokens_of(blocks: Blocks) -> Tokens:
    return as_tokens([t for block in blocks for t in [7] * (BLOCK - 1) + [block]])


class BoundedTreeAgainstSets(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.held: dict[tuple[InstanceId, Namespace], set[Blocks]] = {}
        self.asked: set[Blocks] = {()}

    @initialize(nodes=st.integers(1, 6))
    def begin(self, nodes: int) -> None:
        self.tree = GlobalPromptTree(BLOCK, memory=nodes * (NODE_BYTES + 8 * BLOCK))

    def prefixes(self, instance: InstanceId, namespace: Namespace) -> set[Blocks]:
        return self.held.setdefault((instance, namespace), set())

    @rule(instance=instances, namespace=namespaces, blocks=paths)
    def store(self, instance: InstanceId, namespace: Namespace, blocks: Blocks) -> None:
        self.tree.store(instance, namespace, tokens_of(blocks))
        self.prefixes(instance, namespace).update(blocks[:n] for n in range(1, len(blocks) + 1))
        self.asked.add(blocks)

    @rule(instance=instances, namespace=namespaces, blocks=paths, keep=st.integers(0, 6))
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

    @rule(namespace=namespaces, blocks=paths)
    def match(self, namespace: Namespace, blocks: Blocks) -> None:
        self.compare(namespace, blocks)

    @invariant()
    def agrees(self) -> None:
        self.tree.check()
        claimed = dict.fromkeys(INSTANCES, 0)
        for namespace in NAMESPACES:
            for blocks in {path[:n] for path in self.asked for n in range(1, len(path) + 1)}:
                for name in self.compare(namespace, blocks):
                    claimed[name] += 1
        for instance in INSTANCES:
            assert self.tree.held_tokens(instance) == claimed[instance] * BLOCK

    def compare(self, namespace: Namespace, blocks: Blocks) -> list[InstanceId]:
        """Nothing that was not stored; returns who claims all of the path."""
        claims = self.tree.match(namespace, tokens_of(blocks)).by_instance()
        for instance, tokens in claims.items():
            assert blocks[: tokens // BLOCK] in self.prefixes(instance, namespace)
        return [instance for instance, tokens in claims.items() if blocks and tokens == len(blocks) * BLOCK]


TestBoundedTreeAgainstSets = BoundedTreeAgainstSets.TestCase
TestBoundedTreeAgainstSets.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
