"""The tcp backend's sending side: blocks over a stream of their own, straight from the arena, in chunks.

A stream begins with the name that the receiver gave it. A chunk is a header (ticket, first block, blocks,
CRC-32 of these) and the blocks' bytes. Its size is such that a checksum finds in the cache what the copy
to or from the socket has touched.
"""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from memserve._native import checksum_blocks
from memserve.core.errors import PeerLost, ProtocolError, TransferAborted
from memserve.core.messages import Hello
from memserve.core.types import InstanceId
from memserve.mempool.address import BlockNumbers
from memserve.mempool.arena import Arena
from memserve.mempool.transfer.backends import TCP, Transmission
from memserve.wire import Security
from memserve.wire.address import TcpAddress, UnixAddress, parse_address
from memserve.wire.channel import Channel, open_channel, widen_buffers
from memserve.wire.sockets import closing_on_error, open_socket

BLOCKS = "blocks"
"""What the connection is for, as the proof of the key says."""
HEADER_BYTES = 20
_HEADER = struct.Struct("<QII")
_HEADER_CHECKSUM = struct.Struct("<I")
STREAM_NAME_BYTES = 16
CHUNK_BYTES = 512 << 10
"""Bytes of blocks per chunk, at least one block."""


def pack_header(ticket: int, first: int, blocks: int) -> bytes:
    """What goes before the ``blocks`` blocks of a chunk, of which ``first`` is the number in the transfer."""
    packed = _HEADER.pack(ticket, first, blocks)
    return packed + _HEADER_CHECKSUM.pack(zlib.crc32(packed))


def unpack_header(header: bytes) -> tuple[int, int, int]:
    """Ticket, first block and blocks. Raises ``ProtocolError`` for a damaged header."""
    packed = header[: _HEADER.size]
    if _HEADER_CHECKSUM.unpack(header[_HEADER.size :])[0] != zlib.crc32(packed):
        raise ProtocolError("a chunk's header is damaged")
    ticket, first, blocks = _HEADER.unpack(packed)
    return ticket, first, blocks


class TcpBackend:
    """A stream of blocks to ``peer`` and the thread that feeds it."""

    name = TCP

    def __init__(self, own: Arena, peer: InstanceId, channel: Channel) -> None:
        self.workers = ThreadPoolExecutor(1, thread_name_prefix="memserve-stream")
        self._own = own
        self._peer = peer
        self._channel = channel

    def transmit(self, order: Transmission) -> NDArray[np.uint64]:
        checksums = [np.empty(0, np.uint64)]
        first = 0
        for step in order.steps:
            if not order.may_go_on():
                raise TransferAborted("the stream was stopped half-way; nothing was published")
            for part in _chunks(step.src, self._own.block_bytes):
                checksums.append(checksum_blocks(self._own.pointers(part), self._own.block_bytes))
                self._send(order.ticket, first, part)
                first += len(part)
        return np.concatenate(checksums)

    def interrupt(self) -> None:
        self._channel.shut()

    def close(self) -> None:
        self._channel.shut()
        self.workers.submit(self._channel.close)
        self.workers.shutdown(wait=False)

    def _send(self, ticket: int, first: int, numbers: BlockNumbers) -> None:
        header = memoryview(pack_header(ticket, first, len(numbers)))
        blocks = [self._own.block_memory(number).data for number in numbers.tolist()]
        try:
            self._channel.send([header, *blocks])
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


def _chunks(numbers: BlockNumbers, block_bytes: int) -> list[BlockNumbers]:
    blocks = max(1, CHUNK_BYTES // block_bytes)
    return [numbers[at : at + blocks] for at in range(0, len(numbers), blocks)]
