"""MemPool's local calls: their contracts, one by one."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import ConfigError, InvalidRequest, LeaseExpired, OutOfBlocks, StaleAddress
from memserve.core.messages import Removed, Stored
from memserve.core.types import InstanceId, Namespace, Tokens, unpack_tokens
from memserve.mempool import Addresses, Freed, Inserted, KVLayout, MemPool, Origin, Tier

from .conftest import LAYOUT, prompt

NS = Namespace("m")


def cache(
    pool: MemPool, tokens: Tokens, namespace: Namespace = NS, origin: Origin = Origin.COMPUTED
) -> Addresses:
    """Compute and publish a prompt; afterwards it is historical only."""
    addrs = pool.alloc_mem(pool.layout.blocks_for(len(tokens)))
    pool.insert(tokens, addrs, namespace, origin)
    pool.free_mem(addrs)
    return addrs


def matched(pool: MemPool, tokens: Tokens, namespace: Namespace = NS) -> int:
    with pool.match(tokens, namespace) as match:
        return match.tokens


# --- memory -------------------------------------------------------------------------------------------


def test_alloc_is_all_or_nothing(pool: MemPool) -> None:
    held = pool.alloc_mem(5)
    with pytest.raises(OutOfBlocks, match=r"4 blocks asked for; 3 free, 0 evictable, 5 held") as caught:
        pool.alloc_mem(4)
    assert (caught.value.asked, caught.value.free, caught.value.pinned) == (4, 3, 5)
    assert pool.stats().free == 3
    pool.check([held])


def test_a_negative_allocation_is_refused(pool: MemPool) -> None:
    with pytest.raises(InvalidRequest, match="-1 blocks"):
        pool.alloc_mem(-1)


def test_alloc_on_a_tier_that_is_not_there_is_refused(pool: MemPool) -> None:
    with pytest.raises(ConfigError, match="no host tier"):
        pool.alloc_mem(1, Tier.HOST)


def test_a_pool_without_room_for_a_block_is_refused(clock: VirtualClock) -> None:
    with pytest.raises(ConfigError, match=r"pool\.memory"):
        MemPool(LAYOUT, 0, instance=InstanceId("a"), incarnation=1, clock=clock)


def test_free_mem_twice_is_reported_not_fatal(pool: MemPool) -> None:
    addrs = pool.alloc_mem(3)
    assert pool.free_mem(addrs) == Freed(3, 0)
    assert pool.free_mem(addrs) == Freed(0, 3)
    assert pool.stats().stale == 3


def test_a_late_free_does_not_touch_the_blocks_next_user(pool: MemPool) -> None:
    old = pool.alloc_mem(8)
    pool.free_mem(old)
    new = pool.alloc_mem(8)
    assert pool.free_mem(old) == Freed(0, 8)
    pool.check([new])


def test_freeing_a_cached_block_that_nobody_holds_is_stale(pool: MemPool) -> None:
    addrs = cache(pool, prompt(1, 2))
    assert pool.free_mem(addrs) == Freed(0, 2)
    assert matched(pool, prompt(1, 2)) == 8


def test_repeated_addresses_drop_one_reference_each(pool: MemPool) -> None:
    addrs = pool.alloc_mem(2)
    pool.retain(addrs[:1])
    assert pool.free_mem(addrs.concat(addrs[:1])) == Freed(3, 0)
    pool.check([])
    addrs = pool.alloc_mem(1)
    assert pool.free_mem(addrs.concat(addrs)) == Freed(1, 1)


def test_addresses_of_others_mean_nothing(pool: MemPool) -> None:
    mine = pool.alloc_mem(2)
    for other in (Addresses(InstanceId("b"), 1, mine.packed), Addresses(InstanceId("a"), 0, mine.packed)):
        with pytest.raises(StaleAddress, match="mean nothing"):
            pool.pointers(other)
        assert pool.free_mem(other) == Freed(0, 2)
    pool.check([mine])


def test_pointers_lead_to_the_blocks_bytes(pool: MemPool) -> None:
    addrs = pool.alloc_mem(3)
    for number in addrs.blocks.tolist():
        pool.arena.block_memory(number)[:] = number + 1
    bases = pool.pointers(addrs)
    assert np.diff(bases.astype(np.int64)).tolist() == [LAYOUT.block_bytes] * 2
    assert int(bases[0]) == pool.arena.block_memory(int(addrs.blocks[0])).ctypes.data


def test_pointers_of_freed_blocks_are_refused(pool: MemPool) -> None:
    addrs = pool.alloc_mem(2)
    pool.free_mem(addrs[1:])
    with pytest.raises(StaleAddress, match="were freed"):
        pool.pointers(addrs)


# --- index --------------------------------------------------------------------------------------------


def test_only_whole_blocks_are_published(pool: MemPool) -> None:
    addrs = pool.alloc_mem(3)
    assert pool.insert(prompt(1, 2, extra=3), addrs, NS) == Inserted(2, 0)
    pool.free_mem(addrs)
    states = pool.stats()
    assert (states.free, states.historical) == (6, 2)
    assert matched(pool, prompt(1, 2, extra=3)) == 8


def test_match_gives_the_same_blocks_in_order(pool: MemPool) -> None:
    addrs = cache(pool, prompt(1, 2, 3))
    with pool.match(prompt(1, 2, 9), NS) as match:
        assert match.tokens == 8
        assert match.addrs == addrs[:2]


@pytest.mark.parametrize(("limit", "expected"), [(None, 12), (12, 12), (11, 8), (4, 4), (3, 0), (0, 0)])
def test_match_stays_below_a_limit(pool: MemPool, limit: int | None, expected: int) -> None:
    cache(pool, prompt(1, 2, 3))
    with pool.match(prompt(1, 2, 3), NS, limit) as match:
        assert match.tokens == expected


def test_origins_come_with_a_match(pool: MemPool) -> None:
    cache(pool, prompt(1), origin=Origin.PEER)
    addrs = pool.alloc_mem(2)
    pool.insert(prompt(1, 2), addrs, NS, Origin.BACKFLOW)
    pool.free_mem(addrs)
    with pool.match(prompt(1, 2), NS) as match:
        assert match.origins.tolist() == [Origin.PEER, Origin.BACKFLOW]


def test_namespaces_never_share(pool: MemPool) -> None:
    cache(pool, prompt(1, 2))
    for other in (Namespace("n"), Namespace("m", adapter="x"), Namespace("m", salt="s")):
        assert matched(pool, prompt(1, 2), other) == 0


def test_duplicates_keep_the_block_that_was_there(pool: MemPool) -> None:
    first = cache(pool, prompt(1, 2))
    second = pool.alloc_mem(3)
    assert pool.insert(prompt(1, 2, 3), second, NS) == Inserted(1, 2)
    pool.free_mem(second)
    with pool.match(prompt(1, 2, 3), NS) as match:
        assert match.addrs == first.concat(second[2:])
    assert pool.stats().free == 5


def test_a_request_publishes_on_top_of_its_own_match(pool: MemPool) -> None:
    cache(pool, prompt(1, 2))
    match = pool.match(prompt(1, 2, 3), NS)
    addrs = match.detach().concat(pool.alloc_mem(1))
    assert pool.insert(prompt(1, 2, 3), addrs, NS) == Inserted(1, 0)
    pool.free_mem(addrs)
    pool.check([])
    assert pool.stats().historical == 3


def test_insert_refuses_what_cannot_be(pool: MemPool) -> None:
    addrs = pool.alloc_mem(3)
    with pytest.raises(InvalidRequest, match="2 addresses for 3 blocks"):
        pool.insert(prompt(1, 2, 3), addrs[:2], NS)
    with pytest.raises(InvalidRequest, match="one place"):
        pool.insert(prompt(1, 2), addrs[:1].concat(addrs[:1]), NS)
    pool.insert(prompt(1, 2), addrs[:2], NS)
    with pytest.raises(InvalidRequest, match="one place"):
        pool.insert(prompt(5, 6), addrs[:2], NS)
    pool.free_mem(addrs[2:])
    with pytest.raises(StaleAddress):
        pool.insert(prompt(7), addrs[2:], NS)
    pool.check([addrs[:2]])


def test_a_lease_keeps_blocks_from_eviction(pool: MemPool) -> None:
    cache(pool, prompt(1, 2, 3, 4))
    with pool.match(prompt(1, 2, 3, 4), NS), pytest.raises(OutOfBlocks):
        pool.alloc_mem(5)
    held = pool.alloc_mem(5)
    assert matched(pool, prompt(1, 2, 3, 4)) == 12
    pool.check([held])


def test_a_released_match_cannot_be_used(pool: MemPool) -> None:
    cache(pool, prompt(1))
    match = pool.match(prompt(1), NS)
    match.release()
    match.release()
    with pytest.raises(LeaseExpired, match="released"):
        match.detach()
    pool.check([])


def test_a_lease_with_a_deadline_ends_by_itself(pool: MemPool, clock: VirtualClock) -> None:
    cache(pool, prompt(1))
    kept = pool.match(prompt(1), NS)
    match = pool.match(prompt(1), NS, lease_seconds=2.0)
    clock.advance(1.9)
    pool.expire()
    assert match.active
    clock.advance(0.2)
    pool.expire()
    with pytest.raises(LeaseExpired, match="deadline"):
        assert match.addrs
    match.release()
    pool.check([])
    assert kept.active
    kept.release()


def test_delete_forgets_an_entry_and_spares_the_others(pool: MemPool) -> None:
    cache(pool, prompt(1, 2, 3))
    cache(pool, prompt(1, 2, 4))
    assert pool.delete(prompt(1, 2, 3), NS) == 1
    assert matched(pool, prompt(1, 2, 3)) == 8
    assert matched(pool, prompt(1, 2, 4)) == 12
    assert pool.delete(prompt(1, 9), NS) == 0
    assert pool.delete(prompt(1), NS) == 3
    assert pool.stats().free == 8


def test_delete_under_a_lease_frees_with_the_last_holder(pool: MemPool) -> None:
    cache(pool, prompt(1, 2))
    with pool.match(prompt(1, 2), NS):
        assert pool.delete(prompt(1, 2), NS) == 2
        assert matched(pool, prompt(1, 2)) == 0
        assert pool.stats().free == 6
    assert pool.stats().free == 8


def test_delete_finds_what_eviction_left_of_an_entry(pool: MemPool) -> None:
    cache(pool, prompt(1, 2, 3))
    pool.free_mem(pool.alloc_mem(6))
    assert matched(pool, prompt(1, 2, 3)) == 8
    assert pool.delete(prompt(1, 2, 3), NS) == 2


# --- events -------------------------------------------------------------------------------------------


def test_events_tell_what_was_stored_and_removed(pool: MemPool) -> None:
    assert pool.take_events() is None
    cache(pool, prompt(1, 2, extra=1))
    pool.free_mem(pool.alloc_mem(7))
    batch = pool.take_events()
    assert batch is not None
    stored, removed = batch.events
    assert isinstance(stored, Stored)
    assert unpack_tokens(stored.tokens).tolist() == prompt(1, 2).tolist()
    assert isinstance(removed, Removed)
    assert (unpack_tokens(removed.tokens).tolist(), removed.keep) == (prompt(1, 2).tolist(), 4)
    assert pool.take_events() is None


def test_event_numbers_go_on_and_a_snapshot_says_where(pool: MemPool) -> None:
    pool.take_events()
    cache(pool, prompt(1))
    first = pool.take_events()
    cache(pool, prompt(2))
    cache(pool, prompt(2, 3))
    snapshot = pool.snapshot()
    cache(pool, prompt(4))
    after = pool.take_events()
    assert first is not None
    assert after is not None
    assert (first.seq, snapshot.next_seq, after.seq, len(after.events)) == (0, 3, 3, 1)
    paths = {tuple(unpack_tokens(path.tokens).tolist()) for path in snapshot.paths}
    assert paths == {tuple(prompt(1).tolist()), tuple(prompt(2, 3).tolist())}


def test_no_event_without_a_change(pool: MemPool) -> None:
    cache(pool, prompt(1))
    pool.take_events()
    addrs = pool.alloc_mem(1)
    pool.insert(prompt(1), addrs, NS)
    pool.free_mem(addrs)
    assert pool.take_events() is None


def test_stats_count_tokens(pool: MemPool) -> None:
    cache(pool, prompt(1, 2))
    matched(pool, prompt(1, 2, 3))
    stats = pool.stats()
    assert (stats.hit_tokens, stats.miss_tokens) == (8, 4)
    assert stats.counters()["pool_hit_tokens"] == 8


def test_transfers_need_an_endpoint(pool: MemPool) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        pool.set_peers(())


def test_kv_layouts_of_the_arena_are_contiguous_blocks() -> None:
    layout = KVLayout("m", layers=30, kv_heads=3, head_dim=64)
    assert layout.block_bytes == 368_640
