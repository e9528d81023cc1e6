"""The tcp backend's receiving side: a listener, and a thread per stream that fills reserved blocks in place.

Knows tickets and bytes; what a transfer is, its link knows.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from memserve.core.errors import MemServeError, ProtocolError
from memserve.mempool.transfer.arrivals import StreamedArrival
from memserve.mempool.transfer.tcp import BLOCKS, HEADER_BYTES, STREAM_NAME_BYTES, unpack_header
from memserve.wire import Security
from memserve.wire.address import TcpAddress
from memserve.wire.channel import Channel, Stalled, open_channel, widen_buffers
from memserve.wire.sockets import bind_tcp, receive_exactly, secure, tune_tcp

log = logging.getLogger(__name__)

_MOST_STRANGERS = 64
"""Connections at once that have not said yet which stream they are."""
_SCRATCH_BYTES = 1 << 20


class StreamOwner(Protocol):
    """A link whose blocks come by stream. Everything but ``find_arrival`` is called in the event loop."""

    def find_arrival(self, ticket: int) -> StreamedArrival | None:
        """Where a ticket's blocks go; None when that transfer is over. Called in the stream's thread."""

    def stream_opened(self, channel: Channel) -> None:
        """The peer has connected."""

    def stream_ended(self, reason: str) -> None:
        """Nothing more comes, and nothing is written any more."""


class StreamListener:
    """Accepts streams at ``host`` on a port of the system's choice: ``port``.

    Raises ``ConfigError`` without a key, or beyond loopback without TLS.
    """

    def __init__(self, host: str, security: Security | None, stall_seconds: float) -> None:
        self._socket, self._tls = bind_tcp(TcpAddress(host, 0), security)
        widen_buffers(self._socket)
        self.port: int = self._socket.getsockname()[1]
        self._security = security
        self._stall_seconds = stall_seconds
        self._owners: dict[bytes, StreamOwner] = {}
        self._threads: set[threading.Thread] = set()
        self._strangers: set[socket.socket] = set()
        self._channels: set[Channel] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def expect(self, owner: StreamOwner) -> bytes:
        """A name for a stream to come, good for one connection."""
        name = secrets.token_bytes(STREAM_NAME_BYTES)
        self._owners[name] = owner
        return name

    def forget(self, name: bytes) -> None:
        """The stream is not expected any more. Harmless for one that has come."""
        self._owners.pop(name, None)

    async def close(self) -> None:
        """Stop accepting, end all streams and wait for their threads."""
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for stranger in list(self._strangers):
            _shut(stranger)
        for channel in list(self._channels):
            channel.shut()
        for thread in list(self._threads):
            await self._loop.run_in_executor(None, thread.join)

    def _accept(self) -> None:
        try:
            connected, _ = self._socket.accept()
        except OSError:
            # Nothing there any more, or no descriptor free: the next connection wakes us again.
            return
        if len(self._strangers) >= _MOST_STRANGERS:
            log.warning("refused a stream: %d others have not said yet who they are", _MOST_STRANGERS)
            connected.close()
            return
        self._strangers.add(connected)
        thread = threading.Thread(
            target=self._serve, args=(connected,), name="memserve-stream-in", daemon=True
        )
        self._threads.add(thread)
        thread.start()

    # --- in the stream's thread ---

    def _serve(self, connected: socket.socket) -> None:
        try:
            admitted = self._admit(connected)
        finally:
            self._strangers.discard(connected)
        if admitted is not None:
            owner, channel = admitted
            reason = self._receive_all(owner, channel)
            self._channels.discard(channel)
            channel.close()
            self._loop.call_soon_threadsafe(owner.stream_ended, reason)
        self._loop.call_soon_threadsafe(self._threads.discard, threading.current_thread())

    def _admit(self, connected: socket.socket) -> tuple[StreamOwner, Channel] | None:
        connected.settimeout(self._stall_seconds)
        try:
            tune_tcp(connected)
            secured = secure(connected, self._tls, self._security, BLOCKS)
        except (OSError, MemServeError) as error:
            log.warning("refused a stream: %s", error)
            return None
        try:
            name = receive_exactly(secured, STREAM_NAME_BYTES)
        except OSError as error:
            log.warning("a stream did not say which it is: %s", error)
            secured.close()
            return None
        owner = self._owners.pop(name, None)
        if owner is None:
            log.warning("refused a stream that nobody expects")
            secured.close()
            return None
        channel = open_channel(secured, self._stall_seconds)
        self._channels.add(channel)
        self._loop.call_soon_threadsafe(owner.stream_opened, channel)
        return owner, channel

    def _receive_all(self, owner: StreamOwner, channel: Channel) -> str:
        """Receive chunks until the stream ends; returns why it did."""
        header = bytearray(HEADER_BYTES)
        try:
            while True:
                _receive_header(channel, header)
                chunk = unpack_header(bytes(header))
                arrival = owner.find_arrival(chunk.ticket)
                memory = (
                    None if arrival is None else arrival.begin(chunk.first, chunk.units, chunk.unit_bytes)
                )
                if arrival is None or memory is None:
                    _discard(channel, chunk.units * chunk.unit_bytes)
                else:
                    _receive_chunk(channel, memory, chunk.units, arrival.finish)
        except (OSError, EOFError, ProtocolError) as error:
            return str(error)


def _receive_header(channel: Channel, header: bytearray) -> None:
    """Wait for the next chunk; the stream may rest as long as it likes between two."""
    first = memoryview(header)[:1]
    while True:
        try:
            channel.receive([first])
        except Stalled:
            continue
        channel.receive([memoryview(header)[1:]])
        return


def _receive_chunk(
    channel: Channel, memory: list[memoryview], units: int, finish: Callable[[int], None]
) -> None:
    arrived = 0
    try:
        channel.receive(memory)
        arrived = units
    finally:
        finish(arrived)


def _discard(channel: Channel, size: int) -> None:
    """Read over the blocks of a transfer that is over."""
    scratch = memoryview(bytearray(min(size, _SCRATCH_BYTES)))
    while size:
        part = scratch[: min(size, len(scratch))]
        channel.receive([part])
        size -= len(part)


def _shut(connected: socket.socket) -> None:
    try:
        connected.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It has ended by itself.
        return
