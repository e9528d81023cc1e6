"""Mooncake's request traces (FAST'25 release) as prompts with real tokens, and their replay through a pool.

A trace names each 512-token block by a hash id; equal ids are equal tokens. Which tokens an id stands for is
fixed here. Only prompts are replayed: the traces do not say what was answered.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memserve.core.clock import VirtualClock
from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.mempool import EvictionPolicy, KVLayout, MemPool

NAMES = ("conversation", "synthetic")
HASHED = 512
"""Tokens that share a hash id."""
VOCABULARY = 128_000
POINTS = KVLayout("points", layers=1, kv_heads=1, head_dim=1)
"""The smallest block there is: a pool of a million blocks costs 64 MB of untouched address space."""
PAGE = POINTS.block_tokens
NS = Namespace("benchmark")


@dataclass(frozen=True, slots=True)
class Request:
    """When it came (seconds), and its prompt: ``tokens`` tokens long, in blocks named by ``ids``."""

    at: float
    tokens: int
    ids: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Whole blocks of a pool that the prompt fills."""
        return self.tokens // PAGE

    def sizes(self) -> list[int]:
        """Whole pool blocks in each of its hashed blocks."""
        return [min(max(self.tokens - at * HASHED, 0), HASHED) // PAGE for at in range(len(self.ids))]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a pool made of a trace: tokens found cached, in how many seconds of processor time."""

    hit_tokens: int
    tokens: int
    requests: int
    seconds: float


def load(folder: Path, name: str) -> list[Request]:
    """The requests of ``mooncake_NAME.jsonl``, in the order of their arrival."""
    rows = map(json.loads, (folder / f"mooncake_{name}.jsonl").read_text().splitlines())
    return [Request(row["timestamp"] / 1000, row["input_length"], tuple(row["hash_ids"])) for row in rows]


def prompt_of(request: Request) -> Tokens:
    """The prompt: int32[tokens]."""
    return np.ascontiguousarray(expand(np.array(request.ids, np.uint64)).reshape(-1)[: request.tokens])


def expand(ids: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Tokens of hashed blocks: int32[ids, 512], splitmix64 of id and position."""
    x = ids[:, None] * np.uint64(HASHED) + np.arange(1, HASHED + 1, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    tokens: NDArray[np.int32] = ((x ^ (x >> np.uint64(31))) % np.uint64(VOCABULARY)).astype(np.int32)
    return tokens


def footprint(requests: list[Request]) -> int:
    """Distinct pool blocks of a trace: what a pool needs that never evicts."""
    sizes: dict[int, int] = {}
    for request in requests:
        for name, size in zip(request.ids, request.sizes(), strict=True):
            sizes[name] = max(sizes.get(name, 0), size)
    return sum(sizes.values())


def pool_blocks(requests: list[Request], share: float) -> int:
    """Blocks of a pool that holds ``share`` of the footprint, and at least the longest prompt."""
    return max(int(footprint(requests) * share), max(request.blocks for request in requests) + 1)


def new_pool(blocks: int, policy: EvictionPolicy | None, clock: VirtualClock) -> MemPool:
    """A pool without a machine's limits: its memory is never touched."""
    return MemPool(POINTS, blocks, instance=InstanceId("replay"), incarnation=1, clock=clock, eviction=policy)


def replay(
    requests: list[Request],
    prompts: list[Tokens],
    pool: MemPool,
    clock: VirtualClock,
    *,
    followed: bool = False,
) -> Replay:
    """Match, allocate what is missing, publish, let go: every request when its time has come.

    A pool that is ``followed`` has a reader who takes its events after each.
    """
    hits = total = 0
    if followed:
        pool.take_events()
    started = time.process_time()
    for request, prompt in zip(requests, prompts, strict=True):
        clock.advance(request.at - clock.now())
        hits += serve(pool, prompt, followed)
        total += len(prompt)
    return Replay(hits, total, len(requests), time.process_time() - started)


def serve(pool: MemPool, prompt: Tokens, followed: bool) -> int:
    """What the pool sees of one request. Returns tokens found cached."""
    lease = pool.match(prompt, NS)
    hits = lease.tokens
    held = lease.detach()
    addrs = held.concat(pool.alloc_mem(len(prompt) // PAGE - len(held)))
    pool.insert(prompt, addrs, NS)
    pool.free_mem(addrs)
    if followed:
        pool.take_events()
    return hits
