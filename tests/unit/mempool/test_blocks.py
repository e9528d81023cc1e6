"""The block table."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.mempool.address import Origin
from memserve.mempool.blocks import BlockCounts, BlockTable


@pytest.fixture
def table() -> BlockTable:
    return BlockTable(6)


def test_neighbours_are_handed_out_first_and_again(table: BlockTable) -> None:
    first = table.alloc(4)
    assert first.tolist() == [0, 1, 2, 3]
    table.release(first)
    assert table.alloc(4).tolist() == [0, 1, 2, 3]
    table.check()


def test_a_generation_goes_up_with_each_free(table: BlockTable) -> None:
    numbers = table.alloc(2)
    before = table.addresses_of(numbers)
    table.release(numbers)
    again = table.addresses_of(table.alloc(2))
    assert (again - before).tolist() == [1, 1]
    assert not table.current(before).any()
    assert table.current(again).all()


def test_a_generation_wraps_inside_its_own_bits(table: BlockTable) -> None:
    numbers = table.alloc(1)
    table._generations[numbers] = 0xFFFFFFFF
    table.release(numbers)
    assert table.addresses_of(numbers).tolist() == [0]
    table.check()


def test_states_follow_references_and_index(table: BlockTable) -> None:
    numbers = table.alloc(3)
    table.index(numbers[:2], Origin.PEER)
    assert table.counts() == BlockCounts(free=3, active=3, historical=0, incoming=0)
    table.release(numbers)
    assert table.counts() == BlockCounts(free=4, active=0, historical=2, incoming=0)
    table.retain(numbers[:1])
    assert table.counts() == BlockCounts(free=4, active=1, historical=1, incoming=0)
    assert table.unindex(numbers[:2]) == 1
    assert table.counts() == BlockCounts(free=5, active=1, historical=0, incoming=0)
    table.check()


def test_a_reference_that_is_not_there_is_reported_and_nothing_else_suffers(table: BlockTable) -> None:
    numbers = table.alloc(2)
    table.index(numbers, Origin.COMPUTED)
    table.release(numbers[:1])
    unheld = table.release(numbers)
    assert unheld is not None
    assert unheld.tolist() == [True, False]
    assert table.counts().historical == 2
    table.check()


def test_incoming_blocks_are_counted_apart(table: BlockTable) -> None:
    numbers = table.alloc(2)
    table.mark_incoming(numbers, True)
    assert table.counts() == BlockCounts(free=4, active=0, historical=0, incoming=2)
    table.check()


def test_strange_addresses_are_not_current(table: BlockTable) -> None:
    far = np.array([99 << 32], np.uint64)
    assert table.current(far).tolist() == [False]


def test_repetitions_are_seen(table: BlockTable) -> None:
    assert table.distinct(np.array([1, 3, 5]))
    assert not table.distinct(np.array([1, 3, 1]))
    assert not table.distinct(np.zeros(99, np.int64))
    assert table.distinct(np.empty(0, np.int64))


def test_a_free_block_cannot_be_retained(table: BlockTable) -> None:
    with pytest.raises(AssertionError, match="free block"):
        table.retain(np.array([0]))
