"""What MemPool's calls cost: memory and index calls against the paper's figures, transfers against memcpy.

    python benchmarks/mempool_calls.py [--out FILE]

Calls inside a process are measured in processor time. Transfers go to a second process and are measured in
real time, beside memcpy. Sides of a comparison take turns; figures are medians with the middle half.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from memserve import _native
from memserve.core.clock import MonotonicClock
from memserve.core.messages import Member
from memserve.core.types import InstanceId, Namespace, Role, Tokens
from memserve.mempool import Addresses, KVLayout, MemPool, Tier, TransferEndpoint
from memserve.mempool.arena import Arena
from recording import write_result

NS = Namespace("benchmark")
SMOLLM2 = KVLayout("SmolLM2-135M", layers=30, kv_heads=3, head_dim=64)
POINTS = KVLayout("points", layers=1, kv_heads=1, head_dim=1)
"""The smallest block there is: index and memory calls do not look at contents."""
PEER_BLOCKS = 320
Figure = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/mempool_calls.json")
    parser.add_argument("--peer", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        asyncio.run(serve_peer(options.peer))
        return
    figures = {**memory_calls(), **resizes(), **index_calls(), **copies(), **asyncio.run(transfers())}
    write_result("mempool_calls", {"isa": _native.isa(), "figures": figures}, options.out)
    for name, figure in figures.items():
        print(f"{name:44s}", "  ".join(f"{key} {value:.4g}" for key, value in figure.items()))


# --- memory and index calls ---------------------------------------------------------------------------


def memory_calls() -> dict[str, Figure]:
    """alloc_mem + free_mem per block, in batches (target 150 ns at 64; paper: 800 ns)."""
    pool = new_pool("memory", POINTS, 8192)

    def turn_over(count: int) -> Callable[[], None]:
        return lambda: pool.free_mem(pool.alloc_mem(count)) and None

    return {
        f"alloc_free_ns_per_block_batch_{count}": spread(
            [timed(turn_over(count), time.thread_time, 200) / 200 / count * 1e9 for _ in range(50)]
        )
        for count in (1, 64, 1024)
    }


def resizes(blocks: int = 512, step: int = 64) -> dict[str, Figure]:
    """resize of touched memory, down in steps and up again, per block."""
    pool = new_pool("resize", SMOLLM2, blocks)
    shrinking, growing = [], []
    for _ in range(5):
        addrs = pool.alloc_mem(blocks)
        for number in addrs.blocks.tolist():
            pool.arena.block_memory(number)[::4096] = 1
        pool.free_mem(addrs)
        for size in range(blocks - step, 0, -step):
            shrinking += clocked(lambda to=size: pool.resize(Tier.DEVICE, to), 1)
        growing += clocked(lambda: pool.resize(Tier.DEVICE, blocks), 1)
    return {
        "resize_shrink_us_per_block": spread([seconds / step * 1e6 for seconds in shrinking]),
        "resize_grow_us_per_block": spread([seconds / (blocks - step) * 1e6 for seconds in growing]),
    }


def index_calls() -> dict[str, Figure]:
    """insert and match with lease of long prompts, in an empty index and among a million cached blocks."""
    pool = new_pool("index", POINTS, 1 << 21)
    figures: dict[str, Figure] = {}
    for label, others in (("empty", 0), ("1M_blocks", 1 << 20)):
        fill_index(pool, others)
        for tokens in (4096, 32768):
            prompt = random_tokens(tokens, seed=tokens + others)
            addrs = pool.alloc_mem(tokens // 16)
            pool.insert(prompt, addrs, NS)
            pool.free_mem(addrs)

            def find(prompt: Tokens = prompt) -> None:
                pool.match(prompt, NS).release()

            taken = [timed(find, time.thread_time, 10) / 10 * 1e6 for _ in range(50)]
            figures[f"match_{tokens}_us_{label}"] = spread(taken)
        figures[f"insert_4096_new_us_{label}"] = spread(inserts(pool, known=0))
        figures[f"insert_4096_90_percent_known_us_{label}"] = spread(inserts(pool, known=230))
    pool.check([])
    return figures


def inserts(pool: MemPool, known: int) -> list[float]:
    """Microseconds per insert of 256 blocks of which ``known`` are cached already."""
    taken = []
    for seed in range(100):
        prompt = random_tokens(4096, seed=10_000 + seed + known * 1000)
        first, rest = pool.alloc_mem(known), pool.alloc_mem(256 - known)
        pool.insert(prompt[: known * 16], first, NS)
        addrs = first.concat(rest)
        insert = functools.partial(pool.insert, prompt, addrs, NS)
        taken.append(timed(insert, time.thread_time) * 1e6)
        pool.free_mem(addrs)
        pool.delete(prompt, NS)
        pool.take_events()
    return taken


def fill_index(pool: MemPool, blocks: int) -> None:
    """Cache prompts of 64 blocks each, half of which share their first half with another."""
    for seed in range(blocks // 64):
        prompt = np.concatenate((random_tokens(512, seed // 2), random_tokens(512, 1 << 20 | seed)))
        addrs = pool.alloc_mem(64)
        pool.insert(prompt, addrs, NS)
        pool.free_mem(addrs)
        pool.take_events()


# --- moving bytes -------------------------------------------------------------------------------------


def copies(blocks: int = 64) -> dict[str, Figure]:
    """The native copy with checksums, and the checksum alone, against glibc memcpy of the same bytes."""
    size = SMOLLM2.block_bytes
    own, peer = Arena.allocate(size, blocks, "source"), Arena.allocate(size, blocks, "target")
    numbers = np.arange(blocks)
    sources, targets = own.pointers(numbers), peer.pointers(numbers)
    for number in range(blocks):
        own.block_memory(number)[:] = number
        peer.block_memory(number)[:] = 0

    def memcpy() -> None:
        for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
            ctypes.memmove(target, source, size)

    sides = {
        "memcpy": memcpy,
        "copy_blocks": lambda: _native.copy_blocks(targets, sources, size),
        "checksum_blocks": lambda: _native.checksum_blocks(targets, size),
    }
    taken = interleaved(sides, rounds=40)
    figures = {f"{name}_64_blocks_gb_per_s": spread(rates(taken[name], blocks * size)) for name in sides}
    figures["copy_blocks_64_blocks_to_memcpy"] = spread(ratios(taken["memcpy"], taken["copy_blocks"]))
    return figures


async def transfers() -> dict[str, Figure]:
    """transfer_with_insert to another process: reserve, copy, verify, publish, beside memcpy of the bytes."""
    address = f"@memserve-benchmark-{os.getpid()}"
    command = (sys.executable, __file__, "--peer", address)
    child = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    await child.stdout.readline()
    pool = new_pool("sender", SMOLLM2, 128)
    clock = MonotonicClock()
    marks: list[float] = []
    endpoint = TransferEndpoint(pool, clock, observe=lambda step: marks.append(time.perf_counter()))
    await endpoint.connect(Member(InstanceId("peer"), 1, Role.DECODE, address))
    src, dst = pool.alloc_mem(64), pool.alloc_mem(64)
    for number in (*src.blocks.tolist(), *dst.blocks.tolist()):
        pool.arena.block_memory(number)[:] = number % 251
    touching = await send_prompts(pool, src, marks, turns=PEER_BLOCKS // 64, seed=0)
    figures = {"shm_64_blocks_first_touch_ms": spread([whole * 1e3 for whole, _ in touching])}
    for blocks in (1, 16, 64):
        figures |= await one_size(pool, src[:blocks], dst[:blocks], marks)
    child.stdin.close()
    await child.wait()
    await endpoint.close()
    return figures


async def one_size(pool: MemPool, src: Addresses, dst: Addresses, marks: list[float]) -> dict[str, Figure]:
    """Whole transfers and their copying part, relative to memcpy of the same bytes, in turns."""
    size, blocks = pool.layout.block_bytes, len(src)

    def memcpy() -> None:
        for target, source in zip(pool.pointers(dst).tolist(), pool.pointers(src).tolist(), strict=True):
            ctypes.memmove(target, source, size)

    copied, whole, copying = [], [], []
    for turn in range(40):
        copied += clocked(memcpy, 1)
        ((sent_in, copied_in),) = await send_prompts(pool, src, marks, turns=1, seed=blocks * 1000 + turn)
        whole.append(sent_in)
        copying.append(copied_in)
    name = f"shm_{blocks}_blocks"
    return {
        f"{name}_transfer_ms": spread([seconds * 1e3 for seconds in whole]),
        f"{name}_transfer_to_memcpy": spread(ratios(copied, whole)),
        f"{name}_copying_to_memcpy": spread(ratios(copied, copying)),
    }


async def send_prompts(
    pool: MemPool, src: Addresses, marks: list[float], turns: int, seed: int
) -> list[tuple[float, float]]:
    """Send ``turns`` prompts that the peer does not know; seconds of the whole and of the copying part."""
    taken = []
    for turn in range(turns):
        prompt = random_tokens(len(src) * 16, seed=1 << 20 | seed + turn)
        marks.clear()
        started = time.perf_counter()
        done = await pool.transfer_with_insert(InstanceId("peer"), prompt, src, NS)
        whole = time.perf_counter() - started
        assert done.sent == len(src), "the peer knew these tokens"
        # After "reserved" come the steps of the copy, then "copied" and "published".
        taken.append((whole, marks[-2] - marks[0]))
    return taken


async def serve_peer(address: str) -> None:
    """The second process: a pool that takes what comes until its standard input ends."""
    clock = MonotonicClock()
    pool = new_pool("peer", SMOLLM2, PEER_BLOCKS)
    endpoint = TransferEndpoint(pool, clock)
    await endpoint.start(address)
    print("ready", flush=True)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    await orders.read()
    await endpoint.close()


# --- measuring ----------------------------------------------------------------------------------------


def new_pool(name: str, layout: KVLayout, blocks: int) -> MemPool:
    return MemPool(layout, blocks, instance=InstanceId(name), incarnation=1, clock=MonotonicClock())


def random_tokens(count: int, seed: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, 49_152, count, dtype=np.int32)


def clocked(call: Callable[[], object], rounds: int, times: int = 1) -> list[float]:
    """Seconds of each of ``rounds`` rounds of ``times`` calls."""
    return [timed(call, time.perf_counter, times) for _ in range(rounds)]


def timed(call: Callable[[], object], clock: Callable[[], float], times: int = 1) -> float:
    """Seconds of ``times`` calls. With ``time.thread_time`` what other processes do does not count."""
    started = clock()
    for _ in range(times):
        call()
    return clock() - started


def interleaved(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, the sides taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            taken[name] += clocked(call, 1)
    return taken


def rates(seconds: list[float], size: int) -> list[float]:
    return [size / taken / 1e9 for taken in seconds]


def ratios(baseline: list[float], ours: list[float]) -> list[float]:
    """How many times as fast as the baseline, turn by turn."""
    return [base / own for base, own in zip(baseline, ours, strict=True)]


def spread(values: list[float]) -> Figure:
    """Median and the middle half."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": round(float(median), 4), "p25": round(float(low), 4), "p75": round(float(high), 4)}


if __name__ == "__main__":
    main()
