"""Where units lie: against plain slices of the segments' memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve._native import checksum_blocks, copy_blocks
from memserve.mempool.arena import Arena, Extent
from memserve.mempool.modes import Cut
from memserve.mempool.segments import runs_of
from memserve.mempool.transfer.plan import spread_units

PARTS, UNIT = 4, 8
SEGMENTS = (5, 3)


def new_arena(pieces: int) -> Arena:
    arena = Arena.allocate(PARTS * UNIT, SEGMENTS[0], "segments", pieces)
    arena.grow(Extent(*SEGMENTS), "segments")
    return arena


@pytest.mark.parametrize("pieces", [1, PARTS])
def test_every_unit_is_the_part_of_its_block(pieces: int) -> None:
    arena = new_arena(pieces)
    blocks, parts = spread_units(np.array([6, 0, 4, 5, 1]), Cut(PARTS, UNIT, 2))
    pointers = arena.map.unit_pointers(blocks, parts, UNIT)
    assert len(set(pointers.tolist())) == len(blocks)
    for at, (block, part) in enumerate(zip(blocks.tolist(), parts.tolist(), strict=True)):
        memory = arena.block_memory(block).reshape(PARTS, UNIT)[part]
        if pieces == PARTS:
            memory = arena.block_memory(block)[part]
        assert int(pointers[at]) == memory.ctypes.data


@pytest.mark.parametrize("pieces", [1, PARTS])
def test_blocks_do_not_overlap_and_pieces_of_a_kind_lie_side_by_side(pieces: int) -> None:
    arena = new_arena(pieces)
    for number in range(sum(SEGMENTS)):
        arena.block_memory(number)[:] = number
    for number in range(sum(SEGMENTS)):
        assert (arena.block_memory(number) == number).all()
    neighbours = np.array([0, 1, 2, 3, 4])
    touching = arena.map.touching(neighbours, np.zeros(5, np.int64), arena.piece_bytes)
    assert touching.all()
    over_the_edge = np.array([4, 5])
    assert not arena.map.touching(over_the_edge, np.zeros(2, np.int64), arena.piece_bytes).any()


@pytest.mark.parametrize("pieces", [1, PARTS])
def test_a_block_is_copied_piece_by_piece(pieces: int) -> None:
    arena = new_arena(pieces)
    arena.block_memory(2)[:] = np.arange(PARTS * UNIT, dtype=np.uint8).reshape(arena.block_memory(2).shape)
    copy_blocks(arena.pointers(np.array([7])), arena.pointers(np.array([2])), arena.piece_bytes)
    assert np.array_equal(arena.block_memory(7), arena.block_memory(2))


@given(
    numbers=st.lists(st.integers(0, sum(SEGMENTS) - 1), unique=True, min_size=1),
    pieces=st.sampled_from([1, PARTS]),
    whole=st.booleans(),
)
def test_joined_memory_holds_the_units_in_their_order(numbers: list[int], pieces: int, whole: bool) -> None:
    arena = new_arena(pieces)
    for number in range(sum(SEGMENTS)):
        memory = arena.block_memory(number)
        memory[:] = np.random.default_rng(number).integers(0, 256, memory.shape, np.uint8)
    cut = Cut(1, PARTS * UNIT, 2) if whole and pieces == 1 else Cut(PARTS, UNIT, 2)
    blocks, parts = spread_units(np.array(numbers), cut)
    pointers = arena.map.unit_pointers(blocks, parts, cut.unit_bytes)
    units = arena.units(blocks, parts, cut.unit_bytes)
    middle = len(blocks) // 2
    joined = units.views(0, len(blocks))
    halves = (units.views(0, middle) if middle else []) + units.views(middle, len(blocks) - middle)
    assert b"".join(halves) == b"".join(joined)
    raw = np.frombuffer(b"".join(joined), np.uint8).reshape(len(blocks), -1)
    copies = raw.ctypes.data + np.arange(len(blocks), dtype=np.uint64) * np.uint64(cut.unit_bytes)
    assert np.array_equal(
        checksum_blocks(copies.astype(np.uint64), cut.unit_bytes), checksum_blocks(pointers, cut.unit_bytes)
    )
    touching = arena.map.touching(blocks, parts, cut.unit_bytes)
    assert len(joined) == len(blocks) - np.count_nonzero(touching)


@given(touching=st.lists(st.booleans()))
def test_runs_cover_all_units_and_break_where_none_touch(touching: list[bool]) -> None:
    starts, counts = runs_of(np.array(touching, np.bool_))
    assert int(counts.sum()) == len(touching) + 1
    assert starts.tolist() == [0] + [at + 1 for at, touches in enumerate(touching) if not touches]
    assert np.array_equal(starts[1:], np.cumsum(counts)[:-1])
