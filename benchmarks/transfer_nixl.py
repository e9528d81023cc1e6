"""What moving blocks by the nixl backend costs, beside NIXL driven directly and memcpy.

    python benchmarks/transfer_nixl.py [--out FILE] [--rounds N]

``pool`` is the whole call: reserve, write, checksums on both sides, publish. ``direct`` is one WRITE with a
notification, from prepared descriptor lists, until NIXL says that it is done: no checksums, no messages.
``direct_thread`` is the same by an agent with a progress thread, as NIXL's own Python class makes them.
``cma`` is what UCX chooses on one host (a process writes into another), ``tcp`` what it has between hosts
without RDMA. All sides take turns. Needs NIXL: pip install --no-deps nixl-cu12
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import uvloop

from memserve import _native
from memserve.core.clock import MonotonicClock
from memserve.core.errors import ConfigError
from memserve.mempool import Addresses, MemPool, TransferEndpoint
from memserve.mempool.transfer.nixl_agent import Agent, Offer, load_bindings, read_offer
from recording import write_result
from transfer_backends import (
    LAYOUT,
    PEER,
    PEER_BLOCKS,
    SECURITY,
    SIZES,
    Figure,
    Side,
    new_pool,
    spread,
    timed,
)

WAYS = {"cma": "all", "tcp": "tcp"}
"""UCX_TLS of each."""
IDLE_SECONDS = 3.0
CPU_ROUNDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/transfer_nixl.json")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--peer", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        load_bindings()
    except ConfigError as error:
        sys.exit(f"skipped: {error}")
    if options.peer:
        uvloop.run(serve_peer(options.peer))
        return
    figures: dict[str, Figure] = {}
    for way, transports in WAYS.items():
        os.environ["UCX_TLS"] = transports
        figures |= uvloop.run(measure(way, options.rounds))
    write_result("transfer_nixl", {"isa": _native.isa(), "figures": figures}, options.out)
    for name, figure in figures.items():
        print(f"{name:28s}", "  ".join(f"{key} {value:.4g}" for key, value in figure.items()))


async def measure(way: str, rounds: int) -> dict[str, Figure]:
    async with peer_process() as (address, child):
        side = await Side.connected("nixl", address)
        await side.send(1)
        figures = {
            f"{way}_idle_share_of_a_core_{role}": {"median": round(await idle_share(pid), 4)}
            for role, pid in (("receiving", child.pid), ("sending", os.getpid()))
        }
        offer = await raw_memory(child)
        direct = [Direct(side.pool, side.src, offer, progress=progress) for progress in (False, True)]
        for _ in range(2 * PEER_BLOCKS // max(SIZES)):
            await side.send(max(SIZES))
            for one in direct:
                one.write(max(SIZES))
        for blocks in SIZES:
            figures |= await one_size(way, blocks, rounds, side, direct)
        figures |= await processor_time(way, side, direct, child.pid)
        for one in direct:
            one.agent.close()
        await side.endpoint.close()
    return figures


async def one_size(way: str, blocks: int, rounds: int, side: Side, direct: list[Direct]) -> dict[str, Figure]:
    size = blocks * LAYOUT.block_bytes
    taken: dict[str, list[float]] = {name: [] for name in ("memcpy", "pool", "direct", "direct_thread")}
    for _ in range(rounds):
        taken["memcpy"].append(timed(lambda: side.memcpy(blocks)))
        taken["direct"].append(timed(lambda: direct[0].write(blocks)))
        taken["pool"].append(await side.send(blocks))
        taken["direct_thread"].append(timed(lambda: direct[1].write(blocks)))
    rates = {f"{name}_gb_per_s": [size / one / 1e9 for one in values] for name, values in taken.items()}
    relative = {
        f"pool_to_{name}": [x / y for x, y in zip(taken[name], taken["pool"], strict=True)]
        for name in ("direct", "direct_thread")
    }
    return {f"{way}_{name}_{blocks}": spread(values) for name, values in (rates | relative).items()}


async def processor_time(way: str, side: Side, direct: list[Direct], peer: int) -> dict[str, Figure]:
    """Of both processes together, in seconds per GB of 64 blocks at a time. Other load does not change it."""

    async def by_pool() -> None:
        await side.send(64)

    async def by_nixl(one: Direct) -> None:
        one.write(64)

    figures = {}
    for name, send in (
        ("pool", by_pool),
        ("direct", lambda: by_nixl(direct[0])),
        ("direct_thread", lambda: by_nixl(direct[1])),
    ):
        before = used_seconds(os.getpid()) + used_seconds(peer)
        for _ in range(CPU_ROUNDS):
            await send()
        used = used_seconds(os.getpid()) + used_seconds(peer) - before
        size = CPU_ROUNDS * 64 * LAYOUT.block_bytes
        figures[f"{way}_{name}_cpu_s_per_gb"] = {"median": round(used / size * 1e9, 4)}
    return figures


async def idle_share(pid: int) -> float:
    """Of one core, while nothing is sent."""
    started = used_seconds(pid)
    await asyncio.sleep(IDLE_SECONDS)
    return (used_seconds(pid) - started) / IDLE_SECONDS


def used_seconds(pid: int) -> float:
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Direct:
    """Writes blocks ``src`` of ``pool`` into the memory of ``offer`` by NIXL alone."""

    def __init__(self, pool: MemPool, src: Addresses, offer: Offer, *, progress: bool) -> None:
        self.agent = Agent("direct", pool.arena, progress=progress)
        self.agent.learn(offer)
        self.bindings = load_bindings()
        self.nixl = self.agent._agent
        self.src = src.blocks.astype(np.int32)
        self.next = 0
        ((_, own_blocks),) = pool.arena.extents
        self.own = self.prepare(self.bindings.NIXL_INIT_AGENT, int(pool.arena.map.bases[0]), own_blocks)
        ((_, blocks, base),) = offer.segments
        self.there = self.prepare(offer.agent, base, blocks)

    def prepare(self, agent: str, base: int, blocks: int) -> int:
        size = LAYOUT.block_bytes
        strided = np.array([[base, size, 0, size, blocks]], np.uint64)
        prepared: int = self.nixl.prepXferDlist(agent, self.bindings.DRAM_SEG, strided, [])
        return prepared

    def write(self, blocks: int) -> None:
        own = self.src[:blocks]
        # To other blocks each time, as a pool does, which are in no cache.
        self.next = (self.next + blocks) % PEER_BLOCKS
        there = ((self.next + np.arange(blocks)) % PEER_BLOCKS).astype(np.int32)
        handle = self.nixl.makeXferReq(self.bindings.NIXL_WRITE, self.own, own, self.there, there, "done")
        self.nixl.postXferReq(handle)
        while not self.agent.arrived(handle):
            time.sleep(0)
        self.agent.release(handle)


@contextlib.asynccontextmanager
async def peer_process() -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """The receiving process and its pool's address."""
    address = f"@memserve-benchmark-{os.getpid()}"
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--peer", address, stdin=pipe, stdout=pipe
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert await child.stdout.readline() == b"ready\n"
    yield address, child
    child.stdin.close()
    await child.wait()


async def raw_memory(child: asyncio.subprocess.Process) -> Offer:
    """Memory of the receiving process for writing to directly."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b"register\n")
    return read_offer(bytes.fromhex((await child.stdout.readline()).decode()))


async def serve_peer(address: str) -> None:
    pool = new_pool(PEER, PEER_BLOCKS)
    endpoint = TransferEndpoint(pool, MonotonicClock(), backends=("nixl",), security=SECURITY)
    await endpoint.start(address)
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    print("ready", flush=True)
    await orders.readline()
    raw = new_pool("raw", PEER_BLOCKS)
    agent = Agent("raw", raw.arena, progress=True)
    print(agent.offer().hex(), flush=True)
    await orders.read()
    agent.close()
    await endpoint.close()


if __name__ == "__main__":
    main()
