"""Pins: honoured until their time is up, or refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import InvalidRequest, OutOfBlocks
from memserve.core.types import InstanceId, Namespace
from memserve.mempool import MemPool

from .conftest import LAYOUT, prompt

NS = Namespace("m")


@pytest.fixture
def tiered(clock: VirtualClock) -> Iterator[MemPool]:
    pool = MemPool(LAYOUT, 8, instance=InstanceId("a"), incarnation=1, clock=clock, host_blocks=8)
    yield pool
    pool.check(())
    pool.close()


def store(pool: MemPool, *blocks: int) -> None:
    addrs = pool.alloc_mem(len(blocks))
    pool.insert(prompt(*blocks), addrs, NS)
    pool.free_mem(addrs)


def on_device(pool: MemPool, *blocks: int) -> int:
    with pool.match(prompt(*blocks), NS) as match:
        return int((match.tiers == 0).sum())


def test_what_is_pinned_outlives_need_until_its_deadline(tiered: MemPool, clock: VirtualClock) -> None:
    store(tiered, 1, 2, 3)
    assert tiered.pin(prompt(1, 2, extra=1), NS, ttl=10.0) == 2
    with pytest.raises(OutOfBlocks):
        tiered.alloc_mem(7)
    tiered.free_mem(tiered.alloc_mem(6))
    assert on_device(tiered, 1, 2, 3) == 2
    clock.advance(10.0)
    tiered.expire()
    tiered.free_mem(tiered.alloc_mem(8))
    assert on_device(tiered, 1, 2, 3) == 0
    assert tiered.stats().pinned == 0


def test_a_pin_is_renewed_and_ended_by_hand(tiered: MemPool, clock: VirtualClock) -> None:
    store(tiered, 1)
    tiered.pin(prompt(1), NS, ttl=1.0)
    tiered.pin(prompt(1), NS, ttl=5.0)
    clock.advance(2.0)
    tiered.expire()
    assert tiered.stats().pinned == 1
    assert tiered.unpin(prompt(1), NS)
    assert not tiered.unpin(prompt(1), NS)


def test_pins_share_blocks_and_have_a_share(tiered: MemPool) -> None:
    store(tiered, 1, 2, 3)
    store(tiered, 4, 5)
    tiered.pin(prompt(1, 2), NS, ttl=1.0)
    tiered.pin(prompt(1, 2, 3), NS, ttl=1.0)
    assert tiered.stats().pinned == 3
    with pytest.raises(InvalidRequest, match="would hold 5 of 4 blocks"):
        tiered.pin(prompt(4, 5), NS, ttl=1.0)
    tiered.pin(prompt(4), NS, ttl=1.0)


@pytest.mark.parametrize(("tokens", "ttl"), [(prompt(1, 2), 1.0), (prompt(1), 0.0), (prompt(1)[:1], 1.0)])
def test_what_cannot_be_pinned_is_refused(tiered: MemPool, tokens, ttl: float) -> None:
    store(tiered, 1)
    with pytest.raises(InvalidRequest):
        tiered.pin(tokens, NS, ttl)
    tiered.check(())


def test_pinning_brings_up_or_is_refused(tiered: MemPool) -> None:
    store(tiered, 1, 2)
    tiered.swap_out(2)
    held = tiered.alloc_mem(7)
    with pytest.raises(OutOfBlocks):
        tiered.pin(prompt(1, 2), NS, ttl=1.0)
    tiered.free_mem(held)
    tiered.pin(prompt(1, 2), NS, ttl=1.0)
    assert on_device(tiered, 1, 2) == 2
    assert tiered.swap_out(8) == 0


def test_a_deletion_ends_the_pin(tiered: MemPool) -> None:
    store(tiered, 1, 2)
    tiered.pin(prompt(1, 2), NS, ttl=1.0)
    assert tiered.delete(prompt(1, 2), NS) == 2
    assert (tiered.stats().pinned, tiered.stats().free) == (0, 8)
