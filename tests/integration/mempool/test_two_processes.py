"""Two real processes exchange KV over shared memory, and either of them is killed at every step."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memserve.core.errors import PeerLost, StaleAddress
from memserve.core.types import InstanceId
from memserve.mempool import AbortCause, Origin

from .conftest import fresh_address, peer_process, serving, until
from .peer_process import BIG, NS, fill_blocks, holds_pattern, member, tokens_of

pytestmark = pytest.mark.processes
B = InstanceId("b")
BLOCKS = 24
"""Nearly nine megabytes: a copy of two steps."""


def test_a_peer_pushes_what_is_missing_and_the_bytes_are_right() -> None:
    async def scenario() -> None:
        async with serving("a", layout=BIG, blocks=64) as (pool, _, address), peer_process("b") as peer:
            order = {"name": "a", "address": address, "seed": 5}
            assert await peer.do("send", blocks=8, **order) == [0, 8, 8 * BIG.block_bytes]
            assert await peer.do("send", blocks=8, **order) == [8, 0, 0]
            with pool.match(tokens_of(5, 8), NS) as match:
                assert match.tokens == 8 * BIG.block_tokens
                assert holds_pattern(pool, match.addrs, 5)
                assert match.origins.tolist() == [Origin.PEER] * 8
            pool.check([])

    asyncio.run(scenario())


def test_pushing_to_a_peer_extends_what_it_has() -> None:
    async def scenario() -> None:
        async with serving("a", layout=BIG, blocks=64) as (pool, endpoint, _), peer_process("b") as peer:
            endpoint.set_peers((member("b", peer.address),))
            src = pool.alloc_mem(BLOCKS)
            fill_blocks(pool, src, 9)
            tokens = tokens_of(9, BLOCKS)
            half = await pool.transfer_with_insert(B, tokens[: 10 * BIG.block_tokens], src, NS)
            rest = await pool.transfer_with_insert(B, tokens, src, NS, origin=Origin.BACKFLOW)
            assert (half.held, half.sent, rest.held, rest.sent) == (0, 10, 10, 14)
            assert await peer.do("look", blocks=BLOCKS, seed=9) == [BLOCKS, 1]
            pool.check([src])

    asyncio.run(scenario())


@pytest.mark.parametrize(("step", "nth"), [("reserved", 1), ("copying", 1), ("copying", 2), ("copied", 1)])
def test_a_sender_killed_before_it_publishes_leaves_nothing(step: str, nth: int) -> None:
    async def scenario() -> None:
        async with serving("a", layout=BIG, blocks=64) as (pool, _, address), peer_process("b") as peer:
            await peer.do("die_at", step=step, nth=nth)
            assert await peer.do("send", name="a", address=address, blocks=BLOCKS, seed=1) is None
            await until(lambda: pool.stats().incoming == 0)
            stats = pool.stats()
            assert (stats.free, stats.aborts[AbortCause.SENDER_LOST]) == (64, 1)
            with pool.match(tokens_of(1, BLOCKS), NS) as match:
                assert match.tokens == 0
            pool.check([])

    asyncio.run(scenario())


@pytest.mark.parametrize("step", ["reserved", "copying", "copied"])
def test_a_receiver_killed_on_the_way_is_reported_and_costs_no_block(step: str) -> None:
    async def scenario() -> None:
        victim: list[int] = []

        def kill(seen: str) -> None:
            if seen == step and victim:
                os.kill(victim.pop(), signal.SIGKILL)

        async with (
            serving("a", layout=BIG, blocks=64, observe=kill) as (pool, endpoint, _),
            peer_process("b") as peer,
        ):
            victim.append(peer.process.pid)
            endpoint.set_peers((member("b", peer.address),))
            src = pool.alloc_mem(BLOCKS)
            fill_blocks(pool, src, 2)
            with pytest.raises(PeerLost):
                await pool.transfer_with_insert(B, tokens_of(2, BLOCKS), src, NS)
            pool.check([src])
            assert holds_pattern(pool, src, 2)
            with pytest.raises(PeerLost, match="cannot reach"):
                await pool.transfer_with_insert(B, tokens_of(2, BLOCKS), src, NS)

    asyncio.run(scenario())


def test_a_peer_restarted_under_its_name_is_another_one() -> None:
    async def scenario() -> None:
        async with serving("a", layout=BIG, blocks=64) as (pool, endpoint, _):
            where = fresh_address()
            src = pool.alloc_mem(2)
            fill_blocks(pool, src, 3)
            tokens = tokens_of(3, 2)
            async with peer_process("b", address=where):
                endpoint.set_peers((member("b", where, 1),))
                assert (await pool.transfer_with_insert(B, tokens, src, NS)).sent == 2
            async with peer_process("b", address=where, incarnation=2) as again:
                with pytest.raises(StaleAddress, match=r"incarnation 2\), not b \(incarnation 1\)"):
                    await pool.transfer_with_insert(B, tokens, src, NS)
                endpoint.set_peers((member("b", where, 2),))
                assert (await pool.transfer_with_insert(B, tokens, src, NS)).sent == 2
                assert await again.do("look", blocks=2, seed=3) == [2, 1]
            pool.check([src])

    asyncio.run(scenario())


def test_nothing_is_left_of_pools_that_are_gone() -> None:
    async def scenario() -> None:
        async with serving("gone", layout=BIG, blocks=8) as (_, _, address), peer_process("b") as peer:
            assert await peer.do("send", name="gone", address=address, blocks=2, seed=1)

    before = set(os.listdir("/dev/shm"))
    asyncio.run(scenario())
    assert "memfd:memserve-gone" not in Path("/proc/self/maps").read_text()
    assert not [name for name in os.listdir("/dev/shm") if name not in before and "memserve" in name]


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_the_example_shares_prompt_and_answer(backend: str) -> None:
    example = Path(__file__).resolve().parents[3] / "examples" / "two_processes.py"
    ran = subprocess.run([sys.executable, str(example), backend], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert f"12 blocks sent by {backend}" in ran.stdout
    assert "decode: 12 blocks found, 4 computed" in ran.stdout
    assert "16 blocks, 4 of them from decode" in ran.stdout
