"""A pool that grows and shrinks: what moves, what waits, what the system gets back."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import ConfigError, InvalidRequest, OutOfBlocks
from memserve.core.types import InstanceId, Namespace
from memserve.mempool import DiskTier, EvictionCause, KVLayout, MemPool, Resized, Tier

NS = Namespace("m")
PAGES = KVLayout("pages", layers=1, kv_heads=4, head_dim=64, block_tokens=4)
"""A block is one page of memory: 4096 bytes."""
MakePool = Callable[..., MemPool]


@pytest.fixture
def make(clock: VirtualClock, tmp_path: Path) -> Iterator[MakePool]:
    made: list[MemPool] = []
    lives = itertools.count(1)

    def make_pool(device: int, host: int = 0, disk: int = 0) -> MemPool:
        pool = MemPool(
            PAGES,
            device,
            instance=InstanceId("a"),
            incarnation=next(lives),
            clock=clock,
            host_blocks=host,
            disk=DiskTier(tmp_path, disk) if disk else None,
        )
        made.append(pool)
        return pool

    yield make_pool
    for pool in made:
        pool.check()
        pool.close()


def store(pool: MemPool, *blocks: int) -> None:
    addrs = pool.alloc_mem(len(blocks))
    for number, value in zip(addrs.blocks.tolist(), blocks, strict=True):
        pool.arena.block_memory(number)[:] = value
    pool.insert(tokens_of(*blocks), addrs, NS)
    pool.free_mem(addrs)


def tokens_of(*blocks: int) -> np.ndarray:
    return np.repeat(np.array(blocks, np.int32), PAGES.block_tokens)


def cached(pool: MemPool, *blocks: int) -> list[Tier]:
    """Where the KV of a prompt lies; its bytes are looked at on the way."""
    with pool.match(tokens_of(*blocks), NS) as match:
        for number, tier, value in zip(match.addrs.blocks.tolist(), match.tiers, blocks, strict=False):
            assert tier == Tier.DISK or (pool.arena.block_memory(number) == value).all()
        return [Tier(tier) for tier in match.tiers]


def memory_in_use(pool: MemPool) -> int:
    """Bytes that the pool's segments really take."""
    return sum(Path(f"/proc/self/fd/{fd}").stat().st_blocks * 512 for fd in pool.arena.fds)


def test_a_grown_tier_can_be_allocated_in_full(make: MakePool) -> None:
    pool = make(4)
    assert pool.resize(Tier.DEVICE, 9) == Resized(9, 0)
    addrs = pool.alloc_mem(9)
    assert len(np.unique(pool.pointers(addrs))) == 9
    with pytest.raises(OutOfBlocks):
        pool.alloc_mem(1)
    pool.free_mem(addrs)
    assert pool.stats().free == pool.stats().blocks == pool.blocks == 9


def test_shrinking_takes_free_blocks_first_and_the_coldest_then(make: MakePool, clock: VirtualClock) -> None:
    pool = make(6)
    for value in (1, 2, 3, 4):
        store(pool, value)
        clock.advance(1)
    assert pool.resize(Tier.DEVICE, 4) == Resized(4, 0)
    assert pool.stats().evicted_blocks == 0
    assert pool.resize(Tier.DEVICE, 2) == Resized(2, 0)
    assert [cached(pool, value) for value in (1, 2, 3, 4)] == [[], [], [Tier.DEVICE], [Tier.DEVICE]]
    assert pool.stats().evicted_blocks == pool.stats().evictions[EvictionCause.RESIZE] == 2


def test_what_a_shrinking_tier_gives_up_goes_down_where_there_is_room(make: MakePool) -> None:
    pool = make(4, host=1, disk=2)
    store(pool, 1, 2, 3, 4)
    assert pool.resize(Tier.DEVICE, 1) == Resized(1, 0)
    assert len(cached(pool, 1, 2, 3, 4)) >= 3, "one at most had no room below"
    assert pool.resize(Tier.HOST, 0) == Resized(0, 0)
    with pytest.raises(ConfigError, match="no host tier"):
        pool.alloc_mem(1, Tier.HOST)


def test_held_blocks_stay_and_are_retired_when_they_are_let_go_of(make: MakePool) -> None:
    pool = make(4)
    mine = pool.alloc_mem(3)
    for number in mine.blocks.tolist():
        pool.arena.block_memory(number)[:] = 7
    assert pool.resize(Tier.DEVICE, 1) == Resized(1, 2)
    assert all((pool.arena.block_memory(number) == 7).all() for number in mine.blocks.tolist())
    assert (pool.stats().draining, pool.stats().active, pool.blocks) == (2, 3, 1)
    pool.free_mem(mine[:1])
    assert (pool.stats().draining, pool.stats().free) == (1, 0)
    with pytest.raises(OutOfBlocks):
        pool.alloc_mem(1)
    pool.free_mem(mine[1:])
    assert (pool.stats().draining, pool.stats().free) == (0, 1)


def test_a_lease_keeps_its_blocks_through_a_shrink(make: MakePool) -> None:
    pool = make(4)
    store(pool, 1, 2)
    match = pool.match(tokens_of(1, 2), NS)
    assert pool.resize(Tier.DEVICE, 1) == Resized(1, 1)
    assert cached(pool, 1, 2) == [Tier.DEVICE] * 2
    match.release()
    assert cached(pool, 1, 2) == [Tier.DEVICE]
    assert pool.stats().draining == 0


def test_growing_again_ends_a_shrink_half_way_and_uses_the_same_memory(make: MakePool) -> None:
    pool = make(4)
    mine = pool.alloc_mem(3)
    pool.resize(Tier.DEVICE, 1)
    assert pool.resize(Tier.DEVICE, 4) == Resized(4, 0)
    assert len(pool.arena.extents) == 1
    more = pool.alloc_mem(1)
    pool.free_mem(mine)
    pool.free_mem(more)
    assert pool.stats().free == 4


def test_the_system_gets_the_memory_back(make: MakePool) -> None:
    pool = make(512)
    addrs = pool.alloc_mem(512)
    for number in addrs.blocks.tolist():
        pool.arena.block_memory(number)[:] = 1
    pool.free_mem(addrs)
    full = memory_in_use(pool)
    assert full >= 512 * PAGES.block_bytes
    pool.resize(Tier.DEVICE, 128)
    assert memory_in_use(pool) <= full // 2
    again = pool.alloc_mem(128)
    assert all((pool.arena.block_memory(number)[0] in (0, 1)) for number in again.blocks.tolist())
    pool.free_mem(again)


def test_old_addresses_of_retired_blocks_stay_dead(make: MakePool) -> None:
    pool = make(2)
    old = pool.alloc_mem(2)
    pool.free_mem(old)
    pool.resize(Tier.DEVICE, 1)
    pool.resize(Tier.DEVICE, 2)
    assert pool.free_mem(old).stale == 2


def test_the_disk_tier_grows_and_gives_space_back(make: MakePool, tmp_path: Path) -> None:
    pool = make(1, disk=2)
    for value in (1, 2, 3):
        store(pool, value)
    assert pool.stats().disk.historical == 2
    assert pool.resize(Tier.DISK, 40) == Resized(40, 0)
    for value in range(4, 24):
        store(pool, value)
    assert pool.stats().disk.historical == 22
    (file,) = tmp_path.glob("*.kv")
    before = file.stat().st_blocks
    assert pool.resize(Tier.DISK, 1) == Resized(1, 0)
    assert pool.stats().disk.historical == 1
    assert file.stat().st_blocks < before / 4


def test_what_was_retired_on_disk_does_not_come_back_after_a_restart(make: MakePool) -> None:
    first = make(1, disk=8)
    for value in range(1, 8):
        store(first, value)
    first.resize(Tier.DISK, 1)
    left = [value for value in range(1, 8) if cached(first, value) == [Tier.DISK]]
    assert len(left) == 1
    first.close()
    second = make(1, disk=8)
    assert [value for value in range(1, 8) if cached(second, value)] == left


def test_sizes_that_make_no_sense_are_refused_and_change_nothing(make: MakePool) -> None:
    pool = make(2)
    for tier, blocks in ((Tier.DEVICE, 0), (Tier.DEVICE, -1), (Tier.HOST, -1)):
        with pytest.raises(InvalidRequest, match="blocks"):
            pool.resize(tier, blocks)
    with pytest.raises(ConfigError, match="directory"):
        pool.resize(Tier.DISK, 4)
    with pytest.raises(InvalidRequest, match="more than"):
        pool.resize(Tier.DEVICE, 1 << 31)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(ConfigError, match=r"pool\.memory"):
            pool.resize(Tier.DEVICE, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (pool.blocks, pool.stats().free, pool.stats().draining) == (2, 2, 0)


def test_pins_may_hold_their_share_of_the_new_size(make: MakePool) -> None:
    pool = make(2)
    store(pool, 1, 2)
    with pytest.raises(InvalidRequest, match="of 1 blocks"):
        pool.pin(tokens_of(1, 2), NS, 10.0)
    pool.resize(Tier.DEVICE, 4)
    assert pool.pin(tokens_of(1, 2), NS, 10.0) == 2
    assert pool.resize(Tier.DEVICE, 1) == Resized(1, 1)
    assert cached(pool, 1, 2) == [Tier.DEVICE] * 2
    pool.unpin(tokens_of(1, 2), NS)
    assert pool.stats().draining == 0
