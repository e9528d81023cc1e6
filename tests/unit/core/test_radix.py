"""The radix tree's structure: where edges split, grow and vanish."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve._native import common_prefix, walk_edges
from memserve.core.radix import RadixTree
from memserve.core.types import Tokens

PAGE = 4


class Labels:
    """A payload with one label per block."""

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


def tokens_of(*blocks: int) -> np.ndarray:
    """Tokens of blocks that are named by numbers."""
    return np.repeat(np.array(blocks, np.int32), PAGE)


def add(tree: RadixTree[Labels], *blocks: int) -> None:
    tokens = tokens_of(*blocks)
    path = tree.walk(tokens)
    if path.blocks < len(blocks):
        tree.extend(path, tokens, Labels(list(blocks[path.blocks :])))
    tree.check()


@pytest.fixture
def tree() -> RadixTree[Labels]:
    return RadixTree(PAGE)


def test_walk_of_an_empty_tree_finds_nothing(tree: RadixTree[Labels]) -> None:
    path = tree.walk(tokens_of(1, 2))
    assert (path.nodes, path.blocks) == ([], 0)


def test_walk_counts_whole_blocks_only(tree: RadixTree[Labels]) -> None:
    add(tree, 1, 2, 3)
    almost = tokens_of(1, 2, 3)
    almost[-1] = 99
    assert tree.walk(almost).blocks == 2
    assert tree.walk(tokens_of(1, 2, 3)[:-1]).blocks == 2
    assert tree.walk(tokens_of(1, 2, 3, 4)).blocks == 3


def test_a_mismatch_inside_the_first_block_finds_nothing(tree: RadixTree[Labels]) -> None:
    add(tree, 1, 2)
    other = tokens_of(1, 2)
    other[PAGE - 1] = 7
    assert tree.walk(other).blocks == 0


def test_a_growing_session_stays_one_node(tree: RadixTree[Labels]) -> None:
    session = list(range(1000))
    for turn in range(1, 1001):
        add(tree, *session[:turn])
    assert (tree.size, tree.blocks) == (1, 1000)
    assert next(tree.leaves()).payload.labels == session


def test_a_branch_splits_edge_and_payload(tree: RadixTree[Labels]) -> None:
    add(tree, 1, 2, 3, 4)
    old_leaf = next(tree.leaves())
    add(tree, 1, 2, 8)
    assert tree.size == 3
    assert old_leaf.payload.labels == [3, 4]
    path = tree.walk(tokens_of(1, 2, 8))
    assert [node.payload.labels for node in path.nodes] == [[1, 2], [8]]
    assert tree.path_tokens(old_leaf).tolist() == tokens_of(1, 2, 3, 4).tolist()


def test_a_leaf_that_was_split_off_still_grows_in_place(tree: RadixTree[Labels]) -> None:
    add(tree, 1, 2)
    add(tree, 1, 3)
    add(tree, 1, 2, 5)
    assert tree.size == 3
    assert tree.walk(tokens_of(1, 2, 5)).nodes[-1].payload.labels == [2, 5]


def test_extending_an_inner_node_adds_a_child(tree: RadixTree[Labels]) -> None:
    add(tree, 1, 2)
    add(tree, 1, 3)
    add(tree, 1, 4)
    assert tree.size == 4
    assert sorted(leaf.payload.labels[0] for leaf in tree.leaves()) == [2, 3, 4]


def test_truncate_trims_a_leaf(tree: RadixTree[Labels]) -> None:
    add(tree, 1, 2, 3)
    leaf = next(tree.leaves())
    assert tree.truncate(leaf, 1) == []
    assert leaf.payload.labels == [1]
    tree.check()
    assert tree.walk(tokens_of(1, 2, 3)).blocks == 1
    add(tree, 1, 9, 9)
    assert leaf.payload.labels == [1, 9, 9]


def test_truncate_drops_a_subtree_upper_nodes_first(tree: RadixTree[Labels]) -> None:
    add(tree, 1, 2, 3)
    add(tree, 1, 2, 4)
    add(tree, 7)
    upper = tree.walk(tokens_of(1, 2)).nodes[0]
    dropped = tree.truncate(upper, 0)
    tree.check()
    assert dropped[0] is upper
    assert sorted(node.payload.labels for node in dropped[1:]) == [[3], [4]]
    assert not any(node.attached or node.children for node in dropped)
    assert [leaf.payload.labels for leaf in tree.leaves()] == [[7]]


def test_truncate_to_its_full_length_makes_a_leaf(tree: RadixTree[Labels]) -> None:
    add(tree, 1, 2, 3)
    add(tree, 1, 2, 4)
    upper = tree.walk(tokens_of(1, 2)).nodes[0]
    tree.truncate(upper, 2)
    tree.check()
    assert list(tree.leaves()) == [upper]
    assert upper.payload.labels == [1, 2]


def test_the_tree_keeps_its_own_copy_of_tokens(tree: RadixTree[Labels]) -> None:
    tokens = tokens_of(1, 2)
    tree.extend(tree.walk(tokens), tokens, Labels([1, 2]))
    tokens[:] = 0
    assert tree.walk(tokens_of(1, 2)).blocks == 2


def test_parents_come_before_children(tree: RadixTree[Labels]) -> None:
    for tail in range(5):
        add(tree, 1, 2, tail, 3)
        add(tree, 1, 2, tail, 4)
    seen: set[int] = set()
    for node in tree.nodes():
        assert node.parent is None or id(node.parent) in seen
        seen.add(id(node))
    assert len(seen) == tree.size


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 4351, 4352, 4353, 70_000])
def test_common_prefix_equals_a_plain_search(size: int) -> None:
    a = np.arange(size, dtype=np.int32)
    assert common_prefix(a, a.copy()) == size
    for at in {0, size // 2, size - 1} & set(range(size)):
        b = a.copy()
        b[at] += 1
        assert common_prefix(a, b) == at
        assert common_prefix(a[:at], b) == at


PROMPTS = st.lists(
    st.lists(st.integers(0, 1), max_size=24).map(lambda one: np.array(one, np.int32)), max_size=12
)


@given(PROMPTS, PROMPTS)
def test_a_walk_goes_as_far_as_any_path_does(stored: list[Tokens], asked: list[Tokens]) -> None:
    tree: RadixTree[Labels] = RadixTree(4)
    for tokens in stored:
        path = tree.walk(tokens)
        if path.blocks < len(tokens) // 4:
            tree.extend(path, tokens, Labels([0] * (len(tokens) // 4 - path.blocks)))
    for tokens in asked:
        path = tree.walk(tokens)
        longest = max((common_prefix(one[: len(one) // 4 * 4], tokens) // 4 for one in stored), default=0)
        assert path.blocks == min(longest, len(tokens) // 4)
        edges = [tree.blocks_of(node) for node in path.nodes]
        assert path.blocks == sum(edges[:-1]) + path.tail
        if path.nodes:
            assert 0 < path.tail <= edges[-1]
            assert np.array_equal(
                tree.path_tokens(path.nodes[-1])[: 4 * path.blocks], tokens[: 4 * path.blocks]
            )


def test_walk_edges_refuses_what_is_no_tree() -> None:
    tokens, name = np.zeros(4, np.int32), np.zeros(4, np.int32).tobytes()
    with pytest.raises(ValueError, match="a block has tokens"):
        walk_edges({}, tokens, 0)
    with pytest.raises(AttributeError, match="key"):
        walk_edges({name: object()}, tokens, 4)
