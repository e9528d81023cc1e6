"""A network between two processes: passes bytes on until it is told to cut, stall or flip one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

_PIECE = 64 << 10


@dataclass
class Network:
    """``port`` leads to the real one. Faults strike what is sent after the first ``spare`` bytes.

    ``flip`` is the index of a byte in the first piece thereafter.
    """

    port: int = 0
    spare: int = 1 << 20
    cut: bool = False
    stall: bool = False
    flip: int | None = None
    passed: int = 0
    stalled: asyncio.Event = field(default_factory=asyncio.Event)


@contextlib.asynccontextmanager
async def network(to_port: int) -> AsyncIterator[Network]:
    """A proxy on loopback to ``to_port``."""
    faults = Network()
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, answers = await asyncio.open_connection("127.0.0.1", to_port)
        await asyncio.gather(forward(reader, answers, faults), forward(there, writer, Network()))

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(carry(reader, writer))
        tasks.add(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    faults.port = server.sockets[0].getsockname()[1]
    try:
        yield faults
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, faults: Network) -> None:
    try:
        while piece := await reader.read(_PIECE):
            faults.passed += len(piece)
            if faults.passed > faults.spare:
                if faults.cut:
                    break
                if faults.stall:
                    faults.stalled.set()
                    await asyncio.Event().wait()
                if faults.flip is not None:
                    damaged = bytearray(piece)
                    damaged[faults.flip] ^= 1
                    faults.flip, piece = None, bytes(damaged)
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
