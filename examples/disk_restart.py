"""KV cache that outlives its process: fill a small pool, let it spill to disk, start again, find it there.

python examples/disk_restart.py [DIRECTORY]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from memserve.core.clock import MonotonicClock
from memserve.core.types import InstanceId, Namespace
from memserve.mempool import DiskTier, KVLayout, MemPool, Tier

LAYOUT = KVLayout("SmolLM2-135M", layers=30, kv_heads=3, head_dim=64)
TENANT = Namespace("SmolLM2-135M", salt="tenant 7")


def open_pool(directory: Path, life: int) -> MemPool:
    """Room for 8 blocks (128 tokens) where the model reads, and for 64 on disk."""
    return MemPool(
        LAYOUT,
        8,
        instance=InstanceId("example"),
        incarnation=life,
        clock=MonotonicClock(),
        disk=DiskTier(directory, 64),
    )


def publish(pool: MemPool, tokens: np.ndarray) -> None:
    """What an engine does once it has computed the KV of a prompt."""
    addrs = pool.alloc_mem(LAYOUT.blocks_for(len(tokens)))
    for number in addrs.blocks.tolist():
        pool.arena.block_memory(number)[:] = number
    pool.insert(tokens, addrs, TENANT)
    pool.free_mem(addrs)


def main(directory: Path) -> None:
    prompts = [np.arange(64, dtype=np.int32) + 1000 * number for number in range(4)]
    first = open_pool(directory, life=1)
    for tokens in prompts:
        publish(first, tokens)
    held = first.stats()
    print(f"first life: {held.historical} blocks on the device, {held.disk.historical} on disk")
    first.persist()
    first.close()

    second = open_pool(directory, life=2)
    for number, tokens in enumerate(prompts):
        with second.match(tokens, TENANT) as match:
            tiers = {Tier(tier).name.lower() for tier in match.tiers}
            addrs = second.swap_in(match.addrs)
        print(f"second life: prompt {number}: {len(addrs)} of 4 blocks found, on {', '.join(sorted(tiers))}")
        second.free_mem(addrs)
    second.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
