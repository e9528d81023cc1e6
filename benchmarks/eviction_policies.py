"""Tokens found cached per eviction policy, against LRU and against the best that any policy could do.

    python benchmarks/eviction_policies.py --traces DIR [--policies lru,hit-density] [--out FILE]

DIR holds mooncake_conversation.jsonl and mooncake_synthetic.jsonl. Every policy serves a whole trace in a
real pool on a virtual clock, at 1, 5 and 20 % of the blocks that the trace needs in all. The bound is
Belady's, which knows the future, with bypass: it need not keep what it has just computed.
"""

from __future__ import annotations

import argparse
import heapq
from pathlib import Path

import mooncake
from memserve.core.clock import VirtualClock
from memserve.core.config import EVICTION
from memserve.mempool import policy_by_name
from mooncake import PAGE, Request
from recording import write_result

SHARES = (0.01, 0.05, 0.2)
NEVER = 1 << 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="the folder with the traces")
    parser.add_argument("--policies", default=",".join(EVICTION), help="default: all")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/eviction_policies.json")
    options = parser.parse_args()
    names = options.policies.split(",")
    print(
        f"{'trace':14s}{'pool':>6s}{'blocks':>10s}", *(f"{name:>12s}" for name in names), f"{'Belady':>12s}"
    )
    cells = [
        measure(trace, requests, share, names)
        for trace in mooncake.NAMES
        for requests in [mooncake.load(options.traces, trace)]
        for share in SHARES
    ]
    write_result("eviction_policies", {"cached_token_ratio": cells}, options.out)


def measure(trace: str, requests: list[Request], share: float, names: list[str]) -> dict[str, object]:
    """One row: the share of prompt tokens found cached, for every policy and for the bound."""
    prompts = [mooncake.prompt_of(request) for request in requests]
    blocks = mooncake.pool_blocks(requests, share)
    tokens = sum(request.tokens for request in requests)
    ratios = {}
    for name in names:
        clock = VirtualClock()
        pool = mooncake.new_pool(blocks, policy_by_name(name, blocks, PAGE), clock)
        ratios[name] = mooncake.replay(requests, prompts, pool, clock).hit_tokens / tokens
        pool.check([])
        pool.close()
    ratios["belady"] = belady_hits(requests, blocks) * PAGE / tokens
    row = (f"{ratio:12.4f}" for ratio in ratios.values())
    print(f"{trace:14s}{share:6.0%}{blocks:10d}", *row, flush=True)
    return {"trace": trace, "share": share, "pool_blocks": blocks, **ratios}


def belady_hits(requests: list[Request], room: int) -> int:
    """Blocks hit by a cache of ``room`` blocks that evicts, or does not admit, what is used again last.

    Blocks with the same hash id are always used together, so they are weighed and trimmed, not listed. A
    prefix is used no later than what continues it, so this order keeps prefixes whole by itself.
    """
    coming = next_uses(requests)
    cached: dict[int, int] = {}
    due: dict[int, tuple[int, int]] = {}
    queue: list[tuple[int, int, int]] = []
    used = hits = 0
    for request, nexts in zip(requests, coming, strict=True):
        for depth, (name, size, then) in enumerate(zip(request.ids, request.sizes(), nexts, strict=True)):
            hits += min(cached.get(name, 0), size)
            kept = 0 if then == NEVER else max(size, cached.get(name, 0))
            used += kept - cached.pop(name, 0)
            if kept:
                cached[name], due[name] = kept, (-then, -depth)
                heapq.heappush(queue, (-then, -depth, name))
        while used > room:
            then, depth, name = heapq.heappop(queue)
            if name not in cached or due[name] != (then, depth):
                continue
            given = min(cached[name], used - room)
            cached[name] -= given
            used -= given
            if cached[name]:
                heapq.heappush(queue, (then, depth, name))
            else:
                del cached[name]
    return hits


def next_uses(requests: list[Request]) -> list[list[int]]:
    """For every hashed block of every request, the number of the next request with it."""
    latest: dict[int, int] = {}
    found: list[list[int]] = []
    for number in range(len(requests) - 1, -1, -1):
        ids = requests[number].ids
        found.append([latest.get(name, NEVER) for name in ids])
        latest.update(dict.fromkeys(ids, number))
    return found[::-1]


if __name__ == "__main__":
    main()
