"""The block table."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.mempool.address import Origin
from memserve.mempool.blocks import BlockCounts, BlockTable


@pytest.fixture
def table() -> BlockTable:
    return BlockTable(6)


def edges_of(*parts: np.ndarray) -> list[np.ndarray]:
    return [part.astype(np.int32) for part in parts]


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
    assert table.unindex(edges_of(numbers[:2])) == 2
    assert table.counts() == BlockCounts(free=5, active=1, historical=0, incoming=0)
    table.check()


def test_a_reference_that_is_not_there_is_reported_and_nothing_else_suffers(table: BlockTable) -> None:
    numbers = table.alloc(2)
    table.index(numbers, Origin.COMPUTED)
    table.release(numbers[:1])
    assert table.release(numbers) == 1
    assert table.release(numbers) == 2
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


def test_addresses_resolve_together_or_not_at_all(table: BlockTable) -> None:
    packed = table.addresses_of(table.alloc(3))
    found = table.resolve(packed[[2, 0, 2]])
    assert found is not None
    assert found.tolist() == [2, 0, 2]
    table.release_at(packed[1:2])
    assert table.resolve(packed) is None
    assert table.resolve(np.array([99 << 32], np.uint64)) is None


def test_only_held_and_different_blocks_that_are_not_indexed_enter_the_index(table: BlockTable) -> None:
    numbers = table.alloc(3)
    assert table.index(numbers[:1], Origin.PEER)
    for refused in ([1, 0], [1, 1], [1, 5]):
        assert not table.may_enter(np.array(refused))
        assert not table.index(np.array(refused), Origin.PEER)
        assert table.is_indexed(np.arange(6)).tolist() == [True, False, False, False, False, False]
    assert table.may_enter(numbers[1:])
    assert table.index(numbers[1:], np.array([2, 0], np.uint8))
    assert table.origins_of(numbers).tolist() == [1, 2, 0]


def test_an_address_named_twice_is_released_twice(table: BlockTable) -> None:
    numbers = table.alloc(2)
    table.retain(numbers[:1])
    packed = table.addresses_of(numbers)
    assert table.release_at(packed[[0, 1, 0, 1, 0]]) == 2
    assert table.counts().free == 6
    table.check()


def test_a_lease_covers_edges_in_their_order(table: BlockTable) -> None:
    numbers = table.alloc(5)
    table.index(numbers, np.arange(5, dtype=np.uint8) % 3)
    table.release(numbers[:4])
    packed, origins = table.lease(edges_of(numbers[3:], numbers[:1]), 3)
    assert packed.tolist() == table.addresses_of(np.array([3, 4, 0])).tolist()
    assert origins.tolist() == [0, 1, 0]
    assert table.references_of(np.arange(6)).tolist() == [1, 0, 0, 1, 2, 0]
    assert table.counts().historical == 2
    table.check()


def test_an_idle_tail_ends_at_the_last_held_block(table: BlockTable) -> None:
    numbers = table.alloc(5)
    table.index(numbers, Origin.COMPUTED)
    table.release(numbers[[0, 2, 3, 4]])
    edge = numbers.astype(np.int32)
    assert table.idle_tail(edge, 5, 5) == 3
    assert table.idle_tail(edge, 5, 2) == 2
    assert table.idle_tail(edge, 4, 4) == 2
    assert table.idle_tail(edge, 2, 2) == 0


def test_a_block_that_is_not_there_is_an_error(table: BlockTable) -> None:
    for number in (-1, 6):
        with pytest.raises(IndexError, match="no block"):
            table.retain(np.array([number]))
        with pytest.raises(IndexError, match="no block"):
            table.unindex([np.array([number], np.int32)])


def test_a_free_block_cannot_be_retained(table: BlockTable) -> None:
    with pytest.raises(AssertionError, match="free block"):
        table.retain(np.array([0]))
