"""The radix tree against a brute-force model: a dict from each prefix (as a tuple of blocks) to its label."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.core.radix import Node, RadixTree

PAGE = 2

# Few block names and shared first tokens: branches, duplicates and near misses are common.
blocks = st.lists(st.sampled_from([(0, 0), (0, 1), (1, 0)]), min_size=1, max_size=7).map(tuple)
Prefix = tuple[tuple[int, int], ...]


class Labels:
    """One label per block, so that a payload cut at the wrong place is seen."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def split(self, at: int) -> Labels:
        tail = Labels(self.labels[at:])
        del self.labels[at:]
        return tail

    def shorten(self, at: int) -> None:
        del self.labels[at:]

    def append(self, at: int, tail: Labels) -> None:
        assert at == len(self.labels)
        self.labels += tail.labels


def as_array(prefix: Prefix, spare: int = 0) -> np.ndarray:
    tokens = np.array([token for block in prefix for token in block] + [5] * spare, np.int32)
    # Whoever borrows it may not write to it.
    tokens.flags.writeable = False
    return tokens


class RadixMachine(RuleBasedStateMachine):
    borrows = False

    def __init__(self) -> None:
        super().__init__()
        self.tree: RadixTree[Labels] = RadixTree(PAGE, borrows=self.borrows)
        self.model: dict[Prefix, int] = {}
        self.fresh = itertools.count()

    @rule(prefix=blocks, spare=st.integers(0, PAGE - 1))
    def insert(self, prefix: Prefix, spare: int) -> None:
        tokens = as_array(prefix, spare)
        path = self.tree.walk(tokens)
        known = self.known_blocks(prefix)
        assert path.blocks == known
        if known == len(prefix):
            return
        labels = list(itertools.islice(self.fresh, len(prefix) - known))
        self.tree.extend(path, tokens, Labels(labels.copy()))
        for upto, label in enumerate(labels, known + 1):
            self.model[prefix[:upto]] = label

    @rule(prefix=blocks, spare=st.integers(0, PAGE - 1))
    def walk(self, prefix: Prefix, spare: int) -> None:
        path = self.tree.walk(as_array(prefix, spare))
        assert path.blocks == self.known_blocks(prefix)
        found = [label for node in path.nodes for label in node.payload.labels][: path.blocks]
        assert found == [self.model[prefix[:upto]] for upto in range(1, path.blocks + 1)]

    @precondition(lambda self: self.model)
    @rule(pick=st.randoms(use_true_random=False))
    def truncate(self, pick) -> None:
        node: Node[Labels] = pick.choice(list(self.tree.nodes()))
        keep = pick.randint(0, self.tree.blocks_of(node))
        path = self.prefix_of(node)
        cut = len(path) - self.tree.blocks_of(node) + keep
        before = node.payload.labels.copy()
        dropped = self.tree.truncate(node, keep)
        gone = [p for p in self.model if len(p) > cut and p[:cut] == path[:cut]]
        if keep == 0:
            # Siblings share what lies above the node, not its first block.
            gone = [p for p in gone if p[cut] == path[cut]]
        labels = [label for lower in dropped for label in lower.payload.labels]
        if keep:
            labels += before[keep:]
            assert node.payload.labels == before[:keep]
        assert sorted(labels) == sorted(map(self.model.pop, gone))

    @precondition(lambda self: self.model)
    @rule(pick=st.randoms(use_true_random=False))
    def split(self, pick) -> None:
        long = [node for node in self.tree.nodes() if self.tree.blocks_of(node) > 1]
        if long:
            node = pick.choice(long)
            self.tree.split(node, pick.randint(1, self.tree.blocks_of(node) - 1))

    @invariant()
    def holds_exactly_the_model(self) -> None:
        self.tree.check()
        assert self.tree.blocks == len(self.model)
        for leaf in self.tree.leaves():
            assert self.prefix_of(leaf) in self.model

    def known_blocks(self, prefix: Prefix) -> int:
        return sum(prefix[:upto] in self.model for upto in range(1, len(prefix) + 1))

    def prefix_of(self, node: Node[Labels]) -> Prefix:
        return tuple(map(tuple, self.tree.path_tokens(node).reshape(-1, PAGE).tolist()))


TestRadix = RadixMachine.TestCase
TestRadix.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class BorrowingRadixMachine(RadixMachine):
    borrows = True


TestBorrowingRadix = BorrowingRadixMachine.TestCase
TestBorrowingRadix.settings = TestRadix.settings
