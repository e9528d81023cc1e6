"""Each message of a transfer lost, doubled, overtaken, or late beyond the deadline, in each mode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from memserve.core.errors import CorruptBlock, MemServeError, PeerLost, PeerOutOfBlocks, StaleAddress
from memserve.core.types import InstanceId
from memserve.mempool import AbortCause, Addresses, Arrangement, MemPool, TransferEndpoint, TransferMode

from .conftest import DEADLINE, serving, until
from .message_proxy import Line, line_to
from .peer_process import LAYOUTS, NS, SECURITY, fill_blocks, holds_pattern, member, tokens_of

B = InstanceId("b")
BLOCKS = 24
"""Nearly nine megabytes: more than one step, so there is something to announce."""
PATIENCE = 0.3
MODES = [
    (Arrangement.AGGREGATED, TransferMode.BY_LAYER),
    (Arrangement.AGGREGATED, TransferMode.BY_REQUEST_AGGREGATED),
    (Arrangement.DISCRETE, TransferMode.BY_REQUEST),
]
each_way = pytest.mark.parametrize("backend", ["shm", "tcp"])
each_mode = pytest.mark.parametrize(("arrangement", "mode"), MODES)
each_message = pytest.mark.parametrize("message", ["Reserve", "Reserved", "Copied", "Publish", "Published"])


@asynccontextmanager
async def two_pools(
    backend: str, arrangement: Arrangement, *, room: int = 64, **options: object
) -> AsyncIterator[tuple[MemPool, TransferEndpoint, MemPool, Line]]:
    """A pool that sends, one that receives, and the line between them."""
    limits = {"security": SECURITY, "backends": (backend,)}
    async with (
        serving("b", layout=LAYOUTS[arrangement], blocks=room, **limits) as (there, _, address),
        line_to(address) as line,
        serving("a", layout=LAYOUTS[arrangement], blocks=64, **limits, **options) as (pool, endpoint, _),
    ):
        endpoint.set_peers((member("b", line.address),))
        await endpoint.connect(member("b", line.address))
        yield pool, endpoint, there, line


async def send(pool: MemPool, src: Addresses, mode: TransferMode, seed: int = 1) -> int:
    async with asyncio.timeout(DEADLINE):
        return (await pool.transfer_with_insert(B, tokens_of(seed, BLOCKS), src, NS, mode=mode)).sent


def filled(pool: MemPool, seed: int = 1) -> Addresses:
    src = pool.alloc_mem(BLOCKS)
    fill_blocks(pool, src, seed)
    return src


def right_or_nothing(pool: MemPool, seed: int = 1) -> int:
    """How many blocks can be found; they hold what they should."""
    with pool.match(tokens_of(seed, BLOCKS), NS) as match:
        assert holds_pattern(pool, match.addrs, seed)
        return len(match.addrs)


@each_way
@each_mode
@each_message
@pytest.mark.parametrize("fault", ["lose", "late"])
def test_a_message_that_does_not_come_in_time_leaves_nothing_behind(
    backend: str, arrangement: Arrangement, mode: TransferMode, message: str, fault: str
) -> None:
    if (backend, message) == ("tcp", "Copied"):
        pytest.skip("a stream announces nothing")

    async def scenario() -> None:
        async with two_pools(backend, arrangement, call_seconds=PATIENCE) as (pool, _, there, line):
            src = filled(pool)
            line.fault, line.strikes = fault, message
            if message == "Copied":
                assert await send(pool, src, mode) == BLOCKS
            else:
                with pytest.raises(PeerLost, match="did not answer"):
                    await send(pool, src, mode)
            assert line.struck.is_set()
            line.release.set()
            await until(lambda: there.stats().incoming == 0)
            published = message in ("Copied", "Published")
            assert right_or_nothing(there) == (BLOCKS if published else 0)
            there.check([])
            assert await send(pool, src, mode) == (0 if published else BLOCKS)
            assert right_or_nothing(there) == BLOCKS
            there.check([])
            pool.check([src])

    asyncio.run(scenario())


@each_way
@each_mode
@each_message
@pytest.mark.parametrize("fault", ["double", "overtaken"])
def test_a_message_that_comes_twice_or_out_of_order_changes_nothing(
    backend: str, arrangement: Arrangement, mode: TransferMode, message: str, fault: str
) -> None:
    """Two transfers at once, so that there is something to overtake."""
    if (backend, message) == ("tcp", "Copied"):
        pytest.skip("a stream announces nothing")

    async def scenario() -> None:
        async with two_pools(backend, arrangement) as (pool, _, there, line):
            one, two = filled(pool), filled(pool, 2)
            line.fault, line.strikes = fault, message
            sending = asyncio.gather(send(pool, one, mode), send(pool, two, mode, 2))
            async with asyncio.timeout(DEADLINE):
                await line.struck.wait()
                if message.startswith("Publish"):
                    # The other transfer may be over already; then nothing comes any more.
                    line.release.set()
                assert await sending == [BLOCKS, BLOCKS]
            await until(lambda: there.stats().incoming == 0)
            assert (right_or_nothing(there), right_or_nothing(there, 2)) == (BLOCKS, BLOCKS)
            assert there.stats().received == 2
            assert not any(there.stats().aborts.values())
            there.check([])
            pool.check([one, two])

    asyncio.run(scenario())


@each_way
@each_mode
def test_a_full_receiver_keeps_nothing(backend: str, arrangement: Arrangement, mode: TransferMode) -> None:
    async def scenario() -> None:
        async with two_pools(backend, arrangement, room=BLOCKS) as (pool, _, there, _):
            src, kept = filled(pool), there.alloc_mem(1)
            with pytest.raises(PeerOutOfBlocks, match="24 blocks asked for; 23 free"):
                await send(pool, src, mode)
            there.check([kept])
            there.free_mem(kept)
            assert await send(pool, src, mode) == BLOCKS
            assert right_or_nothing(there) == BLOCKS
            pool.check([src])
            there.check([])

    asyncio.run(scenario())


@each_mode
@pytest.mark.parametrize("flips", [1, 2])
def test_one_flipped_byte_in_one_unit_is_found(
    arrangement: Arrangement, mode: TransferMode, flips: int
) -> None:
    """Once: it is sent again. Twice: nothing is published."""
    # Few enough that nothing is verified before the publication.
    blocks, tokens = 2, tokens_of(1, 2)

    async def scenario() -> None:
        left = [flips]

        def flip(step: str) -> None:
            if step == "copied" and left[0]:
                left[0] -= 1
                (standing,) = there._reservations
                there.arena.block_memory(int(standing.fresh.blocks[1]))[..., 5 * left[0]] ^= 1

        async with two_pools("shm", arrangement, observe=flip) as (pool, _, there, _):
            src = filled(pool)
            if flips == 1:
                assert (await pool.transfer_with_insert(B, tokens, src, NS, mode=mode)).sent == blocks
            else:
                with pytest.raises(CorruptBlock, match="arrived with wrong bytes"):
                    await pool.transfer_with_insert(B, tokens, src, NS, mode=mode)
            assert right_or_nothing(there) == (blocks if flips == 1 else 0)
            assert there.stats().aborts[AbortCause.CORRUPT] == flips
            there.check([])
            pool.check([src])

    asyncio.run(scenario())


# --- blocks on a peer ---------------------------------------------------------------------------------


@each_way
@each_mode
def test_chosen_blocks_are_written_published_and_given_back(
    backend: str, arrangement: Arrangement, mode: TransferMode
) -> None:
    async def scenario() -> None:
        async with two_pools(backend, arrangement) as (pool, _, there, _):
            src, dst = filled(pool), await pool.alloc_peer_mem(B, BLOCKS)
            assert (dst.instance, there.stats().lent) == (B, BLOCKS)
            assert (await pool.transfer(B, src, dst=dst, mode=mode)).sent == BLOCKS
            assert holds_pattern(there, dst, 1)
            assert right_or_nothing(there) == 0
            done = await pool.transfer_with_insert(B, tokens_of(1, BLOCKS), src, NS, dst=dst, mode=mode)
            assert done.sent == BLOCKS
            assert right_or_nothing(there) == BLOCKS
            freed = await pool.free_peer_mem(dst)
            assert (freed.freed, freed.stale) == (BLOCKS, 0)
            assert (await pool.free_peer_mem(dst)).stale == BLOCKS
            assert (there.stats().historical, there.stats().lent) == (BLOCKS, 0)
            with pytest.raises(MemServeError, match="not lent to a"):
                await pool.transfer(B, src, dst=dst, mode=mode)
            there.check([])
            pool.check([src])

    asyncio.run(scenario())


@pytest.mark.parametrize("message", ["Allocate", "Allocated", "GiveBack", "GivenBack"])
@pytest.mark.parametrize("fault", ["lose", "double", "late"])
def test_a_loan_survives_no_longer_than_it_may(message: str, fault: str) -> None:
    """Whatever became of the messages about it, its blocks are free in the end."""

    async def scenario() -> None:
        options = {"call_seconds": PATIENCE} if fault != "double" else {}
        async with two_pools("shm", Arrangement.AGGREGATED, **options) as (pool, _, there, line):
            line.fault, line.strikes = fault, message
            try:
                lent = await pool.alloc_peer_mem(B, 4, seconds=0.5)
                assert (await pool.free_peer_mem(lent)).freed == 4
            except PeerLost:
                assert fault != "double"
            assert line.struck.is_set()
            line.release.set()
            await until(lambda: there.stats().free == 64)
            there.check([])

    asyncio.run(scenario())


def test_blocks_of_a_peer_that_was_restarted_are_refused() -> None:
    async def scenario() -> None:
        layout = LAYOUTS[Arrangement.AGGREGATED]
        async with serving("a", layout=layout, blocks=64) as (pool, endpoint, _):
            src = filled(pool)
            async with serving("b", layout=layout, blocks=64) as (_, _, address):
                endpoint.set_peers((member("b", address),))
                dst = await pool.alloc_peer_mem(B, BLOCKS)
            async with serving("b", layout=layout, blocks=64, incarnation=2) as (there, _, address):
                endpoint.set_peers((member("b", address, 2),))
                own = there.alloc_mem(BLOCKS)
                fill_blocks(there, own, 9)
                with pytest.raises(StaleAddress, match=r"b \(incarnation 1\) mean nothing to b"):
                    await pool.transfer(B, src, dst=dst)
                assert (await pool.free_peer_mem(dst)).stale == BLOCKS
                assert holds_pattern(there, own, 9)
                there.check([own])
                there.free_mem(own)
            pool.check([src])

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["died", "time"])
def test_a_borrower_that_is_gone_gets_nothing_any_more(end: str) -> None:
    async def scenario() -> None:
        layout = LAYOUTS[Arrangement.AGGREGATED]
        async with serving("b", layout=layout, blocks=64) as (there, other, address):
            async with serving("a", layout=layout, blocks=8) as (pool, endpoint, own):
                other.set_peers((member("a", own),))
                endpoint.set_peers((member("b", address),))
                await pool.alloc_peer_mem(B, BLOCKS, seconds=0.2 if end == "time" else 600.0)
            if end == "died":
                assert there.stats().lent == BLOCKS
                other.set_peers(())
                assert there.stats().free == 64
            await until(lambda: there.stats().free == 64)
            there.check([])

    asyncio.run(scenario())
