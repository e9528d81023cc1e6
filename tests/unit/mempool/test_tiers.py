"""Host and disk below the device: what moves when, what is found where, what is held on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import ConfigError, InvalidRequest, OutOfBlocks, StaleAddress
from memserve.core.messages import Moved, Removed
from memserve.core.types import InstanceId, Namespace, pack_tokens
from memserve.mempool import Addresses, DiskTier, EvictionCause, MemPool, Origin, Tier

from .conftest import LAYOUT, prompt

NS = Namespace("m")
MakePool = Callable[..., MemPool]


@pytest.fixture
def make(clock: VirtualClock, tmp_path: Path) -> Iterator[MakePool]:
    made: list[MemPool] = []

    def make_pool(device: int, host: int = 0, disk: int = 0) -> MemPool:
        tier = DiskTier(tmp_path, disk) if disk else None
        pool = MemPool(
            LAYOUT,
            device,
            instance=InstanceId("a"),
            incarnation=len(made) + 1,
            clock=clock,
            host_blocks=host,
            disk=tier,
        )
        made.append(pool)
        return pool

    yield make_pool
    made[-1].check()
    made[-1].close()


def store(pool: MemPool, *blocks: int) -> None:
    """Publish the KV of ``prompt(*blocks)``; each block is filled with its number."""
    with pool.match(prompt(*blocks), NS) as match:
        found = pool.swap_in(match.addrs)
    addrs = found.concat(pool.alloc_mem(len(blocks) - len(found)))
    for number, value in zip(addrs.blocks[len(found) :], blocks[len(found) :], strict=True):
        pool.arena.block_memory(int(number))[:] = value
    pool.insert(prompt(*blocks), addrs, NS)
    pool.free_mem(addrs)


def tiers_of(pool: MemPool, *blocks: int) -> list[Tier]:
    with pool.match(prompt(*blocks), NS) as match:
        return [Tier(tier) for tier in match.tiers]


def values_of(pool: MemPool, addrs: Addresses) -> list[int]:
    memory = [pool.arena.block_memory(int(number)) for number in addrs.blocks]
    assert all(len(np.unique(block)) == 1 for block in memory)
    return [int(block[0]) for block in memory]


def test_a_full_device_gives_the_coldest_to_the_next_tier(make: MakePool) -> None:
    pool = make(4, host=4)
    store(pool, 1, 2, 3)
    pool.free_mem(pool.alloc_mem(3))
    assert tiers_of(pool, 1, 2, 3) == [Tier.DEVICE, Tier.HOST, Tier.HOST]
    assert pool.stats().evicted_blocks == 0


def test_tiers_cascade_and_the_lowest_drops(make: MakePool) -> None:
    pool = make(2, host=2, disk=2)
    for first in (1, 3, 5):
        store(pool, first, first + 1)
    assert tiers_of(pool, 5, 6) == [Tier.DEVICE] * 2
    assert tiers_of(pool, 3, 4) == [Tier.HOST] * 2
    assert tiers_of(pool, 1, 2) == [Tier.DISK] * 2
    pool.take_events()
    store(pool, 7, 8)
    assert tiers_of(pool, 1, 2) == []
    events = pool.take_events()
    assert events is not None
    assert sum(isinstance(event, Removed) for event in events.events) == 1
    assert pool.stats().evicted_blocks == pool.stats().evictions[EvictionCause.ALLOCATION] == 2


def test_moving_is_told_and_so_is_what_lies_lower_later(make: MakePool) -> None:
    pool = make(2, host=2)
    store(pool, 1, 2)
    pool.take_events()
    assert pool.swap_out(1) == 1
    events = pool.take_events()
    assert events is not None
    moved = (Moved(NS, pack_tokens(prompt(1, 2)), LAYOUT.block_tokens, "host"),)
    assert events.events == moved
    snapshot = pool.snapshot()
    assert (len(snapshot.paths), snapshot.moved) == (1, moved)
    with pool.match(prompt(1, 2), NS) as match:
        pool.free_mem(pool.swap_in(match.addrs))
    assert pool.snapshot().moved == ()


@pytest.mark.parametrize("lower", ["host", "disk"])
def test_swap_in_brings_the_bytes_back(make: MakePool, lower: str) -> None:
    pool = make(4, **{lower: 4})
    store(pool, 1, 2, 3)
    assert pool.swap_out(3) == 3
    pool.arena.block_memory(0)[:] = 99
    with pool.match(prompt(1, 2, 3), NS) as match:
        assert {Tier(tier).name.lower() for tier in match.tiers} == {lower}
        old = match.addrs
        addrs = pool.swap_in(old)
    assert values_of(pool, addrs) == [1, 2, 3]
    assert tiers_of(pool, 1, 2, 3) == [Tier.DEVICE] * 3
    with pytest.raises(StaleAddress):
        pool.pointers(old)
    pool.check((addrs,))
    pool.free_mem(addrs)
    stats = pool.stats()
    assert (stats.swapped_out_blocks, stats.swapped_in_blocks, stats.historical) == (3, 3, 3)
    assert getattr(stats, lower).free == 4


def test_a_lease_protects_blocks_in_every_tier(make: MakePool) -> None:
    pool = make(2, host=2, disk=2)
    store(pool, 1, 2)
    pool.swap_out(2)
    with pool.match(prompt(1, 2), NS) as match:
        store(pool, 3, 4)
        held = pool.alloc_mem(2)
        # The host is full of what is leased: what came after goes to the disk at once.
        assert tiers_of(pool, 3, 4) == [Tier.DISK] * 2
        with pytest.raises(OutOfBlocks):
            pool.alloc_mem(1, Tier.HOST)
        assert values_of(pool, match.addrs) == [1, 2]
        pool.free_mem(held)
        up = pool.swap_in(match.addrs)
        assert values_of(pool, match.addrs) == values_of(pool, up) == [1, 2]
        assert pool.stats().host.active == 2
    assert pool.stats().host.free == 2
    pool.free_mem(up)


def test_swap_in_that_finds_no_room_moves_nothing(make: MakePool) -> None:
    pool = make(2, host=2)
    store(pool, 1, 2)
    pool.swap_out(2)
    held = pool.alloc_mem(1)
    with pool.match(prompt(1, 2), NS) as match:
        with pytest.raises(OutOfBlocks):
            pool.swap_in(match.addrs)
        pool.check((held,))
    assert tiers_of(pool, 1, 2) == [Tier.HOST] * 2
    pool.free_mem(held)


def test_a_part_from_the_middle_is_copied_and_stays_indexed_where_it_was(make: MakePool) -> None:
    pool = make(4, host=4)
    store(pool, 1, 2, 3)
    pool.swap_out(3)
    with pool.match(prompt(1, 2, 3), NS) as match:
        addrs = pool.swap_in(match.addrs[1:2])
    assert values_of(pool, addrs) == [2]
    assert tiers_of(pool, 1, 2, 3) == [Tier.HOST] * 3
    pool.check((addrs,))
    pool.free_mem(addrs)
    with pool.match(prompt(1, 2, 3), NS, limit_tokens=2 * LAYOUT.block_tokens) as match:
        pool.free_mem(pool.swap_in(match.addrs))
    assert tiers_of(pool, 1, 2, 3) == [Tier.DEVICE, Tier.DEVICE, Tier.HOST]


def test_publishing_again_lifts_what_lay_lower(make: MakePool) -> None:
    pool = make(4, host=4)
    store(pool, 1, 2, 3)
    pool.swap_out(2)
    mine = pool.alloc_mem(3)
    inserted = pool.insert(prompt(1, 2, 9), mine, NS, Origin.PEER)
    assert (inserted.new, inserted.duplicate) == (1, 1)
    pool.free_mem(mine)
    assert tiers_of(pool, 1, 2, 9) == [Tier.DEVICE] * 3
    assert tiers_of(pool, 1, 2, 3) == [Tier.DEVICE, Tier.DEVICE, Tier.HOST]


def test_branches_under_a_lower_prefix(make: MakePool) -> None:
    pool = make(4, host=6)
    store(pool, 1, 2)
    store(pool, 1, 3)
    assert pool.swap_out(3) == 3
    assert tiers_of(pool, 1, 2) == tiers_of(pool, 1, 3) == [Tier.HOST] * 2
    store(pool, 1, 3, 4)
    assert tiers_of(pool, 1, 3, 4) == [Tier.DEVICE] * 3
    assert tiers_of(pool, 1, 2) == [Tier.DEVICE, Tier.HOST]
    assert pool.delete(prompt(1, 2), NS) == 1
    assert tiers_of(pool, 1, 2) == [Tier.DEVICE]


def test_swap_out_can_be_repeated_up_a_path(make: MakePool) -> None:
    """What went down does not keep its prefix from following, one block after the other."""
    pool = make(6, host=6)
    store(pool, 1, 2, 3, 4)
    for moved in range(1, 5):
        assert pool.swap_out(1) == 1
        assert tiers_of(pool, 1, 2, 3, 4) == [Tier.DEVICE] * (4 - moved) + [Tier.HOST] * moved
    assert pool.swap_out(1) == 0


def test_swap_out_leaves_what_is_in_use(make: MakePool) -> None:
    pool = make(4, host=4)
    store(pool, 1, 2, 3)
    with pool.match(prompt(1, 2), NS):
        assert pool.swap_out(4) == 1
        assert tiers_of(pool, 1, 2, 3) == [Tier.DEVICE, Tier.DEVICE, Tier.HOST]


def test_without_lower_tiers_nothing_moves(make: MakePool) -> None:
    pool = make(4)
    store(pool, 1, 2)
    assert (pool.swap_out(2), pool.persist()) == (0, 0)
    assert tiers_of(pool, 1, 2) == [Tier.DEVICE] * 2
    with pool.match(prompt(1, 2), NS) as match:
        pool.free_mem(pool.swap_in(match.addrs))


def test_host_memory_is_memory_and_disk_is_not(make: MakePool) -> None:
    pool = make(2, host=2, disk=2)
    addrs = pool.alloc_mem(2, Tier.HOST)
    assert len(pool.pointers(addrs)) == 2
    with pytest.raises(InvalidRequest, match="device"):
        pool.insert(prompt(1, 2), addrs, NS)
    pool.free_mem(addrs)
    with pytest.raises(ConfigError, match="no disk tier to allocate from"):
        pool.alloc_mem(1, Tier.DISK)
    store(pool, 1, 2)
    pool.persist()
    with pool.match(prompt(1, 2), NS) as match:
        with pytest.raises(InvalidRequest, match="swap them in"):
            pool.pointers(match.addrs)
        twice = match.addrs.concat(match.addrs)
        with pytest.raises(InvalidRequest, match="once at a time"):
            pool.swap_in(twice)


def test_hits_are_counted_by_tier(make: MakePool) -> None:
    pool = make(3, host=1, disk=4)
    store(pool, 1, 2, 3)
    pool.swap_out(1)
    pool.swap_out(1)
    tiers_of(pool, 1, 2, 3)
    stats = pool.stats()
    assert (stats.host_hit_tokens, stats.disk_hit_tokens) == (LAYOUT.block_tokens, LAYOUT.block_tokens)
    assert stats.hit_tokens == 3 * LAYOUT.block_tokens
    assert stats.counters()["pool_disk_historical"] == 1


def test_a_transfer_finds_its_prefix_in_a_lower_tier(make: MakePool) -> None:
    pool = make(4, host=4)
    store(pool, 1, 2)
    pool.swap_out(2)
    incoming = pool.begin_incoming("t", InstanceId("p"), NS, prompt(1, 2, 3), 3, 5.0)
    assert values_of(pool, incoming.held) == [1, 2]
    assert not incoming.held.tiers.any()
    pool.check(())
    pool.complete_incoming("t", Origin.PEER)
    assert tiers_of(pool, 1, 2, 3) == [Tier.DEVICE] * 3
