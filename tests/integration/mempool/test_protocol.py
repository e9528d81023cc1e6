"""The transfer protocol over real sockets, down to raw messages: lost, doubled, late, overtaken, wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memserve._native import checksum_blocks
from memserve.core.clock import VirtualClock
from memserve.core.errors import (
    CorruptBlock,
    InvalidRequest,
    LayoutMismatch,
    LeaseExpired,
    OutOfBlocks,
    Overloaded,
    PeerLost,
    PeerOutOfBlocks,
    ProtocolError,
    StaleAddress,
    TransferAborted,
)
from memserve.core.messages import (
    AbortTransfer,
    Copied,
    Hello,
    Message,
    Ok,
    PeerMessage,
    Publish,
    Published,
    Reserve,
    Reserved,
)
from memserve.core.types import InstanceId, Namespace, pack_tokens
from memserve.mempool import AbortCause, Addresses, KVLayout, MemPool
from memserve.wire import Connection, connect

from .conftest import DEADLINE, SMALL, fresh_address, serving, until
from .peer_process import member

NS = Namespace("m")
B = InstanceId("b")
TOKENS = np.arange(4 * SMALL.block_tokens, dtype=np.int32)


class RawPeer:
    """A peer of nothing but messages; answers the receiver's questions if told to."""

    def __init__(self, connection: Connection | None = None, *, answers: bool = True) -> None:
        self.answers = answers
        self.asked: list[Any] = []
        self.never = asyncio.Event()

    def on_notify(self, connection: Connection, message: Any) -> None: ...

    async def on_call(self, connection: Connection, message: Any) -> Message:
        self.asked.append(message)
        if not self.answers:
            await self.never.wait()
        return Ok()

    def on_close(self, connection: Connection, reason: str) -> None: ...


@asynccontextmanager
async def raw_peer(address: str, *, answers: bool = True) -> AsyncIterator[tuple[Connection, RawPeer]]:
    peer = RawPeer(answers=answers)
    connection = await connect(address, PeerMessage, peer, 5.0)
    try:
        yield connection, peer
    finally:
        connection.close()


def hello(name: str = "raw", incarnation: int = 1) -> Hello:
    return Hello(InstanceId(name), incarnation, SMALL.fingerprint, SMALL.text, "host", "")


def reserve(transfer: str = "t", tokens: np.ndarray = TOKENS, seconds: float = 20.0) -> Reserve:
    return Reserve(transfer, NS, pack_tokens(tokens), len(tokens) // SMALL.block_tokens, seconds)


def publish(pool: MemPool, reserved: Reserved, attachment: bytes = b"") -> Publish:
    """A publication whose checksums are those of whatever the reserved blocks hold."""
    dst = Addresses.from_bytes(pool.instance, pool.incarnation, reserved.dst)
    checksums = checksum_blocks(pool.pointers(dst), SMALL.block_bytes)
    return Publish(reserved.transfer, checksums.astype("<u8").tobytes(), 1, attachment)


def matched(pool: MemPool, tokens: np.ndarray = TOKENS) -> int:
    with pool.match(tokens, NS) as match:
        return match.tokens


# --- raw messages -------------------------------------------------------------------------------------


def test_a_doubled_publication_gets_the_same_answer_and_inserts_once() -> None:
    async def scenario() -> None:
        async with serving("b") as (pool, _, address), raw_peer(address) as (peer, _):
            pool.take_events()
            await peer.call(hello(), 5.0)
            reserved = await peer.call(reserve(), 5.0)
            again = await peer.call(reserve(), 5.0)
            assert again == reserved
            message = publish(pool, reserved)
            answers = await asyncio.gather(*(peer.call(message, 5.0) for _ in range(3)))
            answers.append(await peer.call(message, 5.0))
            assert answers == [Published("t", 4)] * 4
            assert pool.stats().received == 1
            batch = pool.take_events()
            assert batch is not None
            assert len(batch.events) == 1
            pool.check([])

    asyncio.run(scenario())


@pytest.mark.parametrize("answers", [True, False])
def test_a_late_publication_is_refused(answers: bool) -> None:
    """Blocks are free once the silent sender says that it has stopped, or once its connection ends."""

    async def scenario() -> None:
        clock = VirtualClock()
        async with serving("b", clock=clock) as (pool, _, address):
            async with raw_peer(address, answers=answers) as (peer, raw):
                await peer.call(hello(), 5.0)
                reserved = await peer.call(reserve(seconds=0.01), 5.0)
                message = publish(pool, reserved)
                clock.advance(1.0)
                await until(lambda: bool(raw.asked))
                assert isinstance(raw.asked[0], AbortTransfer)
                with pytest.raises(LeaseExpired):
                    await peer.call(message, 5.0)
                await until(lambda: pool.stats().incoming == (0 if answers else 4))
            await until(lambda: pool.stats().free == 16)
            assert matched(pool) == 0
            pool.check([])

    asyncio.run(scenario())


def test_an_abort_frees_and_the_id_is_used_up() -> None:
    async def scenario() -> None:
        async with serving("b") as (pool, _, address), raw_peer(address) as (peer, _):
            await peer.call(hello(), 5.0)
            message = publish(pool, await peer.call(reserve(), 5.0))
            peer.notify(AbortTransfer("t", "no more"))
            peer.notify(AbortTransfer("t", "no more"))
            for late in (message, reserve()):
                with pytest.raises(TransferAborted, match="no more"):
                    await peer.call(late, 5.0)
            assert pool.stats().free == 16
            assert pool.stats().aborts[AbortCause.SENDER_ABORTED] == 1

    asyncio.run(scenario())


def test_an_abort_overtakes_a_reservation() -> None:
    async def scenario() -> None:
        async with serving("b") as (pool, _, address), raw_peer(address) as (peer, _):
            await peer.call(hello(), 5.0)
            # Calls are handled in tasks, notifications at once: the abort comes first.
            call = asyncio.ensure_future(peer.call(reserve(), 5.0))
            await asyncio.sleep(0)
            peer.notify(AbortTransfer("t", "changed my mind"))
            with pytest.raises(TransferAborted, match="changed my mind"):
                await call
            assert pool.stats().free == 16

    asyncio.run(scenario())


def test_a_sender_that_vanishes_during_verification_publishes_nothing_it_could_lose() -> None:
    async def scenario() -> None:
        async with serving("b") as (pool, _, address):
            async with raw_peer(address) as (peer, _):
                await peer.call(hello(), 5.0)
                message = publish(pool, await peer.call(reserve(), 5.0))
                call = asyncio.ensure_future(peer.call(message, 5.0))
                await asyncio.sleep(0)
                peer.close()
                with pytest.raises(PeerLost):
                    await call
            await until(lambda: pool.stats().incoming == 0)
            pool.check([])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "told",
    [[(0, 2)], [(0, 2), (2, 1)], [(0, 4)], [(2, 2)], [(0, 2), (0, 2)], [(0, 99)], [(0, 0)]],
    ids=["early", "in parts", "all", "lost one", "doubled", "too many", "none"],
)
def test_hints_of_written_blocks_change_no_outcome(told: list[tuple[int, int]]) -> None:
    """What is verified early is verified; all else is in the end, and a wrong byte is found either way."""

    async def scenario() -> None:
        async with serving("b") as (pool, _, address), raw_peer(address) as (peer, _):
            await peer.call(hello(), 5.0)
            peer.notify(Copied("never heard of", 0, 1))
            for transfer, wrong in (("t", True), ("u", False)):
                reserved = await peer.call(reserve(transfer), 5.0)
                for first, blocks in told:
                    peer.notify(Copied(transfer, first, blocks))
                message = publish(pool, reserved)
                if not wrong:
                    assert await peer.call(message, 5.0) == Published(transfer, 4)
                    continue
                checksums = bytes(8) + message.checksums[8:]
                with pytest.raises(CorruptBlock, match="1 of 4"):
                    await peer.call(Publish(transfer, checksums, 1), 5.0)
            peer.notify(Copied("u", 0, 1))
            assert matched(pool) == len(TOKENS)
            pool.check([])

    asyncio.run(scenario())


def test_progress_keeps_a_reservation_alive() -> None:
    async def scenario() -> None:
        clock = VirtualClock()
        async with serving("b", clock=clock) as (pool, _, address), raw_peer(address) as (peer, _):
            await peer.call(hello(), 5.0)
            reserved = await peer.call(reserve(seconds=20.0), 5.0)
            for first in range(4):
                clock.advance(15.0)
                peer.notify(Copied("t", first, 1))
                # Answered in the order of arrival: the hint has been heard when this has.
                with pytest.raises(StaleAddress):
                    await peer.call(Publish("other", b"", 1), 5.0)
                pool.expire()
            assert await peer.call(publish(pool, reserved), 5.0) == Published("t", 4)

    asyncio.run(scenario())


def test_a_way_that_this_side_does_not_offer_is_refused() -> None:
    async def scenario() -> None:
        async with serving("b") as (pool, _, address), raw_peer(address) as (peer, _):
            await peer.call(hello(), 5.0)
            asked = Reserve("t", NS, pack_tokens(TOKENS), 4, 20.0, "tcp")
            with pytest.raises(InvalidRequest, match="cannot come by tcp"):
                await peer.call(asked, 5.0)
            assert pool.stats().free == 16

    asyncio.run(scenario())


def test_wrong_checksums_are_refused_and_the_blocks_freed() -> None:
    async def scenario() -> None:
        async with serving("b") as (pool, _, address), raw_peer(address) as (peer, _):
            await peer.call(hello(), 5.0)
            for transfer, checksums in (("t", bytes(8 * 4)), ("u", bytes(8))):
                await peer.call(reserve(transfer), 5.0)
                with pytest.raises(CorruptBlock):
                    await peer.call(Publish(transfer, checksums, 1), 5.0)
            assert pool.stats().free == 16
            assert pool.stats().aborts[AbortCause.CORRUPT] == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("message", [reserve(), Publish("t", b"", 1)])
def test_nothing_goes_before_hello(message: Message) -> None:
    async def scenario() -> None:
        async with serving("b") as (_, _, address), raw_peer(address) as (peer, _):
            with pytest.raises(ProtocolError, match="before Hello"):
                await peer.call(message, 5.0)

    asyncio.run(scenario())


def test_nonsense_is_refused_without_a_trace() -> None:
    async def scenario() -> None:
        async with serving("b") as (pool, _, address), raw_peer(address) as (peer, _):
            await peer.call(hello(), 5.0)
            for bad in (
                Reserve("x", NS, b"", 0, 1.0),
                Reserve("x", NS, b"", 1, -1.0),
                Reserve("x", NS, b"", 1, 1e9),
            ):
                with pytest.raises(InvalidRequest, match="possible"):
                    await peer.call(bad, 5.0)
            with pytest.raises(StaleAddress, match="unknown"):
                await peer.call(Publish("never", b"", 1), 5.0)
            pool.check([])

    asyncio.run(scenario())


def test_an_earlier_life_is_refused_and_a_later_one_replaces_it() -> None:
    async def scenario() -> None:
        async with serving("b") as (pool, _, address), raw_peer(address) as (old, _):
            await old.call(hello(incarnation=4), 5.0)
            await old.call(reserve(), 5.0)
            async with raw_peer(address) as (new, _):
                await new.call(hello(incarnation=5), 5.0)
                assert pool.stats().incoming == 0
                await until(lambda: old.closed)
                async with raw_peer(address) as (late, _):
                    with pytest.raises(StaleAddress, match="replaced by incarnation 5"):
                        await late.call(hello(incarnation=4), 5.0)

    asyncio.run(scenario())


# --- two endpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [KVLayout("other", layers=2, kv_heads=1, head_dim=64), replace(SMALL, dtype="int8")]
)
def test_layouts_must_agree_and_both_are_named(other: KVLayout) -> None:
    async def scenario() -> None:
        async with (
            serving("a", layout=SMALL) as (pool, endpoint, _),
            serving("b", layout=other) as (_, _, address),
        ):
            with pytest.raises(LayoutMismatch) as caught:
                await endpoint.connect(member("b", address))
            assert SMALL.text in str(caught.value)
            assert other.text in str(caught.value)
            src = pool.alloc_mem(4)
            with pytest.raises(LayoutMismatch):
                await pool.transfer_with_insert(B, TOKENS, src, NS)
            pool.check([src])

    asyncio.run(scenario())


def test_a_full_receiver_is_told_apart_from_a_full_sender() -> None:
    async def scenario() -> None:
        async with serving("a") as (pool, endpoint, _), serving("b", blocks=4) as (there, _, address):
            endpoint.set_peers((member("b", address),))
            src = pool.alloc_mem(4)
            kept = there.alloc_mem(1)
            with pytest.raises(PeerOutOfBlocks, match="4 blocks asked for; 3 free") as caught:
                await pool.transfer_with_insert(B, TOKENS, src, NS)
            assert isinstance(caught.value, OutOfBlocks)
            there.free_mem(kept)
            assert (await pool.transfer_with_insert(B, TOKENS, src, NS)).sent == 4
            pool.check([src])
            there.check([])

    asyncio.run(scenario())


@pytest.mark.parametrize(("flips", "works"), [(1, True), (2, False)])
def test_a_flipped_byte_is_never_published(flips: int, works: bool) -> None:
    async def scenario() -> None:
        left = [flips]

        def flip(step: str) -> None:
            if step == "copied" and left[0]:
                left[0] -= 1
                for number in range(there.blocks):
                    there.arena.block_memory(number)[-1] ^= 1

        async with (
            serving("a", observe=flip) as (pool, endpoint, _),
            serving("b") as (there, _, address),
        ):
            endpoint.set_peers((member("b", address),))
            src = pool.alloc_mem(4)
            if works:
                assert (await pool.transfer_with_insert(B, TOKENS, src, NS)).sent == 4
            else:
                with pytest.raises(CorruptBlock, match="4 of 4 units"):
                    await pool.transfer_with_insert(B, TOKENS, src, NS)
            assert matched(there) == (len(TOKENS) if works else 0)
            assert there.stats().aborts[AbortCause.CORRUPT] == flips
            there.check([])
            pool.check([src])

    asyncio.run(scenario())


def test_an_attachment_brings_the_tail_and_hands_all_blocks_over() -> None:
    async def scenario() -> None:
        taken: list[tuple[bytes, Addresses]] = []
        async with serving("a") as (pool, endpoint, _), serving("b") as (there, receiver, address):
            endpoint.set_peers((member("b", address),))
            receiver.on_adopt = lambda attachment, addrs: taken.append((attachment, addrs))
            src = pool.alloc_mem(5)
            for number in src.blocks.tolist():
                pool.arena.block_memory(number)[:] = number + 1
            await pool.transfer_with_insert(B, TOKENS[:32], src, NS)
            tokens = np.concatenate((TOKENS, TOKENS[:3]))
            done = await pool.transfer_with_insert(B, tokens, src, NS, attachment=b"request")
            assert (done.held, done.sent) == (2, 3)
            ((attachment, addrs),) = taken
            assert attachment == b"request"
            assert [int(there.arena.block_memory(n)[0]) for n in addrs.blocks.tolist()] == [1, 2, 3, 4, 5]
            there.check([addrs])
            assert matched(there, tokens) == len(TOKENS)
            there.free_mem(addrs)
            assert there.stats().historical == 4

    asyncio.run(scenario())


def test_a_plain_transfer_goes_to_its_taker_and_into_no_index() -> None:
    async def scenario() -> None:
        taken: list[Addresses] = []
        async with serving("a") as (pool, endpoint, _), serving("b") as (there, receiver, address):
            endpoint.set_peers((member("b", address),))
            src = pool.alloc_mem(3)
            with pytest.raises(InvalidRequest, match="attachment"):
                await pool.transfer(B, src)
            with pytest.raises(InvalidRequest, match="take over"):
                await pool.transfer(B, src, attachment=b"x")
            receiver.on_adopt = lambda attachment, addrs: taken.append(addrs)
            assert (await pool.transfer(B, src, attachment=b"x")).sent == 3
            there.check(taken)
            assert there.stats().active == 3

    asyncio.run(scenario())


def test_a_taker_that_refuses_is_heard_at_the_sender() -> None:
    async def scenario() -> None:
        def refuse(attachment: bytes, addrs: Addresses) -> None:
            raise Overloaded("no more requests")

        async with serving("a") as (pool, endpoint, _), serving("b") as (there, receiver, address):
            endpoint.set_peers((member("b", address),))
            receiver.on_adopt = refuse
            src = pool.alloc_mem(4)
            with pytest.raises(Overloaded, match="no more requests"):
                await pool.transfer_with_insert(B, TOKENS, src, NS, attachment=b"x")
            pool.check([src])
            there.check([])
            assert there.stats().aborts[AbortCause.REFUSED] == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("step", ["reserved", "copied"])
def test_a_cancelled_transfer_is_forgotten_by_the_receiver(step: str) -> None:
    async def scenario() -> None:
        running: list[asyncio.Task[Any]] = []

        def cancel(seen: str) -> None:
            if seen == step:
                running[0].cancel()

        async with (
            serving("a", observe=cancel) as (pool, endpoint, _),
            serving("b") as (there, _, address),
        ):
            endpoint.set_peers((member("b", address),))
            src = pool.alloc_mem(4)
            running.append(asyncio.ensure_future(pool.transfer_with_insert(B, TOKENS, src, NS)))
            with pytest.raises(asyncio.CancelledError):
                await running[0]
            await until(lambda: there.stats().incoming == 0)
            assert matched(there) == 0
            pool.check([src])
            there.check([])

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["cancel", "close", "deadline"])
def test_blocks_are_not_free_before_the_copy_has_stopped(end: str) -> None:
    """The copying thread stands still in the middle, while everybody else gives the transfer up."""

    async def scenario() -> None:
        copying, go_on = threading.Event(), threading.Event()

        def stand_still(step: str) -> None:
            if step == "copying":
                copying.set()
                assert go_on.wait(DEADLINE)

        clock = VirtualClock()
        async with (
            serving("a", clock=clock, observe=stand_still, reserve_seconds=0.01) as (pool, endpoint, _),
            serving("b", clock=clock) as (there, _, address),
        ):
            endpoint.set_peers((member("b", address),))
            src = pool.alloc_mem(4)
            sending = asyncio.ensure_future(pool.transfer_with_insert(B, TOKENS, src, NS))
            await until(copying.is_set)
            if end == "cancel":
                sending.cancel()
            elif end == "close":
                endpoint.drop_peer(B, "told to")
            else:
                clock.advance(1.0)
                await until(lambda: all(standing.revoked for standing in there._reservations))
            # A whole exchange with the receiver: whatever it was going to do has been done by now.
            async with raw_peer(address) as (peer, _):
                await peer.call(hello(), 5.0)
                assert there.stats().incoming == 4
            go_on.set()
            with pytest.raises((asyncio.CancelledError, PeerLost, TransferAborted)):
                await sending
            await until(lambda: there.stats().free == 16)
            assert matched(there) == 0
            pool.check([src])

    asyncio.run(scenario())


def test_an_unknown_peer_and_one_that_has_left_are_lost() -> None:
    async def scenario() -> None:
        async with serving("a") as (pool, endpoint, _), serving("b") as (there, _, address):
            src = pool.alloc_mem(4)
            with pytest.raises(PeerLost, match="not a living member"):
                await pool.transfer_with_insert(B, TOKENS, src, NS)
            endpoint.set_peers((member("b", address),))
            await pool.transfer_with_insert(B, TOKENS, src, NS)
            endpoint.set_peers(())
            with pytest.raises(PeerLost, match="not a living member"):
                await pool.transfer_with_insert(B, TOKENS, src, NS)
            there.check([])

    asyncio.run(scenario())


def test_a_death_notice_frees_what_the_peer_had_reserved() -> None:
    async def scenario() -> None:
        async with serving("b") as (pool, endpoint, address), raw_peer(address) as (peer, _):
            endpoint.set_peers((member("raw", fresh_address()),))
            await peer.call(hello(), 5.0)
            await peer.call(reserve(), 5.0)
            endpoint.set_peers(())
            assert pool.stats().free == 16
            await until(lambda: peer.closed)

    asyncio.run(scenario())


def test_many_transfers_at_once_in_both_directions() -> None:
    async def scenario() -> None:
        async with (
            serving("a", blocks=256) as (one, left, address_a),
            serving("b", blocks=256) as (two, right, address_b),
        ):
            left.set_peers((member("b", address_b),))
            right.set_peers((member("a", address_a),))

            async def send(pool: MemPool, peer: str, seed: int) -> None:
                tokens = np.full(len(TOKENS), seed, np.int32)
                src = pool.alloc_mem(4)
                for number in src.blocks.tolist():
                    pool.arena.block_memory(number)[:] = seed
                await pool.transfer_with_insert(InstanceId(peer), tokens, src, NS)
                pool.free_mem(src)

            await asyncio.gather(
                *(send(one, "b", seed) for seed in range(16)),
                *(send(two, "a", seed) for seed in range(16, 32)),
            )
            for pool, seeds in ((two, range(16)), (one, range(16, 32))):
                for seed in seeds:
                    with pool.match(np.full(len(TOKENS), seed, np.int32), NS) as match:
                        blocks = match.addrs.blocks.tolist()
                        assert len(blocks) == 4
                        assert all((pool.arena.block_memory(number) == seed).all() for number in blocks)
                pool.check([])

    asyncio.run(scenario())
