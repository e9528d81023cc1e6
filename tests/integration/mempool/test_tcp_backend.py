"""Blocks over TCP between real processes, and all that can happen to either of them and to the network."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest

from certificates import with_tls
from memserve.core.errors import CorruptBlock, NotAuthenticated, PeerLost, TransferAborted
from memserve.core.types import InstanceId
from memserve.mempool import AbortCause, MemPool, TransferEndpoint
from memserve.wire import Security

from .conftest import DEADLINE, SMALL, peer_process, serving, until
from .peer_process import BIG, NS, SECURITY, fill_blocks, holds_pattern, member, tokens_of
from .proxy import Network, network

pytestmark = pytest.mark.processes
B = InstanceId("b")
TCP = "tcp://127.0.0.1:0"
BLOCKS = 24
"""Nearly nine megabytes: two steps, many chunks."""


@asynccontextmanager
async def receiving(**options: object) -> AsyncIterator[tuple[MemPool, TransferEndpoint]]:
    """A pool here that takes blocks over TCP."""
    limits = {"address": TCP, "security": SECURITY, "backends": ("tcp",)} | options
    async with serving("a", layout=BIG, blocks=64, **limits) as (pool, endpoint, _):
        yield pool, endpoint


@asynccontextmanager
async def receiving_through_a_network(**options: object) -> AsyncIterator[tuple[MemPool, str, Network]]:
    """The same, with a network before the port where the blocks arrive."""
    async with receiving(**options) as (pool, endpoint):
        hello = endpoint._receiver.hello
        assert hello is not None
        async with network(hello.tcp_port) as faults:
            endpoint._receiver.hello = msgspec.structs.replace(hello, tcp_port=faults.port)
            yield pool, endpoint.address, faults


async def is_empty_in_the_end(pool: MemPool) -> None:
    await until(lambda: pool.stats().free == 64)
    with pool.match(tokens_of(1, BLOCKS), NS) as match:
        assert match.tokens == 0
    pool.check([])


@pytest.mark.parametrize("address", ["@", TCP], ids=["unix", "tcp"])
def test_blocks_arrive_in_place_and_only_what_is_missing(address: str) -> None:
    """Whatever carries the messages."""

    async def scenario() -> None:
        where = None if address == "@" else address
        async with receiving(address=where) as (pool, endpoint), peer_process("b", backend="tcp") as peer:
            order = {"name": "a", "address": endpoint.address, "seed": 5}
            assert await peer.do("send", blocks=8, **order) == [0, 8, 8 * BIG.block_bytes]
            assert await peer.do("send", blocks=BLOCKS, **order) == [8, 16, 16 * BIG.block_bytes]
            assert await peer.do("send", blocks=8, **order) == [8, 0, 0]
            with pool.match(tokens_of(5, BLOCKS), NS) as match:
                assert match.tokens == BLOCKS * BIG.block_tokens
                assert holds_pattern(pool, match.addrs, 5)
            pool.check([])

    asyncio.run(scenario())


def test_the_handshake_chooses_by_host_and_by_what_is_allowed() -> None:
    async def scenario() -> None:
        chosen = []
        for backends in (("shm", "tcp"), ("tcp",)):
            async with (
                serving("a", security=SECURITY) as (pool, endpoint, _),
                serving("b", security=SECURITY, backends=backends, address=TCP) as (_, there, _),
            ):
                await endpoint.connect(member("b", there.address))
                src = pool.alloc_mem(2)
                await pool.transfer_with_insert(B, np.arange(32, dtype=np.int32), src, NS)
                (link,) = endpoint.links()
                chosen.append(link.backend)
                assert (link.peer, link.sent, link.sent_bytes) == ("b", 1, 2 * SMALL.block_bytes)
                assert link.under_way_bytes == 0
        assert chosen == ["shm", "tcp"]

    asyncio.run(scenario())


def test_with_certificates_messages_and_blocks_are_encrypted() -> None:
    async def scenario() -> None:
        security = with_tls(SECURITY.cluster_key)
        async with (
            serving("a", layout=BIG, blocks=32, security=security, backends=("tcp",)) as (pool, endpoint, _),
            receiving(security=security) as (there, other),
        ):
            hello = other._receiver.hello
            assert hello is not None
            async with network(hello.tcp_port) as between:
                other._receiver.hello = msgspec.structs.replace(hello, tcp_port=between.port)
                endpoint.set_peers((member("a", other.address),))
                src = pool.alloc_mem(BLOCKS)
                fill_blocks(pool, src, 4)
                done = await pool.transfer_with_insert(InstanceId("a"), tokens_of(4, BLOCKS), src, NS)
                assert done.sent == BLOCKS
                assert between.passed > BLOCKS * BIG.block_bytes
            with there.match(tokens_of(4, BLOCKS), NS) as match:
                assert holds_pattern(there, match.addrs, 4)

    asyncio.run(scenario())


def test_a_strange_certificate_is_refused_when_connecting() -> None:
    async def scenario() -> None:
        strangers = with_tls(SECURITY.cluster_key, "strangers")
        async with (
            serving("a", layout=BIG, security=strangers) as (_, endpoint, _),
            receiving(security=with_tls(SECURITY.cluster_key)) as (_, other),
        ):
            with pytest.raises((NotAuthenticated, PeerLost), match=r"TLS|certificate"):
                await endpoint.connect(member("a", other.address))

    asyncio.run(scenario())


def test_without_a_key_there_is_no_tcp() -> None:
    async def scenario() -> None:
        async with (
            serving("a", security=SECURITY, backends=("tcp",)) as (_, endpoint, _),
            serving("b") as (_, _, address),
        ):
            with pytest.raises(PeerLost, match=r"no way to move blocks to b.*cluster key"):
                await endpoint.connect(member("b", address))

    asyncio.run(scenario())


def test_another_key_is_refused_when_connecting() -> None:
    async def scenario() -> None:
        other = Security(b"the key of another cluster")
        async with (
            serving("a", security=other) as (_, endpoint, _),
            serving("b", security=SECURITY, address=TCP) as (_, there, _),
        ):
            with pytest.raises(NotAuthenticated, match="another cluster key"):
                await endpoint.connect(member("b", there.address))

    asyncio.run(scenario())


@pytest.mark.parametrize(("step", "nth"), [("reserved", 1), ("copying", 1), ("copying", 2), ("copied", 1)])
def test_a_sender_killed_before_it_publishes_leaves_nothing(step: str, nth: int) -> None:
    async def scenario() -> None:
        async with receiving() as (pool, endpoint), peer_process("b", backend="tcp") as peer:
            await peer.do("die_at", step=step, nth=nth)
            assert await peer.do("send", name="a", address=endpoint.address, blocks=BLOCKS, seed=1) is None
            await is_empty_in_the_end(pool)
            assert pool.stats().aborts[AbortCause.SENDER_LOST] == 1

    asyncio.run(scenario())


def test_a_sender_killed_in_the_middle_of_a_chunk_leaves_nothing() -> None:
    async def scenario() -> None:
        async with (
            receiving_through_a_network() as (pool, address, faults),
            peer_process("b", backend="tcp") as peer,
        ):
            faults.stall = True
            sending = asyncio.ensure_future(peer.do("send", name="a", address=address, blocks=BLOCKS, seed=1))
            await until(faults.stalled.is_set)
            assert pool.stats().incoming == BLOCKS
            peer.process.kill()
            assert await sending is None
            await is_empty_in_the_end(pool)

    asyncio.run(scenario())


@pytest.mark.parametrize(("step", "nth"), [("reserved", 1), ("copying", 2), ("copied", 1)])
def test_a_receiver_killed_at_any_step_is_a_lost_peer(step: str, nth: int) -> None:
    async def scenario() -> None:
        left = [nth]

        def kill(seen: str) -> None:
            if seen == step:
                left[0] -= 1
                if left[0] == 0:
                    peer.process.send_signal(signal.SIGKILL)

        async with peer_process("b", backend="tcp") as peer, receiving(observe=kill) as (pool, endpoint):
            endpoint.set_peers((member("b", peer.address),))
            src = pool.alloc_mem(BLOCKS)
            fill_blocks(pool, src, 2)
            with pytest.raises(PeerLost):
                await pool.transfer_with_insert(B, tokens_of(2, BLOCKS), src, NS)
            pool.check([src])
            assert endpoint.links() == ()

    asyncio.run(scenario())


def test_a_cut_connection_fails_the_transfer_and_the_next_one_reconnects() -> None:
    async def scenario() -> None:
        async with (
            receiving_through_a_network() as (pool, address, faults),
            peer_process("b", backend="tcp") as peer,
        ):
            faults.cut = True
            order = {"name": "a", "address": address, "blocks": BLOCKS, "seed": 1}
            answer = await peer.do("send", **order)
            assert isinstance(answer, dict)
            assert answer["error"] == "PeerLost"
            await is_empty_in_the_end(pool)
            faults.cut = False
            assert await peer.do("send", **order) == [0, BLOCKS, BLOCKS * BIG.block_bytes]
            with pool.match(tokens_of(1, BLOCKS), NS) as match:
                assert holds_pattern(pool, match.addrs, 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("limits", [{"call_seconds": 0.2}, {}], ids=["receiver", "deadline"])
def test_a_network_that_stands_still_ends_at_a_deadline(limits: dict[str, float]) -> None:
    """The receiver's patience with a stream, and the sender's deadline without progress."""

    async def scenario() -> None:
        async with (
            receiving_through_a_network(**limits) as (pool, address, faults),
            peer_process("b", backend="tcp", reserve_seconds=0.3) as peer,
        ):
            faults.stall = True
            answer = await peer.do("send", name="a", address=address, blocks=BLOCKS, seed=1)
            assert isinstance(answer, dict)
            assert answer["error"] in ("PeerLost", "LeaseExpired", "TransferAborted")
            await is_empty_in_the_end(pool)

    asyncio.run(scenario())


@pytest.mark.parametrize("at", [-1, 0], ids=["block", "header"])
def test_a_byte_flipped_on_the_way_is_found(at: int) -> None:
    """In a block: it is sent again. In a chunk's header: nobody knows where the next one begins."""

    async def scenario() -> None:
        async with (
            receiving_through_a_network() as (pool, address, faults),
            peer_process("b", backend="tcp") as peer,
        ):
            # The handshake is shorter; then comes a piece that begins with the first chunk's header.
            faults.spare = 1 << 10
            faults.flip = at
            order = {"name": "a", "address": address, "blocks": 1, "seed": 1}
            answer = await peer.do("send", **order)
            assert faults.flip is None
            if at == 0:
                assert isinstance(answer, dict)
                assert answer["error"] == "PeerLost"
                await is_empty_in_the_end(pool)
                answer = await peer.do("send", **order)
            else:
                assert pool.stats().aborts[AbortCause.CORRUPT] == 1
            assert answer == [0, 1, BIG.block_bytes]
            with pool.match(tokens_of(1, 1), NS) as match:
                assert holds_pattern(pool, match.addrs, 1)
            pool.check([])

    asyncio.run(scenario())


def test_memory_that_changes_after_it_was_read_is_never_published() -> None:
    """Source blocks that somebody overwrites during the transfer arrive as corrupt, not as mixed KV."""

    async def scenario() -> None:
        def scribble(step: str) -> None:
            if step == "copied":
                for number in range(there.blocks):
                    there.arena.block_memory(number)[:] ^= 1

        async with (
            serving("a", observe=scribble, security=SECURITY, backends=("shm",)) as (pool, endpoint, _),
            serving("b", security=SECURITY) as (there, _, address),
        ):
            endpoint.set_peers((member("b", address),))
            src = pool.alloc_mem(2)
            with pytest.raises(CorruptBlock):
                await pool.transfer_with_insert(B, np.arange(32, dtype=np.int32), src, NS)
            there.check([])

    asyncio.run(scenario())


def test_a_cancelled_transfer_leaves_the_stream_usable() -> None:
    async def scenario() -> None:
        async with peer_process("b", backend="tcp") as peer:
            running: list[asyncio.Task[object]] = []
            loop = asyncio.get_running_loop()

            def cancel(step: str) -> None:
                if step == "copying" and running:
                    loop.call_soon_threadsafe(running.pop().cancel)

            async with receiving(observe=cancel) as (pool, endpoint):
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


def test_a_link_carries_no_more_at_once_than_it_may() -> None:
    async def scenario() -> None:
        most = 0

        def look(step: str) -> None:
            nonlocal most
            if step == "reserved":
                most = max(most, endpoint.links()[0].under_way_bytes)

        async with (
            serving(
                "a", observe=look, security=SECURITY, backends=("tcp",), link_bytes=5 * SMALL.block_bytes
            ) as (pool, endpoint, _),
            serving("b", security=SECURITY, blocks=64) as (there, _, address),
        ):
            endpoint.set_peers((member("b", address),))
            src = pool.alloc_mem(2)
            prompts = [np.full(32, seed, np.int32) for seed in range(20)]
            async with asyncio.timeout(DEADLINE):
                await asyncio.gather(*(pool.transfer_with_insert(B, one, src, NS) for one in prompts))
            assert most == 4 * SMALL.block_bytes
            assert there.stats().received == 20
            there.check([])

    asyncio.run(scenario())
