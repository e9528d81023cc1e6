"""Blocks lent to peers: whose they are, when they end, and that nobody writes to what is used again."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import InvalidRequest, OutOfBlocks, StaleAddress
from memserve.core.types import InstanceId, Namespace
from memserve.mempool import AbortCause, Addresses, MemPool, Origin, Tier

from .conftest import LAYOUT, prompt

NS = Namespace("m")
PEER = InstanceId("p")
SECONDS = 5.0


def lend(pool: MemPool, n: int = 3, loan: str = "l", peer: InstanceId = PEER) -> Addresses:
    return pool.lend(loan, peer, n, Tier.DEVICE, SECONDS)


def begin(pool: MemPool, dst: Addresses, *seeds: int, transfer: str = "t") -> None:
    tokens = prompt(*seeds) if seeds else np.empty(0, np.int32)
    pool.begin_incoming(transfer, PEER, NS, tokens, len(dst), SECONDS, dst)


def test_the_same_loan_again_is_the_same_blocks(pool: MemPool) -> None:
    lent = lend(pool)
    assert lend(pool) == lent
    assert pool.stats().lent == 3
    with pytest.raises(InvalidRequest, match="something else"):
        lend(pool, 2)
    with pytest.raises(OutOfBlocks):
        lend(pool, 6, "m")
    pool.check([])


def test_a_loan_runs_out_unless_it_is_used(pool: MemPool, clock: VirtualClock) -> None:
    lent = lend(pool)
    clock.advance(4.0)
    begin(pool, lent)
    pool.complete_incoming("t", Origin.PEER)
    clock.advance(4.0)
    pool.expire()
    assert pool.stats().lent == 3
    assert pool.next_loan_deadline() == clock.now() + 1.0
    clock.advance(1.0)
    pool.expire()
    assert (pool.stats().lent, pool.stats().free, pool.next_loan_deadline()) == (0, 8, None)
    with pytest.raises(StaleAddress):
        begin(pool, lent, transfer="u")
    pool.check([])


def test_a_part_can_be_given_back_once(pool: MemPool) -> None:
    lent = lend(pool)
    assert pool.take_back(PEER, lent[:1]).freed == 1
    assert pool.take_back(PEER, lent).stale == 1
    assert pool.take_back(PEER, lent).stale == 3
    assert pool.stats().free == 8
    pool.check([])


def test_others_can_neither_free_nor_write_what_is_lent(pool: MemPool) -> None:
    lent, own = lend(pool), pool.alloc_mem(2)
    assert pool.take_back(InstanceId("q"), lent).stale == 3
    assert pool.take_back(PEER, own).stale == 2
    for wrong in (own, Addresses(pool.instance, 1, np.concatenate((lent.packed, own.packed)))):
        with pytest.raises(InvalidRequest, match="not lent to p"):
            begin(pool, wrong)
    with pytest.raises(InvalidRequest, match="free of other"):
        begin(pool, Addresses(pool.instance, 1, lent.packed[[0, 0]]))
    with pytest.raises(InvalidRequest, match="2 addresses for 3 blocks"):
        pool.begin_incoming("t", PEER, NS, prompt(1, 2, 3), 3, SECONDS, lent[:2])
    pool.check([own])


def test_blocks_of_another_life_are_stale(pool: MemPool) -> None:
    lent = lend(pool)
    with pytest.raises(StaleAddress, match="incarnation 2"):
        begin(pool, Addresses(lent.instance, 2, lent.packed))
    assert pool.take_back(PEER, Addresses(lent.instance, 2, lent.packed)).stale == 3
    pool.check([])


def test_what_was_published_is_not_written_again(pool: MemPool) -> None:
    lent = lend(pool)
    begin(pool, lent, 1, 2, 3)
    assert pool.stats().incoming == 3
    assert pool.complete_incoming("t", Origin.PEER).inserted == 3
    with pytest.raises(InvalidRequest, match="free of other"):
        begin(pool, lent, transfer="u")
    pool.check([])
    assert pool.take_back(PEER, lent).freed == 3
    assert pool.stats().historical == 3
    pool.check([])


def test_only_what_is_missing_is_written(pool: MemPool) -> None:
    known = pool.alloc_mem(1)
    pool.insert(prompt(1), known, NS)
    pool.free_mem(known)
    lent = lend(pool)
    reservation = pool.begin_incoming("t", PEER, NS, prompt(1, 2, 3), 3, SECONDS, lent)
    assert (reservation.held, reservation.fresh) == (known, lent[1:])
    assert pool.begin_incoming("t", PEER, NS, prompt(1, 2, 3), 3, SECONDS, lent) is reservation
    assert pool.stats().incoming == 2
    pool.check([])
    assert pool.complete_incoming("t", Origin.PEER).inserted == 2
    pool.check([])
    assert pool.take_back(PEER, lent).freed == 3
    assert (pool.stats().historical, pool.stats().active) == (3, 0)


def test_a_taker_gets_references_of_its_own(pool: MemPool) -> None:
    lent, taken = lend(pool), []
    begin(pool, lent)
    pool.complete_incoming("t", Origin.PEER, taken.append)
    pool.check(taken)
    pool.take_back(PEER, lent)
    assert pool.stats().active == 3
    pool.check(taken)
    pool.free_mem(taken[0])
    assert pool.stats().free == 8


@pytest.mark.parametrize("end", ["abort", "complete"])
def test_a_loan_that_ends_during_a_transfer_is_freed_after_it(pool: MemPool, end: str) -> None:
    lent = lend(pool)
    begin(pool, lent, 1, 2, 3)
    with pytest.raises(InvalidRequest, match="wait for its end"):
        pool.take_back(PEER, lent)
    pool.end_loans(PEER)
    assert pool.stats().incoming == 3
    pool.check([])
    if end == "abort":
        pool.abort_incoming("t", AbortCause.SENDER_LOST, "gone")
    else:
        pool.complete_incoming("t", Origin.PEER)
    assert pool.stats().lent == 0
    assert pool.stats().historical == (0 if end == "abort" else 3)
    assert pool.stats().active == 0
    pool.check([])


def test_a_loan_does_not_run_out_while_it_is_written(pool: MemPool, clock: VirtualClock) -> None:
    lent = lend(pool)
    begin(pool, lent)
    clock.advance(9.0)
    assert pool.expire() == ("t",)
    assert pool.stats().incoming == 3
    pool.abort_incoming("t", AbortCause.EXPIRED, "overdue")
    assert pool.stats().lent == 3
    clock.advance(SECONDS)
    pool.expire()
    assert pool.stats().free == 8
    pool.check([])


def test_a_death_notice_ends_loans_and_transfers(pool: MemPool) -> None:
    begin(pool, lend(pool))
    lend(pool, 2, "m")
    lend(pool, 1, "n", InstanceId("q"))
    assert pool.drop_peer(PEER, "it died") == 1
    assert (pool.stats().lent, pool.stats().free) == (1, 7)
    pool.check([])


def test_host_blocks_can_be_lent_but_not_published(clock: VirtualClock) -> None:
    pool = MemPool(LAYOUT, 4, instance=InstanceId("a"), incarnation=1, clock=clock, host_blocks=4)
    lent = pool.lend("l", PEER, 2, Tier.HOST, SECONDS)
    with pytest.raises(InvalidRequest, match="on the device"):
        begin(pool, lent, 1, 2)
    begin(pool, lent, transfer="u")
    pool.complete_incoming("u", Origin.PEER)
    assert pool.take_back(PEER, lent).freed == 2
    pool.check([])
