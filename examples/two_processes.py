"""Two processes share KV cache: each finds, without computing it, what the other has computed.

python examples/two_processes.py [shm | tcp]
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys

import numpy as np

from memserve.core.clock import MonotonicClock
from memserve.core.messages import Member
from memserve.core.types import InstanceId, Namespace, Role
from memserve.mempool import Addresses, KVLayout, MemPool, Origin, TransferEndpoint
from memserve.wire import Security

LAYOUT = KVLayout("SmolLM2-135M", layers=30, kv_heads=3, head_dim=64)
MODEL = Namespace("SmolLM2-135M")
CHAT = np.arange(16 * LAYOUT.block_tokens, dtype=np.int32)
"""A prompt of 12 blocks and an answer of 4."""
PROMPT = CHAT[: 12 * LAYOUT.block_tokens]
PREFILL, DECODE = InstanceId("prefill"), InstanceId("decode")


def compute(pool: MemPool, tokens: np.ndarray) -> Addresses:
    """What an engine does: take what is cached, compute the other blocks, publish. Returns what it holds."""
    with pool.match(tokens, MODEL) as match:
        cached = pool.swap_in(match.addrs)
    fresh = pool.alloc_mem(LAYOUT.blocks_for(len(tokens)) - len(cached))
    for number in fresh.blocks.tolist():
        pool.arena.block_memory(number)[:] = 1 + len(cached)
    print(f"{pool.instance}: {len(cached)} blocks found, {len(fresh)} computed", flush=True)
    addrs = cached.concat(fresh)
    pool.insert(tokens, addrs, MODEL)
    return addrs


async def open_pool(name: InstanceId, backend: str, key: bytes) -> tuple[MemPool, TransferEndpoint]:
    clock = MonotonicClock()
    pool = MemPool(LAYOUT, 64, instance=name, incarnation=1, clock=clock)
    endpoint = TransferEndpoint(pool, clock, backends=(backend,), security=Security(key))
    await endpoint.start("tcp://127.0.0.1:0" if backend == "tcp" else f"@memserve-{secrets.token_hex(4)}")
    return pool, endpoint


async def decode(backend: str, key: str, prefill_address: str) -> None:
    """The child: waits for the prompt's KV, goes on from there, and sends the answer's KV back."""
    pool, endpoint = await open_pool(DECODE, backend, bytes.fromhex(key))
    endpoint.set_peers((Member(PREFILL, 1, Role.PREFILL, prefill_address),))
    arrived = asyncio.Event()
    pool.on_events(arrived.set)
    print(endpoint.address, flush=True)
    async with asyncio.timeout(30):
        await arrived.wait()
    answer = compute(pool, CHAT)
    sent = await pool.transfer_with_insert(PREFILL, CHAT, answer, MODEL, origin=Origin.BACKFLOW)
    print(f"decode: {sent.held} blocks were there already, {sent.sent} sent back", flush=True)
    pool.free_mem(answer)
    await endpoint.close()
    pool.close()


async def prefill(backend: str) -> None:
    key = secrets.token_bytes(32)
    pool, endpoint = await open_pool(PREFILL, backend, key)
    command = [sys.executable, __file__, backend, key.hex(), endpoint.address]
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    async with asyncio.timeout(60):
        address = (await child.stdout.readline()).decode().strip()
        endpoint.set_peers((Member(DECODE, 1, Role.DECODE, address),))
        prompt = compute(pool, PROMPT)
        sent = await pool.transfer_with_insert(DECODE, PROMPT, prompt, MODEL)
        print(f"prefill: {sent.sent} blocks sent by {sent.backend}, {sent.mode}", flush=True)
        pool.free_mem(prompt)
        print((await child.stdout.read()).decode(), end="")
        await child.wait()
    with pool.match(CHAT, MODEL) as match:
        from_decode = int(np.count_nonzero(match.origins == Origin.BACKFLOW))
        print(f"prefill: the next turn finds {len(match.addrs)} blocks, {from_decode} of them from decode")
    await endpoint.close()
    pool.check([])
    pool.close()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        asyncio.run(decode(*sys.argv[1:]))
    else:
        asyncio.run(prefill(sys.argv[1] if len(sys.argv) > 1 else "shm"))
