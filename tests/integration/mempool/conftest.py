"""Real peer processes and endpoints in this process, all of them ended with the test."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from memserve.core.clock import Clock, MonotonicClock
from memserve.core.errors import ConfigError
from memserve.core.types import InstanceId
from memserve.mempool import Arrangement, KVLayout, MemPool, TransferEndpoint
from memserve.mempool.transfer.nixl_agent import load_bindings

SMALL = KVLayout("small", layers=2, kv_heads=1, head_dim=64)
DEADLINE = 30.0
_numbers = itertools.count()


def _why_no_nixl() -> str:
    try:
        load_bindings()
    except ConfigError as error:
        return str(error)
    return ""


needs_nixl = pytest.mark.skipif(bool(_why_no_nixl()), reason=_why_no_nixl())


def fresh_address() -> str:
    return f"@memserve-test-{os.getpid()}-{next(_numbers)}"


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that another process or task brings about."""
    async with asyncio.timeout(DEADLINE):
        while not true():
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def serving(
    name: str = "a",
    *,
    layout: KVLayout = SMALL,
    blocks: int = 16,
    incarnation: int = 1,
    address: str | None = None,
    clock: Clock | None = None,
    observe: Callable[[str], None] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[MemPool, TransferEndpoint, str]]:
    """A pool that listens, in this process."""
    clock = clock or MonotonicClock()
    pool = MemPool(layout, blocks, instance=InstanceId(name), incarnation=incarnation, clock=clock)
    endpoint = TransferEndpoint(pool, clock, observe=observe, **options)
    where = address or fresh_address()
    await endpoint.start(where)
    try:
        yield pool, endpoint, endpoint.address
    finally:
        await endpoint.close()
        pool.check()
        pool.close()


class PeerProcess:
    """A pool in a process of its own; see ``peer_process``."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address

    async def do(self, what: str, **details: object) -> object:
        """Give an order and wait for the answer; None if the process died over it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **details}).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> object:
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            line = await self.process.stdout.readline()
        return json.loads(line) if line else None


@contextlib.asynccontextmanager
async def peer_process(
    name: str = "b",
    *,
    blocks: int = 64,
    incarnation: int = 1,
    address: str | None = None,
    backend: str = "shm",
    reserve_seconds: float = 30.0,
    arrangement: Arrangement = Arrangement.AGGREGATED,
) -> AsyncIterator[PeerProcess]:
    where = address or fresh_address()
    program = str(Path(__file__).with_name("peer_process.py"))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        program,
        name,
        where,
        str(incarnation),
        str(blocks),
        backend,
        str(reserve_seconds),
        arrangement,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    peer = PeerProcess(process, where)
    try:
        assert await peer.answer() == "ready"
        yield peer
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
