"""Transfers into a pool, without any wire: reserve, publish, abort, expire, and all of it twice."""

from __future__ import annotations

import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import (
    InvalidRequest,
    LeaseExpired,
    MemServeError,
    OutOfBlocks,
    Overloaded,
    StaleAddress,
    TransferAborted,
)
from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.mempool import AbortCause, Addresses, MemPool, Origin
from memserve.mempool.reservations import Completed, Reservation

from .conftest import prompt

NS = Namespace("m")
PEER = InstanceId("b")


def begin(pool: MemPool, transfer: str, tokens: Tokens, blocks: int | None = None) -> Reservation:
    wanted = pool.layout.blocks_for(len(tokens)) if blocks is None else blocks
    return pool.begin_incoming(transfer, PEER, NS, tokens, wanted, 5.0)


def matched(pool: MemPool, tokens: Tokens) -> int:
    with pool.match(tokens, NS) as match:
        return match.tokens


def test_nothing_is_visible_before_publication(pool: MemPool) -> None:
    pool.take_events()
    begin(pool, "t", prompt(1, 2))
    assert matched(pool, prompt(1, 2)) == 0
    assert pool.stats().incoming == 2
    assert pool.take_events() is None
    assert pool.complete_incoming("t", Origin.PEER) == Completed("t", 2)
    states = pool.stats()
    assert (states.incoming, states.historical, states.received) == (0, 2, 1)
    with pool.match(prompt(1, 2), NS) as match:
        assert match.origins.tolist() == [Origin.PEER, Origin.PEER]


def test_only_what_is_missing_is_allocated(pool: MemPool) -> None:
    begin(pool, "t", prompt(1, 2))
    pool.complete_incoming("t", Origin.PEER)
    reservation = begin(pool, "u", prompt(1, 2, 3, extra=1))
    assert (len(reservation.held), len(reservation.fresh)) == (2, 2)
    # What is held for the transfer cannot be evicted meanwhile.
    with pytest.raises(OutOfBlocks):
        pool.alloc_mem(5)
    pool.abort_incoming("u", AbortCause.SENDER_ABORTED, "no more")
    pool.check([])
    assert matched(pool, prompt(1, 2)) == 8


def test_a_taker_gets_references_to_the_whole_path(pool: MemPool) -> None:
    begin(pool, "t", prompt(1))
    pool.complete_incoming("t", Origin.PEER)
    begin(pool, "u", prompt(1, 2, extra=2))
    taken: list[Addresses] = []
    pool.complete_incoming("u", Origin.PEER, taken.append)
    assert [len(addrs) for addrs in taken] == [3]
    pool.check(taken)
    pool.free_mem(taken[0])
    states = pool.stats()
    assert (states.historical, states.free) == (2, 6)


def test_a_taker_that_refuses_leaves_nothing_held(pool: MemPool) -> None:
    def refuse(addrs: Addresses) -> None:
        raise Overloaded("busy")

    begin(pool, "t", prompt(1, 2, extra=1))
    with pytest.raises(Overloaded, match="busy"):
        pool.complete_incoming("t", Origin.PEER, refuse)
    with pytest.raises(Overloaded, match="busy"):
        pool.find_incoming("t")
    pool.check([])
    assert pool.stats().aborts[AbortCause.REFUSED] == 1


def test_the_same_reservation_again_is_the_same(pool: MemPool) -> None:
    first = begin(pool, "t", prompt(1, 2))
    assert begin(pool, "t", prompt(1, 2)) is first
    assert pool.stats().incoming == 2
    with pytest.raises(InvalidRequest, match="something else"):
        begin(pool, "t", prompt(1, 3))
    pool.complete_incoming("t", Origin.PEER)
    with pytest.raises(InvalidRequest, match="something else"):
        begin(pool, "t", prompt(1, 2))


def test_a_published_transfer_is_remembered(pool: MemPool) -> None:
    begin(pool, "t", prompt(1, 2))
    done = pool.complete_incoming("t", Origin.PEER)
    assert pool.find_incoming("t") == done
    pool.abort_incoming("t", AbortCause.SENDER_ABORTED, "too late")
    assert pool.find_incoming("t") == done
    assert pool.stats().aborts[AbortCause.SENDER_ABORTED] == 0


def test_an_abort_that_overtakes_its_reservation_wins(pool: MemPool) -> None:
    pool.abort_incoming("t", AbortCause.SENDER_ABORTED, "changed my mind")
    with pytest.raises(TransferAborted, match="changed my mind"):
        begin(pool, "t", prompt(1))
    assert pool.stats().free == 8


def test_publishing_what_was_never_reserved_is_refused(pool: MemPool) -> None:
    with pytest.raises(StaleAddress, match="unknown"):
        pool.find_incoming("t")


def test_an_overdue_transfer_is_revoked_and_freed_when_its_writer_has_stopped(
    pool: MemPool, clock: VirtualClock
) -> None:
    begin(pool, "t", prompt(1, 2))
    clock.advance(4.0)
    assert isinstance(pool.find_incoming("t"), Reservation)
    clock.advance(4.0)
    assert pool.expire() == ()
    clock.advance(2.0)
    assert pool.expire() == ("t",)
    assert pool.expire() == ()
    assert pool.stats().incoming == 2
    with pytest.raises(LeaseExpired):
        pool.complete_incoming("t", Origin.PEER)
    pool.abort_incoming("t", AbortCause.EXPIRED, "overdue")
    assert pool.stats().free == 8
    with pytest.raises(LeaseExpired):
        pool.find_incoming("t")


def test_a_death_notice_frees_what_that_peer_had_reserved(pool: MemPool) -> None:
    begin(pool, "t", prompt(1))
    begin(pool, "u", prompt(2))
    pool.begin_incoming("v", InstanceId("c"), NS, prompt(3), 1, 5.0)
    assert pool.drop_peer(PEER, "it died") == 2
    states = pool.stats()
    assert (states.incoming, states.aborts[AbortCause.SENDER_LOST]) == (1, 2)
    with pytest.raises(TransferAborted, match="it died"):
        pool.find_incoming("t")


def test_a_full_pool_refuses_and_keeps_nothing(pool: MemPool) -> None:
    held = pool.alloc_mem(7)
    with pytest.raises(OutOfBlocks):
        begin(pool, "t", prompt(1, 2))
    pool.check([held])


@pytest.mark.parametrize("blocks", [1, 4])
def test_blocks_must_fit_the_tokens(pool: MemPool, blocks: int) -> None:
    with pytest.raises(InvalidRequest, match="do not fit"):
        begin(pool, "t", prompt(1, 2, extra=1), blocks)


def test_a_plain_transfer_indexes_nothing(pool: MemPool) -> None:
    begin(pool, "t", prompt()[:0], 3)
    taken: list[Addresses] = []
    assert pool.complete_incoming("t", Origin.PEER, taken.append).inserted == 0
    pool.check(taken)
    assert pool.stats().active == 3


def test_the_memory_of_outcomes_is_bounded(pool: MemPool) -> None:
    for number in range(5000):
        pool.abort_incoming(str(number), AbortCause.SENDER_ABORTED, "noise")
    with pytest.raises(MemServeError, match="unknown"):
        pool.find_incoming("0")
    with pytest.raises(TransferAborted):
        pool.find_incoming("4999")
