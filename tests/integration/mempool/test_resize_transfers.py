"""Pools that grow and shrink while real processes send to them: no wrong bytes, no block lost or leaked."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memserve.core.types import InstanceId
from memserve.mempool import MemPool, Tier

from .conftest import peer_process, serving
from .peer_process import BIG, NS, SECURITY, fill_blocks, holds_pattern, member, tokens_of

pytestmark = pytest.mark.processes
B = InstanceId("b")


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_a_peer_that_is_connected_can_write_to_memory_added_later(backend: str) -> None:
    async def scenario() -> None:
        async with (
            serving("a", layout=BIG, blocks=4, backends=(backend,), security=SECURITY) as (
                pool,
                _,
                address,
            ),
            peer_process("b", backend=backend) as peer,
        ):
            order = {"name": "a", "address": address}
            assert await peer.do("send", blocks=2, seed=1, **order) == [0, 2, 2 * BIG.block_bytes]
            refused = await peer.do("send", blocks=8, seed=2, **order)
            assert isinstance(refused, dict)
            assert refused["error"] == "PeerOutOfBlocks"
            pool.resize(Tier.DEVICE, 24)
            for seed in (2, 3):
                assert await peer.do("send", blocks=8, seed=seed, **order) == [0, 8, 8 * BIG.block_bytes]
                with pool.match(tokens_of(seed, 8), NS) as match:
                    assert match.tokens == 8 * BIG.block_tokens
                    assert holds_pattern(pool, match.addrs, seed)
            assert len(pool.arena.extents) == 2
            pool.check([])

    asyncio.run(scenario())


@pytest.mark.parametrize("step", ["reserved", "copying", "copied"])
@pytest.mark.parametrize("blocks", [4, 96])
def test_a_receiver_resized_in_the_middle_of_a_transfer(step: str, blocks: int) -> None:
    async def scenario() -> None:
        async with serving("b", layout=BIG, blocks=48) as (receiver, _, address):
            loop, sizes = asyncio.get_running_loop(), [blocks]

            def resize(seen: str) -> None:
                # The sender may say so in a thread of its own; a pool belongs to its loop.
                if seen == step and sizes:
                    loop.call_soon_threadsafe(receiver.resize, Tier.DEVICE, sizes.pop())

            async with serving("a", layout=BIG, blocks=64, observe=resize) as (sender, endpoint, _):
                endpoint.set_peers((member("b", address),))
                src = sender.alloc_mem(24)
                fill_blocks(sender, src, 3)
                done = await sender.transfer_with_insert(B, tokens_of(3, 24), src, NS)
                assert done.sent == 24
                sender.free_mem(src)
            assert not sizes
            stats = receiver.stats()
            assert (stats.blocks, stats.draining, stats.incoming) == (blocks, 0, 0)
            with receiver.match(tokens_of(3, 24), NS) as match:
                assert len(match.addrs) == min(blocks, 24)
                assert holds_pattern(receiver, match.addrs, 3)
            receiver.check([])

    asyncio.run(scenario())


def test_a_sender_that_shrinks_keeps_what_it_sends_until_it_is_sent() -> None:
    async def scenario() -> None:
        async with serving("b", layout=BIG, blocks=48) as (receiver, _, address):
            shrunk: list[int] = []
            loop = asyncio.get_running_loop()

            def shrink(seen: str) -> None:
                if seen == "reserved":
                    loop.call_soon(lambda: shrunk.append(sender.resize(Tier.DEVICE, 2).draining))

            async with serving("a", layout=BIG, blocks=32, observe=shrink) as (sender, endpoint, _):
                endpoint.set_peers((member("b", address),))
                src = sender.alloc_mem(24)
                fill_blocks(sender, src, 4)
                sender.insert(tokens_of(4, 24), src, NS)
                sender.free_mem(src)
                with sender.match(tokens_of(4, 24), NS) as match:
                    sending = asyncio.ensure_future(
                        sender.transfer_with_insert(B, tokens_of(4, 24), match.addrs, NS)
                    )
                    await asyncio.wait_for(asyncio.shield(sending), 30)
                assert shrunk == [22]
                assert (sender.stats().draining, sender.stats().historical) == (0, 2)
                sender.check([])
            with receiver.match(tokens_of(4, 24), NS) as match:
                assert len(match.addrs) == 24
                assert holds_pattern(receiver, match.addrs, 4)

    asyncio.run(scenario())


@pytest.mark.parametrize(("held", "sent"), [(8, 24), (32, 0)])
def test_what_a_pool_would_lose_by_shrinking_can_go_to_a_peer_first(held: int, sent: int) -> None:
    async def scenario() -> None:
        async with (
            serving("b", layout=BIG, blocks=32) as (receiver, _, address),
            serving("a", layout=BIG, blocks=32) as (sender, endpoint, _),
        ):
            endpoint.set_peers((member("b", address),))
            for seed in range(8):
                src = sender.alloc_mem(4)
                fill_blocks(sender, src, seed)
                sender.insert(tokens_of(seed, 4), src, NS)
                sender.free_mem(src)
            others = receiver.alloc_mem(held)
            assert await sender.offload(B, 24) == sent
            sender.resize(Tier.DEVICE, 8)
            found = [blocks_of(sender, seed) + blocks_of(receiver, seed) for seed in range(8)]
            assert found[6:] == [4, 4]
            assert sum(found) == 8 + sent
            receiver.free_mem(others)
            sender.check([])
            receiver.check([])

    asyncio.run(scenario())


def blocks_of(pool: MemPool, seed: int) -> int:
    with pool.match(tokens_of(seed, 4), NS) as match:
        assert holds_pattern(pool, match.addrs, seed)
        return len(match.addrs)


def test_the_example_shrinks_and_grows() -> None:
    example = Path(__file__).resolve().parents[3] / "examples" / "shrinking_pool.py"
    ran = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    in_use = [int(found) for found in re.findall(r"(\d+) MiB in use", ran.stdout)]
    assert len(in_use) == 4
    assert in_use[1] < in_use[0] / 2
    assert in_use[3] > in_use[2]
