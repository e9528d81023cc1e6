"""A line between two pools that loses, doubles or holds back one message of a kind. Bytes go elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec

from memserve.core.messages import PeerMessage

from .conftest import fresh_address

_HEADER = struct.Struct("<IIB")


@dataclass
class Line:
    """What happens to the first message of kind ``strikes`` after it was set.

    lose       it never arrives
    double     it arrives twice
    late       it arrives when ``release`` is set
    overtaken  it arrives after the next message in its direction, or when ``release`` is set
    """

    address: str = ""
    strikes: str = ""
    fault: str = ""
    struck: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    def takes(self, body: bytes) -> bool:
        if self.struck.is_set() or not self.strikes:
            return False
        message = msgspec.msgpack.decode(body, type=PeerMessage)
        if type(message).__name__ != self.strikes:
            return False
        self.struck.set()
        return True


@contextlib.asynccontextmanager
async def line_to(address: str) -> AsyncIterator[Line]:
    """A line whose other end is the pool that listens at ``address`` (``@name``)."""
    line = Line(address=fresh_address())
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, answers = await asyncio.open_unix_connection(path="\0" + address.removeprefix("@"))
        await asyncio.gather(_forward(reader, answers, line), _forward(there, writer, line))

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(carry(reader, writer)))

    server = await asyncio.start_unix_server(accept, path="\0" + line.address.removeprefix("@"))
    try:
        yield line
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line) -> None:
    held: list[bytes] = []
    waiting: set[asyncio.Task[None]] = set()

    def let_go() -> None:
        while held:
            writer.write(held.pop())

    async def release() -> None:
        await line.release.wait()
        let_go()

    try:
        while True:
            header = await reader.readexactly(_HEADER.size)
            frame = header + await reader.readexactly(_HEADER.unpack(header)[0])
            if not line.takes(frame[_HEADER.size :]):
                writer.write(frame)
                if line.fault == "overtaken":
                    let_go()
            elif line.fault == "double":
                writer.write(frame + frame)
            elif line.fault != "lose":
                held.append(frame)
                waiting.add(asyncio.ensure_future(release()))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        for task in waiting:
            task.cancel()
        writer.transport.abort()
