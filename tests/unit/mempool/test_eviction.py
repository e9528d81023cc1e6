"""Eviction: leaf first, least recently used first, exactly as much as needed, never under a lease."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import OutOfBlocks
from memserve.core.types import InstanceId, Namespace
from memserve.mempool import LeastRecentlyUsed, MemPool
from memserve.mempool.index import PromptIndex

from .conftest import LAYOUT, prompt

NS = Namespace("m")


@pytest.fixture
def full(clock: VirtualClock) -> Iterator[MemPool]:
    """Nine blocks: 1-2-3, 1-2-4-5, 6-7 and 8-9, in this order of use."""
    made = MemPool(
        LAYOUT, 9, instance=InstanceId("a"), incarnation=1, clock=clock, eviction=LeastRecentlyUsed()
    )
    for blocks in ((1, 2, 3), (1, 2, 4, 5), (6, 7), (8, 9)):
        addrs = made.alloc_mem(len(blocks))
        made.insert(prompt(*blocks), addrs, NS)
        made.free_mem(addrs)
    assert made.stats().free == 0
    yield made
    made.check()
    made.close()


def cached(pool: MemPool, *blocks: int) -> int:
    """Blocks of a prompt in the index, without touching them."""
    return len(pool._index.find(NS, prompt(*blocks)).blocks)


def test_the_coldest_leaf_goes_first_and_only_as_much_as_needed(full: MemPool) -> None:
    full.alloc_mem(2)
    assert cached(full, 1, 2, 3) == 2
    assert cached(full, 1, 2, 4, 5) == 3
    assert cached(full, 6, 7) == 2


def test_a_touch_protects(full: MemPool) -> None:
    full.match(prompt(1, 2, 3), NS).release()
    full.alloc_mem(2)
    assert cached(full, 1, 2, 3) == 3
    assert cached(full, 1, 2, 4, 5) == 2


def test_a_parent_becomes_a_leaf_when_its_children_are_gone(full: MemPool) -> None:
    full.alloc_mem(5)
    assert cached(full, 1, 2) == 0
    assert cached(full, 6, 7) == 2
    assert cached(full, 8, 9) == 2


def test_a_lease_in_the_middle_holds_its_path_only(full: MemPool) -> None:
    with full.match(prompt(1, 2), NS):
        held = full.alloc_mem(7)
        assert cached(full, 1, 2) == 2
        assert full.stats().historical == 0
        full.check([held])


def test_an_allocation_that_cannot_be_met_evicts_nothing(full: MemPool) -> None:
    tail = full.match(prompt(1, 2, 4, 5), NS)
    with pytest.raises(OutOfBlocks):
        full.alloc_mem(6)
    assert full.stats().historical == 5
    tail.release()
    full.alloc_mem(9)
    assert full.stats().historical == 0


def test_blocks_above_a_held_tail_are_not_evicted(full: MemPool) -> None:
    addrs = full.alloc_mem(3)
    full.insert(prompt(8, 9, 10), addrs, NS)
    # 8 and 9 belong to nobody now, but 10, which continues them, is held.
    full.free_mem(addrs[:2])
    with pytest.raises(OutOfBlocks):
        full.alloc_mem(8)
    assert cached(full, 8, 9, 10) == 3
    full.check([addrs[2:]])


def test_evictions_are_counted_in_blocks(full: MemPool) -> None:
    full.alloc_mem(4)
    assert full.stats().evicted_blocks == 4


def test_a_match_that_ends_inside_an_edge_does_not_refresh_what_follows(full: MemPool) -> None:
    full.match(prompt(6), NS).release()
    full.match(prompt(1, 2, 3), NS).release()
    full.match(prompt(1, 2, 4, 5), NS).release()
    full.alloc_mem(2)
    assert cached(full, 6, 7) == 1
    assert cached(full, 8, 9) == 1


def test_dropped_leaves_do_not_pile_up() -> None:
    policy, index = LeastRecentlyUsed(), PromptIndex(LAYOUT.block_tokens)
    for turn in range(5000):
        tokens = prompt(turn)
        found = index.find(NS, tokens)
        usage = policy.publish(NS, tokens, found.path, 1, float(turn))
        leaf = index.add(NS, tokens, found, np.array([turn]), usage)
        policy.add_leaf(leaf)
        index.drop(leaf, 0)
    assert len(policy._queues[0]) <= 1025
    assert len(policy._places) <= 1025
