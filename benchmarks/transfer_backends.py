"""What moving blocks to another process costs by each backend, beside memcpy and a bare socket loop.

    python benchmarks/transfer_backends.py [--out FILE] [--rounds N]

A transfer is the whole call: reserve, move, verify, publish. ``memcpy`` copies the same bytes inside this
process; ``socket`` sends them block by block over a loopback TCP connection with blocking calls, into the
same kind of memory, and waits for one byte in return: no checksums, no messages. All sides take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import uvloop

from memserve import _native
from memserve.core.clock import MonotonicClock
from memserve.core.messages import Member
from memserve.core.types import InstanceId, Namespace, Role
from memserve.mempool import Addresses, KVLayout, MemPool, TransferEndpoint
from memserve.wire import Security
from memserve.wire.channel import widen_buffers
from recording import write_result

NS = Namespace("benchmark")
LAYOUT = KVLayout("SmolLM2-135M", layers=30, kv_heads=3, head_dim=64)
SECURITY = Security(b"only good for a benchmark on loopback")
SIZES = (1, 16, 64, 256)
PEER_BLOCKS = 512
PEER = InstanceId("peer")
_COUNT = struct.Struct("<Q")
Figure = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/transfer_backends.json")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--peer", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        uvloop.run(serve_peer(options.peer))
        return
    figures = uvloop.run(measure(options.rounds))
    write_result("transfer_backends", {"isa": _native.isa(), "figures": figures}, options.out)
    for name, figure in figures.items():
        print(f"{name:28s}", "  ".join(f"{key} {value:.4g}" for key, value in figure.items()))


async def measure(rounds: int) -> dict[str, Figure]:
    async with peer_process() as (address, raw):
        shm, tcp = [await Side.connected(name, address) for name in ("shm", "tcp")]
        # Every page of the peer is mapped and touched once before anything counts.
        for side in (shm, tcp):
            for _ in range(2 * PEER_BLOCKS // max(SIZES)):
                await side.send(max(SIZES))
        figures: dict[str, Figure] = {}
        for blocks in SIZES:
            figures |= await one_size(blocks, rounds, shm, tcp, raw)
        for side in (shm, tcp):
            await side.endpoint.close()
    return figures


async def one_size(blocks: int, rounds: int, shm: Side, tcp: Side, raw: socket.socket) -> dict[str, Figure]:
    size = blocks * LAYOUT.block_bytes
    taken: dict[str, list[float]] = {name: [] for name in ("memcpy", "socket", "shm", "tcp")}
    for _ in range(rounds):
        taken["memcpy"].append(timed(lambda: shm.memcpy(blocks)))
        taken["socket"].append(timed(lambda: send_raw(raw, tcp, blocks)))
        taken["shm"].append(await shm.send(blocks))
        taken["tcp"].append(await tcp.send(blocks))
    ratios = {
        "shm_to_memcpy": (taken["memcpy"], taken["shm"]),
        "tcp_to_socket": (taken["socket"], taken["tcp"]),
    }
    rates = {f"{name}_gb_per_s": [size / one / 1e9 for one in values] for name, values in taken.items()}
    relative = {name: [x / y for x, y in zip(*pair, strict=True)] for name, pair in ratios.items()}
    return {f"{name}_{blocks}": spread(values) for name, values in (rates | relative).items()}


class Side:
    """A pool whose blocks go to the peer by one backend."""

    def __init__(self, pool: MemPool, endpoint: TransferEndpoint) -> None:
        self.pool = pool
        self.endpoint = endpoint
        self.src = pool.alloc_mem(max(SIZES))
        self.spare = pool.alloc_mem(max(SIZES))
        self._turns = 0
        for number in (*self.src.blocks.tolist(), *self.spare.blocks.tolist()):
            pool.arena.block_memory(number)[:] = number % 251

    @staticmethod
    async def connected(backend: str, address: str) -> Side:
        pool = new_pool(backend, 2 * max(SIZES))
        endpoint = TransferEndpoint(pool, MonotonicClock(), backends=(backend,), security=SECURITY)
        await endpoint.connect(Member(PEER, 1, Role.DECODE, address))
        return Side(pool, endpoint)

    async def send(self, blocks: int) -> float:
        """Seconds of a transfer of a prompt that the peer does not know."""
        self._turns += 1
        seed = (len(self.pool.instance), ord(self.pool.instance[0]), self._turns)
        prompt = np.random.default_rng(seed).integers(0, 49_152, blocks * 16, dtype=np.int32)
        started = time.perf_counter()
        done = await self.pool.transfer_with_insert(PEER, prompt, self.src[:blocks], NS)
        taken = time.perf_counter() - started
        assert done.sent == blocks, "the peer knew these tokens"
        return taken

    def memcpy(self, blocks: int) -> None:
        targets, sources = self.pointers(self.spare, blocks), self.pointers(self.src, blocks)
        for target, source in zip(targets, sources, strict=True):
            ctypes.memmove(target, source, LAYOUT.block_bytes)

    def pointers(self, addrs: Addresses, blocks: int) -> list[int]:
        found: list[int] = self.pool.pointers(addrs[:blocks]).tolist()
        return found


# --- the bare socket loop -----------------------------------------------------------------------------


def send_raw(raw: socket.socket, side: Side, blocks: int) -> None:
    raw.sendall(_COUNT.pack(blocks))
    for number in side.src.blocks[:blocks].tolist():
        raw.sendall(side.pool.arena.block_memory(number).data)
    raw.recv(1)


def receive_raw(listening: socket.socket) -> None:
    connected, _ = listening.accept()
    pool = new_pool("raw", max(SIZES))
    with connected:
        while asked := connected.recv(_COUNT.size, socket.MSG_WAITALL):
            for number in range(_COUNT.unpack(asked)[0]):
                connected.recv_into(pool.arena.block_memory(number).data, 0, socket.MSG_WAITALL)
            connected.sendall(b"!")


# --- processes ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def peer_process() -> AsyncIterator[tuple[str, socket.socket]]:
    """The receiving process: its pool's address, and a socket to its bare loop."""
    address = f"@memserve-benchmark-{os.getpid()}"
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--peer",
        address,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    port = int(await child.stdout.readline())
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        widen_buffers(raw)
        yield address, raw
    child.stdin.close()
    await child.wait()


async def serve_peer(address: str) -> None:
    pool = new_pool(PEER, PEER_BLOCKS)
    endpoint = TransferEndpoint(pool, MonotonicClock(), security=SECURITY)
    await endpoint.start(address)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        widen_buffers(listening)
        threading.Thread(target=receive_raw, args=(listening,), daemon=True).start()
        print(listening.getsockname()[1], flush=True)
        orders = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        await orders.read()
    await endpoint.close()


def new_pool(name: str, blocks: int) -> MemPool:
    return MemPool(LAYOUT, blocks, instance=InstanceId(name), incarnation=1, clock=MonotonicClock())


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spread(values: list[float]) -> Figure:
    """Median and the middle half."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": round(float(median), 4), "p25": round(float(low), 4), "p75": round(float(high), 4)}


if __name__ == "__main__":
    main()
