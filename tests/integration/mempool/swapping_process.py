"""A process that fills a pool with known KV and swaps it to disk until it is killed.

Usage: swapping_process.py DIRECTORY. Writes a line for every prompt that it has swapped out.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from pathlib import Path

import numpy as np

from memserve.core.clock import MonotonicClock
from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.mempool import DiskTier, KVLayout, MemPool

LAYOUT = KVLayout("swapped", layers=2, kv_heads=1, head_dim=64)
NAMESPACE = Namespace("m")
DEVICE, DISK = 24, 64
PROMPT_BLOCKS = 6


def open_pool(path: Path, incarnation: int) -> MemPool:
    return MemPool(
        LAYOUT,
        DEVICE,
        instance=InstanceId("a"),
        incarnation=incarnation,
        clock=MonotonicClock(),
        host_blocks=4,
        disk=DiskTier(path, DISK),
    )


def prompt(number: int) -> Tokens:
    """Prompt ``number``: its first block is shared by four prompts."""
    tokens = np.full(PROMPT_BLOCKS * LAYOUT.block_tokens, number, np.int32)
    tokens[: LAYOUT.block_tokens] = number // 4
    return tokens


def kv_of(tokens: Tokens) -> np.ndarray:
    """What the last block of ``tokens`` holds: uint8[block_bytes]."""
    seed = int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest())
    return np.random.default_rng(seed).integers(0, 256, LAYOUT.block_bytes, np.uint8)


def serve(pool: MemPool, tokens: Tokens) -> int:
    """Publish a prompt; returns how many of its blocks were found, which are verified."""
    with pool.match(tokens, NAMESPACE) as match:
        found = pool.swap_in(match.addrs)
    addrs = found.concat(pool.alloc_mem(PROMPT_BLOCKS - len(found)))
    for at, number in enumerate(addrs.blocks.tolist(), 1):
        memory, wanted = pool.arena.block_memory(number), kv_of(tokens[: at * LAYOUT.block_tokens])
        if at > len(found):
            memory[:] = wanted
        assert np.array_equal(memory, wanted), "a wrong block was served"
    pool.insert(tokens, addrs, NAMESPACE)
    pool.free_mem(addrs)
    return len(found)


def main() -> None:
    pool = open_pool(Path(sys.argv[1]), incarnation=1)
    for number in itertools.count():
        serve(pool, prompt(number % 16))
        pool.swap_out(PROMPT_BLOCKS)
        print(number, flush=True)


if __name__ == "__main__":
    main()
