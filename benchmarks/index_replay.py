"""How fast a pool serves a whole trace, and what its index weighs.

    python benchmarks/index_replay.py --traces DIR [--rounds N] [--out FILE]

Every request of Mooncake's conversation trace is matched under a lease, gets what it lacks (which evicts),
is published and lets go, with real token arrays, in a pool of 5 % of the trace's footprint: alone, as the
peers were measured, and followed by a reader of its events. Seconds are processor time of this process;
policies take turns. Bytes are those that Python traced at the end, by module, per cached block.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from pathlib import Path

import mooncake
from memserve import mempool
from memserve.core import radix
from memserve.core.clock import VirtualClock
from memserve.core.types import Tokens
from memserve.mempool import policy_by_name
from mooncake import PAGE, Request
from recording import summarise, write_result

SHARE = 0.05
POLICIES = ("hit-density", "lru")
PEER = 6_700
"""Requests/s of the best peer on this trace, on the machine of the project's first measurements."""
TOKEN_BYTES = 4 * PAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="the folder with the traces")
    parser.add_argument("--rounds", type=int, default=3, help="replays per policy")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/index_replay.json")
    options = parser.parse_args()
    requests = mooncake.load(options.traces, "conversation")
    prompts = [mooncake.prompt_of(request) for request in requests]
    blocks = mooncake.pool_blocks(requests, SHARE)
    figures: dict[str, object] = {"pool_blocks": blocks, "requests": len(requests)}
    figures["touching_tokens_us_per_request"] = reading_time(prompts) * 1e6
    rates: dict[str, list[float]] = {name: [] for name in POLICIES}
    followed: dict[str, list[float]] = {name: [] for name in POLICIES}
    for _ in range(options.rounds):
        for name in POLICIES:
            rates[name].append(rate(name, requests, prompts, blocks, followed=False))
            followed[name].append(rate(name, requests, prompts, blocks, followed=True))
    for name in POLICIES:
        figures[f"{name}_requests_per_s"] = summarise(rates[name])
        figures[f"{name}_followed_requests_per_s"] = summarise(followed[name])
        figures[f"{name}_to_best_peer"] = statistics.median(rates[name]) / PEER
        figures[f"{name}_bytes_per_block"] = weigh(name, requests, prompts, blocks)
    write_result("index_replay", figures, options.out)
    for name, figure in figures.items():
        print(f"{name:34s}", figure)


def rate(name: str, requests: list[Request], prompts: list[Tokens], blocks: int, *, followed: bool) -> float:
    """Requests per second of processor time."""
    clock = VirtualClock()
    pool = mooncake.new_pool(blocks, policy_by_name(name, blocks, PAGE), clock)
    done = mooncake.replay(requests, prompts, pool, clock, followed=followed)
    pool.check([])
    pool.close()
    return done.requests / done.seconds


def reading_time(prompts: list[Tokens]) -> float:
    """The floor: seconds to look at every token of a request once."""
    started = time.process_time()
    for prompt in prompts:
        prompt.max()
    return (time.process_time() - started) / len(prompts)


def weigh(name: str, requests: list[Request], prompts: list[Tokens], blocks: int) -> dict[str, float]:
    """Bytes per cached block after the trace: index and policy without the tokens themselves; block table."""
    clock = VirtualClock()
    folder = Path(mempool.__file__).parent
    tracemalloc.start()
    pool = mooncake.new_pool(blocks, policy_by_name(name, blocks, PAGE), clock)
    mooncake.replay(requests, prompts, pool, clock)
    taken = tracemalloc.take_snapshot().statistics("filename")
    tracemalloc.stop()
    cached = pool.stats().tree_blocks
    table = sum(x.size for x in taken if x.traceback[0].filename == str(folder / "blocks.py"))
    ours = [x for x in taken if x.traceback[0].filename.startswith((str(folder), radix.__file__))]
    policy = sum(x.size for x in ours if "/eviction/" in x.traceback[0].filename)
    tree = sum(x.size for x in ours) - table - policy - cached * TOKEN_BYTES
    pool.close()
    parts = {"tree": tree, "policy": policy, "tree_and_policy": tree + policy, "block_table": table}
    return {part: round(size / cached, 2) for part, size in parts.items()}


if __name__ == "__main__":
    main()
