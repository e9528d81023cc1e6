"""A pool that shrinks and grows while requests go on: what is held stays, cold KV goes, memory is given back.

python examples/shrinking_pool.py
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from memserve.core.clock import MonotonicClock
from memserve.core.errors import OutOfBlocks
from memserve.core.types import InstanceId, Namespace
from memserve.mempool import Addresses, KVLayout, MemPool, Tier

LAYOUT = KVLayout("SmolLM2-135M", layers=30, kv_heads=3, head_dim=64)
MODEL = Namespace("SmolLM2-135M")
PROMPT_BLOCKS = 8


def serve_request(pool: MemPool, tokens: np.ndarray, content: int) -> Addresses | None:
    """What an engine does: find what is cached, compute the rest, publish.

    Returns what the request holds, or None if there is no room until another one ends.
    """
    with pool.match(tokens, MODEL) as match:
        found = pool.swap_in(match.addrs)
    assert all((pool.arena.block_memory(number) == content).all() for number in found.blocks.tolist())
    try:
        fresh = pool.alloc_mem(PROMPT_BLOCKS - len(found))
    except OutOfBlocks:
        pool.free_mem(found)
        return None
    for number in fresh.blocks.tolist():
        pool.arena.block_memory(number)[:] = content
    addrs = found.concat(fresh)
    pool.insert(tokens, addrs, MODEL)
    return addrs


def memory_in_use(pool: MemPool) -> str:
    taken = sum(Path(f"/proc/self/fd/{fd}").stat().st_blocks * 512 for fd in pool.arena.fds)
    return f"{taken / 2**20:.0f} MiB"


def main() -> None:
    pool = MemPool(LAYOUT, 256, instance=InstanceId("example"), incarnation=1, clock=MonotonicClock())
    prompts = [np.arange(PROMPT_BLOCKS * 16, dtype=np.int32) + 1000 * at for at in range(40)]
    choose = random.Random(1)
    running: list[Addresses] = []
    for turn in range(400):
        # Prompts at the front are popular, as system prompts and running chats are.
        at = min(int(choose.expovariate(0.1)), len(prompts) - 1)
        while (addrs := serve_request(pool, prompts[at], at)) is None:
            pool.free_mem(running.pop(0))
        running.append(addrs)
        if len(running) > 6:
            pool.free_mem(running.pop(0))
        if turn % 100 == 50:
            blocks = {50: 256, 150: 64, 250: 40, 350: 512}[turn]
            resized = pool.resize(Tier.DEVICE, blocks)
            print(f"turn {turn}: {resized.blocks} blocks, {resized.draining} of the others still held")
        if turn % 100 == 99:
            stats = pool.stats()
            hits = stats.hit_tokens / (stats.hit_tokens + stats.miss_tokens)
            print(
                f"turn {turn}: {stats.active} blocks active, {stats.historical} cached, {stats.free} free, "
                f"{memory_in_use(pool)} in use, {hits:.0%} of tokens found so far"
            )
    for addrs in running:
        pool.free_mem(addrs)
    pool.check([])
    pool.close()


if __name__ == "__main__":
    main()
