"""Whole buffers over a connected stream socket, for threads: no copies on the way, no wait without an end."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

_TIMEVAL = struct.Struct("ll")
_BUFFERS = (
    (socket.SO_SNDBUF, Path("/proc/sys/net/core/wmem_max")),
    (socket.SO_RCVBUF, Path("/proc/sys/net/core/rmem_max")),
)
BUFFER_BYTES = 2 << 20
"""On each side of a stream."""
_MOST_BUFFERS = 512
"""Per system call; Linux takes 1,024."""


class Stalled(ConnectionError):
    """The other side has neither read nor written for too long."""


class Channel(Protocol):
    """One thread sends or receives; any thread may ``shut``, which ends what the other does."""

    def send(self, buffers: Sequence[memoryview]) -> None:
        """Send all bytes (views of bytes). Raises ``OSError``; ``Stalled`` when nothing moves."""

    def receive(self, buffers: Sequence[memoryview]) -> None:
        """Fill all buffers. Raises ``OSError``; ``Stalled`` when nothing comes; ``EOFError`` at the end."""

    def shut(self) -> None:
        """End the stream in both directions. Harmless when repeated."""

    def close(self) -> None:
        """Let go of the socket; only for the thread that uses it."""


def widen_buffers(opened: socket.socket) -> None:
    """Fixed socket buffers for bulk transfers; a listening socket's are those of its connections.

    They bound what is on its way, and stay in the cache; what the system would choose by itself varies by a
    factor of two in speed. Where the system allows no more than little buffers its own choice is better.
    """
    for option, limit in _BUFFERS:
        with contextlib.suppress(OSError, ValueError):
            if int(limit.read_text()) >= BUFFER_BYTES:
                opened.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def open_channel(connected: socket.socket, stall_seconds: float) -> Channel:
    """A channel over ``connected``, which it takes over; nothing waits longer without progress."""
    if isinstance(connected, ssl.SSLSocket):
        return _TlsChannel(connected, stall_seconds)
    return _PlainChannel(connected, stall_seconds)


class _SocketChannel:
    """The loops of both kinds: a call moves some bytes, or raises ``stall`` when it has waited too long."""

    stall: type[OSError]

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def _send_some(self, left: list[memoryview]) -> int:
        raise NotImplementedError

    def _receive_some(self, left: list[memoryview]) -> int:
        raise NotImplementedError

    def send(self, buffers: Sequence[memoryview]) -> None:
        left = list(buffers)
        while left:
            try:
                sent = self._send_some(left)
            except self.stall:
                raise Stalled("the other side does not read") from None
            left = _after(left, sent)

    def receive(self, buffers: Sequence[memoryview]) -> None:
        left = list(buffers)
        while left:
            try:
                received = self._receive_some(left)
            except self.stall:
                raise Stalled("nothing comes from the other side") from None
            if not received:
                raise EOFError("the other side closed the stream")
            left = _after(left, received)

    def shut(self) -> None:
        # The method of the base class: TLS objects forget their session here, under another thread's feet.
        # It fails when not connected any more, or closed by its thread.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class _PlainChannel(_SocketChannel):
    """Scatter-gather without TLS. The kernel waits for whole buffers, so few calls need the interpreter."""

    stall = BlockingIOError

    def __init__(self, connected: socket.socket, stall_seconds: float) -> None:
        super().__init__(connected)
        # Python's own timeouts make a socket non-blocking, and then the kernel returns after every packet.
        connected.settimeout(None)
        whole = int(stall_seconds)
        limit = _TIMEVAL.pack(whole, max(1, int((stall_seconds - whole) * 1e6)))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connected.setsockopt(socket.SOL_SOCKET, option, limit)

    def _send_some(self, left: list[memoryview]) -> int:
        return self._socket.sendmsg(left[:_MOST_BUFFERS])

    def _receive_some(self, left: list[memoryview]) -> int:
        return self._socket.recvmsg_into(left[:_MOST_BUFFERS], 0, socket.MSG_WAITALL)[0]


class _TlsChannel(_SocketChannel):
    """Buffer by buffer: TLS has no scatter-gather."""

    stall = TimeoutError

    def __init__(self, connected: ssl.SSLSocket, stall_seconds: float) -> None:
        super().__init__(connected)
        connected.settimeout(stall_seconds)

    def _send_some(self, left: list[memoryview]) -> int:
        return self._socket.send(left[0])

    def _receive_some(self, left: list[memoryview]) -> int:
        return self._socket.recv_into(left[0])


def _after(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left of ``buffers`` after their first ``done`` bytes."""
    for at, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[at + 1 :]]
        done -= len(buffer)
    return []
