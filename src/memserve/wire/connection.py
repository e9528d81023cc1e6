"""Length-prefixed msgpack frames on an asyncio protocol: notifications, calls with deadlines, replies.

A frame is a header (body length, call number, kind) and a msgpack body. Notifications are handled in the
order in which they came, before anything that came later; each call is handled in a task of its own.
Addresses are abstract Unix sockets, written ``@name``: they leave nothing in the file system, and only
processes of the same user are let in.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec

from memserve.core.errors import MemServeError, PeerLost, ProtocolError, error_from_wire
from memserve.core.messages import Failed, Message

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<IIB")
_NOTIFY, _CALL, _REPLY = 0, 1, 2
MAX_FRAME = 256 << 20
"""Bytes; a longer frame can only be a fault or an attack."""
MAX_UNSENT = 256 << 20
"""Bytes waiting to be sent to a peer that does not read; beyond it the peer counts as lost."""
_QUEUE_FULL_SECONDS = 0.005
_PEER_CREDENTIALS = struct.Struct("3i")


class Handler(Protocol):
    """What the owner of a connection does with what arrives."""

    def on_notify(self, connection: Connection, message: Any) -> None:
        """Handle a message that wants no answer. Must not block."""

    async def on_call(self, connection: Connection, message: Any) -> Message:
        """Answer a call. A ``MemServeError`` raised here travels back as ``Failed``."""
        ...

    def on_close(self, connection: Connection, reason: str) -> None:
        """The connection is gone; called exactly once."""


class Connection(asyncio.Protocol):
    """One end of a stream that carries messages of the union ``protocol``."""

    def __init__(self, protocol: Any, handler: Handler) -> None:
        self._handler = handler
        self._decode = msgspec.msgpack.Decoder(protocol).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._buffer = bytearray()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport | None = None
        self._closed_because: str | None = None
        self.label = "peer"
        """Who is at the other end, for messages to people."""

    # --- for the owner ---

    @property
    def closed(self) -> bool:
        return self._closed_because is not None

    def notify(self, message: Message) -> None:
        """Send without waiting for an answer. Raises ``PeerLost`` on a closed connection."""
        self._send(_NOTIFY, 0, message)

    async def call(self, message: Message, timeout: float) -> Any:
        """Send and wait at most ``timeout`` seconds for the answer.

        Raises ``PeerLost`` when the other side is gone or silent, or the error that it reported.
        """
        number = next(self._numbers) & 0xFFFFFFFF
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._send(_CALL, number, message)
            async with asyncio.timeout(timeout):
                reply = await answer
        except TimeoutError:
            raise PeerLost(
                f"{self.label} did not answer {type(message).__name__} within {timeout} s"
            ) from None
        finally:
            self._waiting.pop(number, None)
        if isinstance(reply, Failed):
            raise error_from_wire(reply.kind, reply.message)
        return reply

    def close(self, reason: str = "closed here") -> None:
        """Flush and close. Calls under way fail with ``PeerLost``."""
        if self._transport is not None:
            self._transport.close()
        self._finish(reason)

    # --- for asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not _same_user(self._transport):
            log.warning("refused a connection from another user")
            self.close("other user")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _HEADER.size and not self.closed:
            length, number, kind = _HEADER.unpack_from(self._buffer, at)
            if length > MAX_FRAME:
                self._fail(f"a frame of {length} bytes is beyond the limit of {MAX_FRAME}")
                return
            end = at + _HEADER.size + length
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[at + _HEADER.size : end])
            at = end
            self._receive(kind, number, body)
        del self._buffer[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(str(exc) if exc else "closed by the other side")

    # --- inside ---

    def _send(self, kind: int, number: int, message: Message) -> None:
        if self._transport is None or self.closed:
            raise PeerLost(f"{self.label} is gone: {self._closed_because or 'not connected'}")
        body = self._encode(message)
        self._transport.write(_HEADER.pack(len(body), number, kind) + body)
        if self._transport.get_write_buffer_size() > MAX_UNSENT:
            self._fail(f"{self.label} does not read: {MAX_UNSENT} bytes unsent")

    def _receive(self, kind: int, number: int, body: bytes) -> None:
        try:
            message = self._decode(body)
        except msgspec.MsgspecError as error:
            self._fail(f"cannot decode a message: {error}")
            return
        if kind == _NOTIFY:
            self._handler.on_notify(self, message)
        elif kind == _CALL:
            task = asyncio.get_running_loop().create_task(self._answer(number, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind == _REPLY:
            answer = self._waiting.get(number)
            if answer is not None and not answer.done():
                answer.set_result(message)
        else:
            self._fail(f"frame of unknown kind {kind}")

    async def _answer(self, number: int, message: Message) -> None:
        try:
            reply = await self._handler.on_call(self, message)
        except MemServeError as error:
            reply = Failed(type(error).__name__, str(error))
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("bug while answering %s", type(message).__name__)
            reply = Failed(ProtocolError.__name__, f"internal error while handling {type(message).__name__}")
        if not self.closed:
            self._send(_REPLY, number, reply)

    def _fail(self, reason: str) -> None:
        log.warning("%s: %s", self.label, reason)
        if self._transport is not None:
            self._transport.abort()
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        if self._closed_because is not None:
            return
        self._closed_because = reason
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(PeerLost(f"{self.label} is gone: {reason}"))
        for task in self._tasks:
            task.cancel()
        self._handler.on_close(self, reason)


async def listen(address: str, protocol: Any, make_handler: Callable[[], Handler]) -> asyncio.Server:
    """Accept connections at ``address`` (``@name``), each with a handler of its own."""
    loop = asyncio.get_running_loop()
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        bound.bind(_path(address))
    except OSError:
        bound.close()
        raise
    return await loop.create_unix_server(lambda: Connection(protocol, make_handler()), sock=bound)


async def connect(address: str, protocol: Any, handler: Handler, timeout: float) -> Connection:
    """Connect to ``address``; raises ``PeerLost`` when nobody listens there within ``timeout`` seconds."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            connected = await _connect_socket(_path(address))
            _, connection = await loop.create_unix_connection(
                lambda: Connection(protocol, handler), sock=connected
            )
    except (OSError, TimeoutError) as error:
        raise PeerLost(f"cannot reach {address}: {error or 'no answer'}") from error
    return connection


async def _connect_socket(path: str) -> socket.socket:
    # uvloop cannot connect to abstract names itself. Connecting to a local socket never waits, unless the
    # listener's queue is full, which says EAGAIN.
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                connected.connect(path)
                return connected
            except BlockingIOError:
                await asyncio.sleep(_QUEUE_FULL_SECONDS)
    except BaseException:
        connected.close()
        raise


def encode_notification(message: Message) -> bytes:
    """One whole frame, for senders that have no event loop."""
    body = msgspec.msgpack.encode(message)
    return _HEADER.pack(len(body), 0, _NOTIFY) + body


def open_socket(address: str, timeout: float) -> socket.socket:
    """A blocking socket connected to ``address``, each operation bounded by ``timeout`` seconds."""
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    opened.settimeout(timeout)
    try:
        opened.connect(_path(address))
    except OSError:
        opened.close()
        raise
    return opened


def _path(address: str) -> str:
    if not address.startswith("@"):
        raise ProtocolError(f"address {address!r} is not an abstract Unix socket; write @name")
    return "\0" + address[1:]


def _same_user(transport: asyncio.Transport) -> bool:
    raw = transport.get_extra_info("socket")
    if raw is None or raw.family != socket.AF_UNIX:
        return False
    size = _PEER_CREDENTIALS.size
    _, uid, _ = _PEER_CREDENTIALS.unpack(raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid in (os.getuid(), 0)
