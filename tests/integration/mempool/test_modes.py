"""Every mode over every way between two real processes, layers that are still being computed, and deaths."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from memserve.core.errors import InvalidRequest, PeerLost, TransferAborted
from memserve.core.types import InstanceId
from memserve.mempool import (
    AbortCause,
    Arrangement,
    KVLayout,
    LayerGate,
    LinkTraffic,
    MemPool,
    TransferEndpoint,
    TransferMode,
)

from .conftest import DEADLINE, PeerProcess, needs_nixl, peer_process, serving, until
from .peer_process import LAYOUTS, NS, SECURITY, fill_blocks, holds_pattern, member, tokens_of

pytestmark = pytest.mark.processes
A, B = InstanceId("a"), InstanceId("b")
BLOCKS = 24
"""Nearly nine megabytes: more than one step."""
PIECES = KVLayout("small", layers=2, kv_heads=1, head_dim=64, arrangement=Arrangement.DISCRETE)
MODES = [
    (Arrangement.AGGREGATED, TransferMode.BY_LAYER),
    (Arrangement.AGGREGATED, TransferMode.BY_REQUEST),
    (Arrangement.AGGREGATED, TransferMode.BY_REQUEST_AGGREGATED),
    (Arrangement.DISCRETE, TransferMode.BY_LAYER),
    (Arrangement.DISCRETE, TransferMode.BY_REQUEST),
]
each_way = pytest.mark.parametrize("backend", ["shm", "tcp", pytest.param("nixl", marks=needs_nixl)])
each_mode = pytest.mark.parametrize(("arrangement", "mode"), MODES)


@asynccontextmanager
async def pair(
    backend: str, arrangement: Arrangement, **options: object
) -> AsyncIterator[tuple[MemPool, TransferEndpoint, PeerProcess]]:
    """A pool here, and one in a process of its own; they know each other's names."""
    limits = {"security": SECURITY, "backends": (backend,)} | options
    async with (
        peer_process("b", backend=backend, arrangement=arrangement) as peer,
        serving("a", layout=LAYOUTS[arrangement], blocks=64, **limits) as (pool, endpoint, _),
    ):
        endpoint.set_peers((member("b", peer.address),))
        yield pool, endpoint, peer


@each_way
@each_mode
@pytest.mark.parametrize("gated", [False, True], ids=["computed", "computing"])
def test_the_bytes_are_right_and_only_what_is_missing_goes(
    backend: str, arrangement: Arrangement, mode: TransferMode, gated: bool
) -> None:
    async def scenario() -> None:
        async with pair(backend, arrangement) as (pool, endpoint, peer):
            size = pool.layout.block_bytes
            details = {"mode": mode.value, "layers": pool.layout.layers} if gated else {"mode": mode.value}
            order = {"name": "a", "address": endpoint.address, "seed": 5} | details
            assert await peer.do("send", blocks=8, **order) == [0, 8, 8 * size]
            assert await peer.do("send", blocks=BLOCKS, **order) == [8, BLOCKS - 8, (BLOCKS - 8) * size]
            assert await peer.do("send", blocks=BLOCKS, **order) == [BLOCKS, 0, 0]
            with pool.match(tokens_of(5, BLOCKS), NS) as match:
                assert match.tokens == BLOCKS * pool.layout.block_tokens
                assert holds_pattern(pool, match.addrs, 5)
            pool.check([])

    asyncio.run(scenario())


@each_way
@each_mode
def test_what_was_decided_is_recorded(backend: str, arrangement: Arrangement, mode: TransferMode) -> None:
    async def scenario() -> None:
        async with pair(backend, arrangement) as (pool, _, peer):
            src = pool.alloc_mem(4)
            fill_blocks(pool, src, 7)
            done = await pool.transfer_with_insert(B, tokens_of(7, 4), src, NS, mode=mode)
            assert (done.mode, done.backend, done.sent) == (mode, backend, 4)
            assert await peer.do("look", blocks=4, seed=7) == [4, 1]
            layers, whole = pool.layout.layers, arrangement is Arrangement.AGGREGATED
            # The blocks are neighbours on both sides, so all pieces of a kind are one; but a chunk of a
            # stream has an end, and a whole block is more than half of one.
            pieces = 2 * layers if not whole else 4 * layers if mode is TransferMode.BY_LAYER else 1
            chunks = 4 if backend == "tcp" else 1
            assert pieces <= done.calls < pieces + chunks
            traffic = LinkTraffic(B, backend, mode, 1, done.bytes, done.calls)
            assert pool.stats().traffic == (traffic,)
            counters = pool.stats().counters()
            assert counters[f"pool_sent_bytes_{backend}_{mode}"] == done.bytes
            assert counters[f"pool_sent_calls_{backend}_{mode}"] == done.calls

    asyncio.run(scenario())


def test_whole_blocks_of_a_discrete_layout_are_refused_before_anything_happens() -> None:
    async def scenario() -> None:
        async with serving("a", layout=PIECES) as (pool, _, _):
            src = pool.alloc_mem(1)
            with pytest.raises(InvalidRequest, match="use by_request"):
                await pool.transfer_with_insert(
                    B, tokens_of(1, 1), src, NS, mode=TransferMode.BY_REQUEST_AGGREGATED
                )
            pool.check([src])

    asyncio.run(scenario())


# --- layers that are being computed ------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("arrangement", list(Arrangement))
def test_a_layer_travels_when_it_is_computed_and_not_before(backend: str, arrangement: Arrangement) -> None:
    """A producer's thread writes a layer, opens the gate, and waits until that layer has gone."""

    async def scenario() -> None:
        computed = threading.Semaphore(0)

        def observe(step: str) -> None:
            if step == "copying":
                computed.release()

        def compute() -> None:
            for layer in range(layers):
                for at, number in enumerate(src.blocks.tolist()):
                    memory = pool.arena.block_memory(number)
                    halves = memory.reshape(layers, -1)[layer] if whole else memory[2 * layer : 2 * layer + 2]
                    halves[:] = wanted[at].reshape(layers, -1)[layer].reshape(halves.shape)
                gate.open(layer + 1)
                assert computed.acquire(timeout=DEADLINE)

        async with pair(backend, arrangement, observe=observe) as (pool, _, peer):
            layers, whole = pool.layout.layers, arrangement is Arrangement.AGGREGATED
            src, gate = pool.alloc_mem(4), LayerGate()
            fill_blocks(pool, src, 6)
            wanted = [pool.arena.block_memory(number).copy() for number in src.blocks.tolist()]
            for number in src.blocks.tolist():
                pool.arena.block_memory(number)[:] = 0
            producer = asyncio.get_running_loop().run_in_executor(None, compute)
            done = await pool.transfer_with_insert(
                B, tokens_of(6, 4), src, NS, mode=TransferMode.BY_LAYER, ready=gate
            )
            async with asyncio.timeout(DEADLINE):
                await producer
            assert done.sent == 4
            assert await peer.do("look", blocks=4, seed=6) == [4, 1]

    asyncio.run(scenario())


@each_way
@each_mode
@pytest.mark.parametrize("how", ["fails", "never comes", "cancelled", "peer killed"])
def test_a_producer_that_does_not_finish_costs_no_block(
    backend: str, arrangement: Arrangement, mode: TransferMode, how: str
) -> None:
    async def scenario() -> None:
        waits = asyncio.Event()
        loop = asyncio.get_running_loop()
        seconds = 0.3 if how == "never comes" else 30.0

        def observe(step: str) -> None:
            if step == "reserved":
                loop.call_soon_threadsafe(waits.set)

        async with pair(backend, arrangement, observe=observe, reserve_seconds=seconds) as (pool, _, peer):
            src, gate = pool.alloc_mem(4), LayerGate()
            gate.open(1)
            sending = asyncio.ensure_future(
                pool.transfer_with_insert(B, tokens_of(1, 4), src, NS, mode=mode, ready=gate)
            )
            async with asyncio.timeout(DEADLINE):
                await waits.wait()
                if how == "fails":
                    gate.fail("a step failed")
                elif how == "cancelled":
                    sending.cancel()
                elif how == "peer killed":
                    peer.process.kill()
                with pytest.raises((TransferAborted, PeerLost, asyncio.CancelledError)) as caught:
                    await sending
            if how == "peer killed":
                assert isinstance(caught.value, PeerLost)
            elif how != "cancelled":
                why = "was not computed: a step failed" if how == "fails" else "has waited for"
                assert why in str(caught.value)
            pool.check([src])
            if how != "peer killed":
                await nothing_incoming(peer)
                assert await peer.do("look", blocks=4, seed=1) == [0, 1]

    asyncio.run(scenario())


async def nothing_incoming(peer: PeerProcess) -> None:
    async with asyncio.timeout(DEADLINE):
        while await peer.do("incoming"):
            await asyncio.sleep(0.002)


# --- deaths ------------------------------------------------------------------------------------------


@each_way
@each_mode
@pytest.mark.parametrize("step", ["reserved", "copying", "copied"])
def test_a_sender_killed_before_it_publishes_leaves_nothing(
    backend: str, arrangement: Arrangement, mode: TransferMode, step: str
) -> None:
    async def scenario() -> None:
        async with pair(backend, arrangement) as (pool, endpoint, peer):
            await peer.do("die_at", step=step, nth=2 if step == "copying" else 1)
            order = {"name": "a", "address": endpoint.address, "seed": 1, "mode": mode.value}
            assert await peer.do("send", blocks=BLOCKS, **order) is None
            await until(lambda: pool.stats().free == 64)
            assert pool.stats().aborts[AbortCause.SENDER_LOST] == 1
            with pool.match(tokens_of(1, BLOCKS), NS) as match:
                assert match.tokens == 0
            pool.check([])

    asyncio.run(scenario())


@each_way
@each_mode
@pytest.mark.parametrize("step", ["reserved", "copying", "copied"])
def test_a_receiver_killed_at_any_step_is_a_lost_peer(
    backend: str, arrangement: Arrangement, mode: TransferMode, step: str
) -> None:
    async def scenario() -> None:
        victim: list[int] = []

        def kill(seen: str) -> None:
            if seen == step and victim:
                os.kill(victim.pop(), signal.SIGKILL)

        async with pair(backend, arrangement, observe=kill) as (pool, _, peer):
            victim.append(peer.process.pid)
            src = pool.alloc_mem(BLOCKS)
            fill_blocks(pool, src, 2)
            with pytest.raises(PeerLost):
                await pool.transfer_with_insert(B, tokens_of(2, BLOCKS), src, NS, mode=mode)
            assert holds_pattern(pool, src, 2)
            pool.check([src])

    asyncio.run(scenario())
