"""A pool in a process of its own, told by JSON lines on standard input what to do; one answer per line."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys

import numpy as np

from memserve.core.clock import MonotonicClock
from memserve.core.errors import MemServeError
from memserve.core.messages import Member
from memserve.core.types import InstanceId, Namespace, Role
from memserve.mempool import (
    Addresses,
    Arrangement,
    KVLayout,
    LayerGate,
    MemPool,
    Origin,
    TransferEndpoint,
    TransferMode,
)
from memserve.wire import Security

NS = Namespace("m")
SECURITY = Security(b"a key for tests only")
BIG = KVLayout("big", layers=30, kv_heads=3, head_dim=64)
LAYOUTS = {kind: dataclasses.replace(BIG, arrangement=kind) for kind in Arrangement}


def tokens_of(seed: int, blocks: int, spare: int = 0) -> np.ndarray:
    """The tokens that go with :func:`fill_blocks` of the same seed."""
    return np.random.default_rng(seed).integers(0, 1000, blocks * BIG.block_tokens + spare, dtype=np.int32)


def fill_blocks(pool: MemPool, addrs: Addresses, seed: int) -> None:
    for at, number in enumerate(addrs.blocks.tolist()):
        memory = pool.arena.block_memory(number)
        memory[:] = pattern(pool, seed, at).reshape(memory.shape)


def holds_pattern(pool: MemPool, addrs: Addresses, seed: int) -> bool:
    """Whether the blocks hold what :func:`fill_blocks` wrote on the other side."""
    return all(
        np.array_equal(pool.arena.block_memory(number).reshape(-1), pattern(pool, seed, at))
        for at, number in enumerate(addrs.blocks.tolist())
    )


def pattern(pool: MemPool, seed: int, at: int) -> np.ndarray:
    return np.random.default_rng((seed, at)).integers(0, 256, pool.layout.block_bytes, dtype=np.uint8)


def member(name: str, address: str, incarnation: int = 1) -> Member:
    return Member(InstanceId(name), incarnation, Role.COLOCATED, address)


class Peer:
    def __init__(
        self,
        name: str,
        incarnation: int,
        blocks: int,
        backend: str,
        reserve_seconds: float,
        arrangement: Arrangement,
    ) -> None:
        clock = MonotonicClock()
        self.pool = MemPool(
            LAYOUTS[arrangement], blocks, instance=InstanceId(name), incarnation=incarnation, clock=clock
        )
        self.endpoint = TransferEndpoint(
            self.pool,
            clock,
            observe=self.die_in_time,
            backends=(backend,),
            security=SECURITY,
            reserve_seconds=reserve_seconds,
        )
        self.last_step = ""
        self.lives = 1

    def die_in_time(self, step: str) -> None:
        if step == self.last_step:
            self.lives -= 1
            if self.lives == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    async def do(self, order: dict) -> object:
        what = order.pop("do")
        return await getattr(self, what)(**order)

    async def die_at(self, step: str, nth: int = 1) -> str:
        self.last_step, self.lives = step, nth
        return "ok"

    async def send(
        self,
        name: str,
        address: str,
        blocks: int,
        seed: int,
        incarnation: int = 1,
        mode: str | None = None,
        layers: int | None = None,
    ) -> list[int]:
        """With ``layers`` the blocks are being computed, and never get further than that if it is not all."""
        self.endpoint.set_peers((member(name, address, incarnation),))
        src = self.pool.alloc_mem(blocks)
        fill_blocks(self.pool, src, seed)
        gate = LayerGate()
        computing = asyncio.ensure_future(open_layer_by_layer(gate, layers or 0))
        try:
            done = await self.pool.transfer_with_insert(
                InstanceId(name),
                tokens_of(seed, blocks),
                src,
                NS,
                origin=Origin.PEER,
                mode=None if mode is None else TransferMode(mode),
                ready=None if layers is None else gate,
            )
        finally:
            computing.cancel()
            self.pool.free_mem(src)
        return [done.held, done.sent, done.bytes]

    async def borrow(self, name: str, address: str, blocks: int, seconds: float) -> str:
        self.endpoint.set_peers((member(name, address),))
        return (await self.pool.alloc_peer_mem(InstanceId(name), blocks, seconds=seconds)).to_bytes().hex()

    async def write(self, name: str, blocks: str, seed: int, mode: str | None = None) -> int:
        """Plain bytes to borrowed blocks."""
        dst = Addresses.from_bytes(InstanceId(name), 1, bytes.fromhex(blocks))
        src = self.pool.alloc_mem(len(dst))
        fill_blocks(self.pool, src, seed)
        try:
            wanted = None if mode is None else TransferMode(mode)
            return (await self.pool.transfer(InstanceId(name), src, dst=dst, mode=wanted)).sent
        finally:
            self.pool.free_mem(src)

    async def incoming(self) -> int:
        return self.pool.stats().incoming

    async def look(self, blocks: int, seed: int) -> list[int]:
        self.pool.check([])
        with self.pool.match(tokens_of(seed, blocks), NS) as match:
            return [len(match.addrs), int(holds_pattern(self.pool, match.addrs, seed))]


async def open_layer_by_layer(gate: LayerGate, layers: int) -> None:
    for computed in range(1, layers + 1):
        await asyncio.sleep(0)
        gate.open(computed)


async def main(
    name: str,
    address: str,
    incarnation: str,
    blocks: str,
    backend: str,
    reserve_seconds: str,
    arrangement: str,
) -> None:
    peer = Peer(
        name, int(incarnation), int(blocks), backend, float(reserve_seconds), Arrangement(arrangement)
    )
    await peer.endpoint.start(address)
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    print(json.dumps("ready"), flush=True)
    while line := await orders.readline():
        try:
            answer = await peer.do(json.loads(line))
        except MemServeError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)
    await peer.endpoint.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
