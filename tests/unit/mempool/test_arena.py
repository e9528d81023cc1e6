"""Arenas: segments of anonymous shared memory."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from memserve.core.errors import ConfigError, LayoutMismatch
from memserve.mempool.arena import Arena, Extent


def test_pointers_over_several_segments_lead_to_the_right_bytes() -> None:
    arena = Arena.allocate(64, 3, "test")
    arena.grow(Extent(3, 2), "test")
    arena.grow(Extent(5, 4), "test")
    assert (arena.blocks, arena.extents) == (9, ((0, 3), (3, 2), (5, 4)))
    numbers = np.array([8, 0, 3, 4, 2])
    expected = [arena.block_memory(number).ctypes.data for number in numbers.tolist()]
    assert arena.pointers(numbers).tolist() == expected
    arena.close()


def test_an_attached_arena_is_the_same_memory() -> None:
    mine = Arena.allocate(4096, 2, "test")
    mine.grow(Extent(2, 1), "test")
    theirs = Arena.attach(4096, mine.fds, mine.extents)
    theirs.block_memory(2)[:] = 7
    mine.block_memory(0)[:] = 9
    assert (mine.block_memory(2) == 7).all()
    assert (theirs.block_memory(0) == 9).all()
    mine.close()
    assert (theirs.block_memory(0) == 9).all()


def test_a_segment_cannot_be_resized_under_its_users() -> None:
    arena = Arena.allocate(4096, 2, "test")
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fds[0], 4096)
    arena.close()


def test_a_segment_smaller_than_promised_is_refused() -> None:
    arena = Arena.allocate(4096, 2, "test")
    with pytest.raises(LayoutMismatch, match="3 blocks of 4096 bytes has only 8192"):
        Arena.attach(4096, arena.fds, [Extent(0, 3)])
    arena.close()


def test_memory_the_system_refuses_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"pool\.memory"):
        Arena.allocate(1 << 40, 1 << 20, "test")


def test_close_gives_the_descriptors_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    arena = Arena.allocate(4096, 2, "test")
    arena.grow(Extent(2, 2), "test")
    arena.close()
    del arena
    assert len(os.listdir("/proc/self/fd")) == before


def test_populating_supplies_pages_without_changing_them() -> None:
    arena = Arena.allocate(4096, 1024, "memserve-test")
    arena.block_memory(7)[:] = 42
    before = resident_bytes()
    arena.populate(threading.Event())
    assert resident_bytes() - before > 3 << 20
    assert (arena.block_memory(7) == 42).all()
    assert not arena.block_memory(8).any()
    arena.close()


def test_populating_stops_when_asked() -> None:
    stop = threading.Event()
    stop.set()
    arena = Arena.allocate(4096, 1024, "memserve-test")
    before = resident_bytes()
    arena.populate(stop)
    assert resident_bytes() - before < 1 << 20
    arena.close()


def resident_bytes() -> int:
    """Shared memory that this process has touched."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssShmem:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
