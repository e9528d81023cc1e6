"""The tcp backend's sending side: units over a stream of their own, straight from the arena, in chunks.

A stream begins with the name that the receiver gave it. A chunk is a header (ticket, first unit, units, bytes
of a unit, CRC-32 of these) and the units' bytes. Its size is such that a checksum finds in the cache what the
copy to or from the socket has touched.
"""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from memserve._native import checksum_blocks
from memserve.core.errors import PeerLost, ProtocolError, TransferAborted
from memserve.core.messages import Hello
from memserve.core.types import InstanceId
from memserve.mempool.arena import Arena
from memserve.mempool.transfer.backends import TCP, Moved, Transmission
from memserve.wire import Security
from memserve.wire.address import TcpAddress, UnixAddress, parse_address
from memserve.wire.channel import Channel, open_channel, widen_buffers
from memserve.wire.sockets import closing_on_error, open_socket

BLOCKS = "blocks"
"""What the connection is for, as the proof of the key says."""
_HEADER = struct.Struct("<QIII")
_HEADER_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _HEADER_CHECKSUM.size
STREAM_NAME_BYTES = 16
CHUNK_BYTES = 512 << 10
"""Bytes of units per chunk, at least one unit."""


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What goes before the bytes of ``units`` units, of which ``first`` is the number in the transfer."""

    ticket: int
    first: int
    units: int
    unit_bytes: int


def pack_header(header: ChunkHeader) -> bytes:
    """``HEADER_BYTES`` bytes."""
    packed = _HEADER.pack(header.ticket, header.first, header.units, header.unit_bytes)
    return packed + _HEADER_CHECKSUM.pack(zlib.crc32(packed))


def unpack_header(raw: bytes) -> ChunkHeader:
    """Inverse of :func:`pack_header`. Raises ``ProtocolError`` for a damaged header."""
    packed = raw[: _HEADER.size]
    if _HEADER_CHECKSUM.unpack(raw[_HEADER.size :])[0] != zlib.crc32(packed):
        raise ProtocolError("a chunk's header is damaged")
    return ChunkHeader(*_HEADER.unpack(packed))


class TcpBackend:
    """A stream of blocks to ``peer`` and the thread that feeds it."""

    name = TCP

    def __init__(self, own: Arena, peer: InstanceId, channel: Channel) -> None:
        self.workers = ThreadPoolExecutor(1, thread_name_prefix="memserve-stream")
        self._own = own
        self._peer = peer
        self._channel = channel

    def transmit(self, order: Transmission) -> Moved:
        checksums = [np.empty(0, np.uint64)]
        first, calls, size = order.first, 0, order.unit_bytes
        most = max(1, CHUNK_BYTES // size)
        for step in order.steps:
            if not order.may_go_on():
                raise TransferAborted("the stream was stopped half-way; nothing was published")
            units = self._own.units(step.src, step.parts, size)
            for at in range(0, len(step.src), most):
                pointers = units.pointers[at : at + most]
                checksums.append(checksum_blocks(pointers, size))
                memory = units.views(at, len(pointers))
                self._send(ChunkHeader(order.ticket, first, len(pointers), size), memory)
                first += len(pointers)
                calls += len(memory)
        return Moved(np.concatenate(checksums), calls)

    def interrupt(self) -> None:
        self._channel.shut()

    def close(self) -> None:
        self._channel.shut()
        self.workers.submit(self._channel.close)
        self.workers.shutdown(wait=False)

    def _send(self, header: ChunkHeader, memory: list[memoryview]) -> None:
        try:
            self._channel.send([memoryview(pack_header(header)), *memory])
        except OSError as error:
            # Half a chunk may be out: whatever came next would be taken for the rest of it.
            self._channel.shut()
            raise PeerLost(f"the stream of blocks to {self._peer} broke off: {error}") from error


def connect_stream(
    own: Arena, peer_address: str, hello: Hello, security: Security | None, timeout: float
) -> TcpBackend:
    """Open the stream that ``hello`` offers, at the host of ``peer_address``. Blocks, so for a worker thread.

    Raises ``PeerLost``, ``NotAuthenticated``, ``ConfigError``.
    """
    place = parse_address(peer_address)
    host = "127.0.0.1" if isinstance(place, UnixAddress) else place.host
    where = str(TcpAddress(host, hello.tcp_port))
    try:
        connected = open_socket(where, timeout, security, BLOCKS)
        with closing_on_error(connected):
            widen_buffers(connected)
            channel = open_channel(connected, timeout)
            channel.send([memoryview(hello.stream)])
    except OSError as error:
        raise PeerLost(f"cannot open a stream of blocks to {hello.instance} at {where}: {error}") from error
    return TcpBackend(own, hello.instance, channel)
