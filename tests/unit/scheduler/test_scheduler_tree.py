"""The global prompt tree's corners; tests/property compares it with brute force."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.core.types import InstanceId, Namespace, as_tokens
from memserve.scheduler.tree import NODE_BYTES, GlobalPromptTree

SPACE = Namespace("model")
A, B, MANY = InstanceId("a"), InstanceId("b"), [InstanceId(f"i{n:03}") for n in range(200)]


def path(*blocks: int):
    return as_tokens(np.repeat(np.array(blocks), 16))


@pytest.fixture
def tree() -> GlobalPromptTree:
    return GlobalPromptTree(16)


def test_match_tells_how_much_each_holds_longest_first(tree: GlobalPromptTree) -> None:
    tree.store(A, SPACE, path(1, 2, 3))
    tree.store(B, SPACE, path(1, 2, 3, 4, 5))
    tree.remove(B, SPACE, path(1, 2, 3, 4, 5), keep=4 * 16)
    held = tree.match(SPACE, path(1, 2, 3, 4, 5, 6))
    assert [(tier.tokens, list(tier.instances())) for tier in held.tiers] == [(64, [B]), (48, [A])]
    assert held.tokens(A) == 48
    assert held.tokens(InstanceId("unknown")) == 0


def test_prompt_ending_inside_an_edge_counts_what_it_covers(tree: GlobalPromptTree) -> None:
    tree.store(A, SPACE, path(1, 2, 3, 4))
    assert tree.match(SPACE, path(1, 2)).by_instance() == {A: 32}
    assert tree.match(SPACE, path(1, 2, 9)).by_instance() == {A: 32}


def test_incomplete_blocks_do_not_count(tree: GlobalPromptTree) -> None:
    tree.store(A, SPACE, path(1, 2)[:-1])
    assert tree.match(SPACE, path(1, 2)).by_instance() == {A: 16}
    tree.store(B, SPACE, path(1)[:-1])
    assert tree.held_tokens(B) == 0


def test_namespaces_share_nothing(tree: GlobalPromptTree) -> None:
    tree.store(A, SPACE, path(1))
    assert not tree.match(Namespace("model", salt="other"), path(1)).tiers


def test_shared_prefix_of_many_is_one_tier(tree: GlobalPromptTree) -> None:
    for n, name in enumerate(MANY):
        tree.store(name, SPACE, path(1, 2, 100 + n))
    held = tree.match(SPACE, path(1, 2, 3))
    assert [tier.tokens for tier in held.tiers] == [32]
    assert sorted(held.tiers[0].instances()) == MANY


def test_leaf_that_grows_for_one_keeps_the_others_where_they_were(tree: GlobalPromptTree) -> None:
    tree.store(A, SPACE, path(1, 2))
    tree.store(B, SPACE, path(1, 2))
    tree.store(A, SPACE, path(1, 2, 3))
    assert tree.nodes == 1
    assert tree.match(SPACE, path(1, 2, 3)).by_instance() == {A: 48, B: 32}
    tree.check()


def test_removed_path_is_pruned_and_what_is_left_shrinks_to_its_holders(tree: GlobalPromptTree) -> None:
    tree.store(A, SPACE, path(1, 2, 3))
    tree.store(A, SPACE, path(1, 2, 4))
    tree.remove(A, SPACE, path(1, 2, 3), keep=16)
    assert tree.nodes == 1
    assert tree.held_tokens(A) == 16
    tree.remove(A, SPACE, path(1), keep=0)
    assert tree.nodes == 0
    tree.check()


def test_remove_keeps_what_the_path_does_not_reach(tree: GlobalPromptTree) -> None:
    tree.store(A, SPACE, path(1, 2, 3))
    tree.remove(A, SPACE, path(1, 2), keep=32)
    tree.remove(A, SPACE, path(1, 9, 9), keep=16)
    tree.remove(B, SPACE, path(1, 2), keep=0)
    assert tree.match(SPACE, path(1, 2, 3)).by_instance() == {A: 48}


def test_dropped_number_is_reused_without_inheriting(tree: GlobalPromptTree) -> None:
    tree.store(A, SPACE, path(1, 2))
    old = tree.match(SPACE, path(1, 2))
    tree.drop_instance(A)
    tree.store(B, SPACE, path(7))
    assert not tree.match(SPACE, path(1, 2)).tiers
    assert tree.match(SPACE, path(7)).by_instance() == {B: 16}
    assert old.by_instance() == {A: 32}


def test_check_sees_a_holder_without_the_edge_above(tree: GlobalPromptTree) -> None:
    tree.store(A, SPACE, path(1, 2))
    tree.store(A, SPACE, path(1, 3))
    upper = next(node for node in tree._trees[SPACE].nodes() if node.parent is None)
    upper.payload.full = 0
    with pytest.raises(AssertionError):
        tree.check()


# --- with a limit ---

THREE_BRANCHES = 3 * (NODE_BYTES + 3 * 16 * 4)


def branch(start: int, blocks: int = 3):
    return path(*range(start, start + blocks))


def test_the_branch_that_was_used_longest_ago_is_forgotten_first() -> None:
    tree = GlobalPromptTree(16, memory=THREE_BRANCHES)
    for start in (100, 200, 300):
        tree.store(A, SPACE, branch(start))
    tree.match(SPACE, branch(100))
    tree.store(A, SPACE, branch(200, 2))
    tree.store(B, SPACE, branch(400))
    assert [bool(tree.match(SPACE, branch(start)).tiers) for start in (100, 200, 300, 400)] == [
        True,
        True,
        False,
        True,
    ]
    assert tree.held_tokens(A) == 6 * 16
    tree.check()


def test_what_many_begin_with_outlives_their_branches() -> None:
    tree = GlobalPromptTree(16, memory=THREE_BRANCHES)
    for tail in range(100, 900, 100):
        tree.store(A, SPACE, path(1, 2, tail))
        tree.check()
    assert tree.match(SPACE, path(1, 2, 3)).tokens(A) == 32
    assert tree.match(SPACE, path(1, 2, 800)).tokens(A) == 48


def test_news_of_what_was_forgotten_are_understood() -> None:
    tree = GlobalPromptTree(16, memory=THREE_BRANCHES)
    for start in (100, 200, 300, 400):
        tree.store(A, SPACE, branch(start))
    tree.remove(A, SPACE, branch(100), keep=32)
    assert tree.match(SPACE, branch(100)).tiers == ()
    tree.store(A, SPACE, branch(100, 2))
    tree.remove(A, SPACE, branch(100), keep=32)
    assert tree.match(SPACE, branch(100)).tokens(A) == 32
    tree.check()


def test_what_never_fits_is_never_kept() -> None:
    tree = GlobalPromptTree(16, memory=NODE_BYTES)
    tree.store(A, SPACE, branch(0))
    assert (tree.nodes, tree.memory, tree.held_tokens(A)) == (0, 0, 0)
    tree.check()
