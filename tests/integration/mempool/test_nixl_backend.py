"""Blocks over NIXL between real processes. Needs the package; both of UCX's ways on one host are tried."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from memserve.core.errors import CorruptBlock, PeerLost, TransferAborted
from memserve.core.types import InstanceId
from memserve.mempool import AbortCause, MemPool, Tier, TransferEndpoint

from .conftest import SMALL, needs_nixl, peer_process, serving, until
from .peer_process import BIG, NS, SECURITY, fill_blocks, holds_pattern, member, tokens_of

pytestmark = [pytest.mark.processes, needs_nixl]
B = InstanceId("b")
BLOCKS = 48
"""Seventeen megabytes: three steps."""


@pytest.fixture(params=["all", "tcp"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What UCX may use: one process copying from another on this host, or sockets as between hosts."""
    monkeypatch.setenv("UCX_TLS", request.param)
    return str(request.param)


@asynccontextmanager
async def pool_here(**options: object) -> AsyncIterator[tuple[MemPool, TransferEndpoint]]:
    limits = {"security": SECURITY, "backends": ("nixl",)} | options
    async with serving("a", layout=BIG, blocks=64, **limits) as (pool, endpoint, _):
        yield pool, endpoint


async def is_empty_in_the_end(pool: MemPool) -> None:
    await until(lambda: pool.stats().free == 64)
    with pool.match(tokens_of(1, BLOCKS), NS) as match:
        assert match.tokens == 0
    pool.check([])


def call_at(step: str, nth: int, call: Callable[[], None]) -> Callable[[str], None]:
    left = [nth]

    def observe(seen: str) -> None:
        if seen == step:
            left[0] -= 1
            if left[0] == 0:
                call()

    return observe


def test_blocks_arrive_in_place_and_only_what_is_missing() -> None:
    async def scenario() -> None:
        async with pool_here() as (pool, endpoint), peer_process("b", backend="nixl") as peer:
            order = {"name": "a", "address": endpoint.address, "seed": 5}
            assert await peer.do("send", blocks=8, **order) == [0, 8, 8 * BIG.block_bytes]
            assert await peer.do("send", blocks=BLOCKS, **order) == [8, 40, 40 * BIG.block_bytes]
            assert await peer.do("send", blocks=8, **order) == [8, 0, 0]
            with pool.match(tokens_of(5, BLOCKS), NS) as match:
                assert match.tokens == BLOCKS * BIG.block_tokens
                assert holds_pattern(pool, match.addrs, 5)
            pool.check([])

    asyncio.run(scenario())


def test_two_pools_send_to_each_other() -> None:
    async def scenario() -> None:
        async with pool_here() as (pool, endpoint), peer_process("b", backend="nixl") as peer:
            endpoint.set_peers((member("b", peer.address),))
            src = pool.alloc_mem(BLOCKS)
            fill_blocks(pool, src, 7)
            there, back = await asyncio.gather(
                pool.transfer_with_insert(B, tokens_of(7, BLOCKS), src, NS),
                peer.do("send", name="a", address=endpoint.address, blocks=8, seed=6),
            )
            assert (there.sent, back) == (BLOCKS, [0, 8, 8 * BIG.block_bytes])
            assert [link.backend for link in endpoint.links()] == ["nixl"]
            assert await peer.do("look", blocks=BLOCKS, seed=7) == [BLOCKS, 1]
            with pool.match(tokens_of(6, 8), NS) as match:
                assert holds_pattern(pool, match.addrs, 6)
            pool.check([src])

    asyncio.run(scenario())


def test_pools_that_grow_and_shrink_and_grow_go_on_exchanging_blocks() -> None:
    async def scenario() -> None:
        async with (
            pool_here() as (pool, endpoint),
            serving("b", layout=BIG, blocks=8, backends=("nixl",)) as (there, _, address),
        ):
            endpoint.set_peers((member("b", address),))
            for seed, blocks in enumerate((8, 32, 8, 64)):
                pool.resize(Tier.DEVICE, 2 * blocks)
                there.resize(Tier.DEVICE, blocks)
                src = pool.alloc_mem(blocks)
                fill_blocks(pool, src, seed)
                done = await pool.transfer_with_insert(B, tokens_of(seed, blocks), src, NS)
                assert done.sent == blocks
                with there.match(tokens_of(seed, blocks), NS) as match:
                    assert match.tokens == blocks * BIG.block_tokens
                    assert holds_pattern(there, match.addrs, seed)
                pool.free_mem(src)
                there.check([])
            assert [link.sent for link in endpoint.links()] == [4]

    asyncio.run(scenario())


@pytest.mark.parametrize(("step", "nth"), [("reserved", 1), ("copying", 1), ("copying", 3), ("copied", 1)])
def test_a_sender_killed_before_it_publishes_leaves_nothing(step: str, nth: int) -> None:
    async def scenario() -> None:
        async with pool_here() as (pool, endpoint):
            order = {"name": "a", "address": endpoint.address, "blocks": BLOCKS, "seed": 1}
            async with peer_process("b", backend="nixl") as peer:
                await peer.do("die_at", step=step, nth=nth)
                assert await peer.do("send", **order) is None
                await is_empty_in_the_end(pool)
                assert pool.stats().aborts[AbortCause.SENDER_LOST] == 1
            async with peer_process("b", backend="nixl", incarnation=2) as peer:
                assert await peer.do("send", **order) == [0, BLOCKS, BLOCKS * BIG.block_bytes]
                with pool.match(tokens_of(1, BLOCKS), NS) as match:
                    assert holds_pattern(pool, match.addrs, 1)

    asyncio.run(scenario())


def test_peers_that_wrote_beside_a_lost_sender_connect_again() -> None:
    """Its loss ends the agent that all of them wrote to."""

    async def scenario() -> None:
        async with (
            pool_here() as (pool, endpoint),
            peer_process("b", backend="nixl") as peer,
            peer_process("c", backend="nixl") as other,
        ):
            order = {"name": "a", "address": endpoint.address}
            assert await other.do("send", blocks=2, seed=3, **order) == [0, 2, 2 * BIG.block_bytes]
            target = endpoint._receiver.nixl
            assert target is not None
            known = await target.current()
            await peer.do("die_at", step="copied")
            assert await peer.do("send", blocks=8, seed=1, **order) is None
            await until(lambda: known.closed and pool.stats().incoming == 0)
            assert await other.do("send", blocks=8, seed=2, **order) == [0, 8, 8 * BIG.block_bytes]
            with pool.match(tokens_of(2, 8), NS) as match:
                assert holds_pattern(pool, match.addrs, 2)
            pool.check([])

    asyncio.run(scenario())


@pytest.mark.parametrize(("step", "nth"), [("reserved", 1), ("copying", 2), ("copied", 1)])
def test_a_receiver_killed_at_any_step_is_a_lost_peer(step: str, nth: int) -> None:
    async def scenario() -> None:
        async with peer_process("b", backend="nixl") as peer:
            kill = call_at(step, nth, lambda: peer.process.send_signal(signal.SIGKILL))
            async with pool_here(observe=kill) as (pool, endpoint):
                endpoint.set_peers((member("b", peer.address),))
                src = pool.alloc_mem(BLOCKS)
                with pytest.raises(PeerLost):
                    await pool.transfer_with_insert(B, tokens_of(2, BLOCKS), src, NS)
                pool.check([src])
                assert endpoint.links() == ()

    asyncio.run(scenario())


@pytest.mark.parametrize("step", ["reserved", "copying"])
def test_a_frozen_receiver_ends_at_a_deadline_and_is_reached_again(step: str) -> None:
    async def scenario() -> None:
        async with peer_process("b", backend="nixl", blocks=3 * BLOCKS) as peer:
            freeze = call_at(step, 1, lambda: peer.process.send_signal(signal.SIGSTOP))
            async with pool_here(observe=freeze, call_seconds=0.5) as (pool, endpoint):
                endpoint.set_peers((member("b", peer.address),))
                src = pool.alloc_mem(BLOCKS)
                fill_blocks(pool, src, 2)
                tokens = tokens_of(2, BLOCKS)
                with pytest.raises(PeerLost):
                    await pool.transfer_with_insert(B, tokens, src, NS)
                await until(lambda: endpoint.links() == ())
                peer.process.send_signal(signal.SIGCONT)
                assert await peer.do("look", blocks=BLOCKS, seed=2) in ([0, 1], [BLOCKS, 1])
                done = await pool.transfer_with_insert(B, tokens, src, NS)
                assert done.held + done.sent == BLOCKS
                assert await peer.do("look", blocks=BLOCKS, seed=2) == [BLOCKS, 1]

    asyncio.run(scenario())


def test_a_peer_restarted_under_the_same_name_is_written_with_its_own_metadata() -> None:
    async def scenario() -> None:
        async with pool_here() as (pool, endpoint):
            src = pool.alloc_mem(BLOCKS)
            for incarnation in (1, 2):
                async with peer_process("b", backend="nixl", incarnation=incarnation) as peer:
                    endpoint.set_peers((member("b", peer.address, incarnation),))
                    fill_blocks(pool, src, incarnation)
                    tokens = tokens_of(incarnation, BLOCKS)
                    done = await pool.transfer_with_insert(B, tokens, src, NS)
                    assert done.sent == BLOCKS
                    assert await peer.do("look", blocks=BLOCKS, seed=incarnation) == [BLOCKS, 1]
            with pytest.raises(PeerLost):
                await pool.transfer_with_insert(B, tokens_of(3, BLOCKS), src, NS)

    asyncio.run(scenario())


def test_a_byte_that_changes_on_the_way_is_found() -> None:
    async def scenario() -> None:
        flips = [1, 1]

        def flip(step: str) -> None:
            if step == "copied" and flips:
                flips.pop()
                for number in range(there.blocks):
                    there.arena.block_memory(number)[100] ^= 1

        async with (
            pool_here(observe=flip) as (pool, endpoint),
            serving("b", layout=BIG, backends=("nixl",)) as (there, _, address),
        ):
            endpoint.set_peers((member("b", address),))
            src = pool.alloc_mem(2)
            fill_blocks(pool, src, 4)
            with pytest.raises(CorruptBlock):
                await pool.transfer_with_insert(B, tokens_of(4, 2), src, NS)
            assert there.stats().aborts[AbortCause.CORRUPT] == 2
            there.check([])
            done = await pool.transfer_with_insert(B, tokens_of(4, 2), src, NS)
            assert done.sent == 2

    asyncio.run(scenario())


def test_a_cancelled_transfer_leaves_the_link_usable() -> None:
    async def scenario() -> None:
        async with peer_process("b", backend="nixl", blocks=3 * BLOCKS) as peer:
            running: list[asyncio.Task[object]] = []
            loop = asyncio.get_running_loop()

            def cancel(step: str) -> None:
                if step == "copying" and running:
                    loop.call_soon_threadsafe(running.pop().cancel)

            async with pool_here(observe=cancel) as (pool, endpoint):
                endpoint.set_peers((member("b", peer.address),))
                src = pool.alloc_mem(BLOCKS)
                fill_blocks(pool, src, 2)
                tokens = tokens_of(2, BLOCKS)
                task = asyncio.ensure_future(pool.transfer_with_insert(B, tokens, src, NS))
                running.append(task)
                with pytest.raises((asyncio.CancelledError, TransferAborted)):
                    await task
                done = await pool.transfer_with_insert(B, tokens, src, NS)
                assert done.sent == BLOCKS
                assert await peer.do("look", blocks=BLOCKS, seed=2) == [BLOCKS, 1]
                assert len(endpoint.links()) == 1

    asyncio.run(scenario())


def test_many_transfers_at_once_share_a_link() -> None:
    async def scenario() -> None:
        async with (
            serving("a", backends=("nixl",)) as (pool, endpoint, _),
            serving("b", blocks=64, backends=("nixl",)) as (there, _, address),
        ):
            endpoint.set_peers((member("b", address),))
            src = pool.alloc_mem(2)
            prompts = [np.full(2 * SMALL.block_tokens, seed, np.int32) for seed in range(20)]
            await asyncio.gather(*(pool.transfer_with_insert(B, one, src, NS) for one in prompts))
            assert there.stats().received == 20
            there.check([])

    asyncio.run(scenario())
