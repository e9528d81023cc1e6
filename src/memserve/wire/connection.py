"""Length-prefixed msgpack frames on an asyncio protocol: notifications, calls with deadlines, replies.

A frame is a header (body length, call number, kind) and a msgpack body. Notifications are handled in the
order in which they came, before anything that came later; each call is handled in a task of its own.
Abstract Unix sockets (``@name``) let in processes of the same user; TCP (``tcp://host:port``) those that
prove the cluster key, between hosts inside mutual TLS.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec

from memserve.core.errors import MemServeError, NotAuthenticated, PeerLost, ProtocolError, error_from_wire
from memserve.core.messages import Failed, Message
from memserve.wire.address import TcpAddress, UnixAddress, parse_address
from memserve.wire.gate import Gate
from memserve.wire.security import KeyProof, Security, require_key, tls_for_connecting
from memserve.wire.sockets import MESSAGES, bind_tcp, closing_on_error

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<IIB")
_NOTIFY, _CALL, _REPLY = 0, 1, 2
MAX_FRAME = 256 << 20
"""Bytes; a longer frame can only be a fault or an attack."""
MAX_UNSENT = 256 << 20
"""Bytes waiting to be sent to a peer that does not read; beyond it the peer counts as lost."""
_QUEUE_FULL_SECONDS = 0.005
_ADMISSION_SECONDS = 10.0
"""For whoever dials: TLS and the proof of the key each."""
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
        if not _admitted(self._transport):
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


async def listen(
    address: str, protocol: Any, make_handler: Callable[[], Handler], security: Security | None = None
) -> asyncio.Server:
    """Accept connections at ``address``, each with a handler of its own; ``security`` is what TCP needs.

    Raises ``ConfigError`` for TCP without a key, or beyond loopback without TLS, and ``OSError``.
    """
    loop = asyncio.get_running_loop()
    place = parse_address(address)
    if isinstance(place, TcpAddress):
        listening, context = bind_tcp(place, security)

        def admit() -> Gate:
            proof = KeyProof(require_key(security), MESSAGES, dialling=False)
            return Gate(proof, _ADMISSION_SECONDS, lambda: Connection(protocol, make_handler()), _log_refusal)

        seconds = _ADMISSION_SECONDS if context is not None else None
        return await loop.create_server(admit, sock=listening, ssl=context, ssl_handshake_timeout=seconds)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with closing_on_error(bound):
        bound.bind(place.path)
    return await loop.create_unix_server(lambda: Connection(protocol, make_handler()), sock=bound)


def listening_address(server: asyncio.Server, address: str) -> str:
    """``address``, with the port that the system chose where it says 0."""
    place = parse_address(address)
    if isinstance(place, UnixAddress) or place.port:
        return address
    return str(TcpAddress(place.host, server.sockets[0].getsockname()[1]))


async def connect(
    address: str, protocol: Any, handler: Handler, timeout: float, security: Security | None = None
) -> Connection:
    """Connect to ``address`` within ``timeout`` seconds; over TCP both sides have proved the cluster key.

    Raises ``PeerLost`` when nobody listens there, ``NotAuthenticated`` when the two do not trust each other,
    ``ConfigError`` when ``security`` lacks what the address needs.
    """
    place = parse_address(address)
    try:
        async with asyncio.timeout(timeout):
            if isinstance(place, UnixAddress):
                return await _connect_unix(place, protocol, handler)
            return await _connect_tcp(place, protocol, handler, timeout, security)
    except (OSError, TimeoutError) as error:
        raise PeerLost(f"cannot reach {address}: {str(error) or 'no answer'}") from error
    except (NotAuthenticated, PeerLost) as error:
        raise type(error)(f"cannot talk to {address}: {error}") from error


async def _connect_unix(place: UnixAddress, protocol: Any, handler: Handler) -> Connection:
    loop = asyncio.get_running_loop()
    connected = await _connect_unix_socket(place.path)
    _, connection = await loop.create_unix_connection(lambda: Connection(protocol, handler), sock=connected)
    return connection


async def _connect_tcp(
    place: TcpAddress, protocol: Any, handler: Handler, timeout: float, security: Security | None
) -> Connection:
    loop = asyncio.get_running_loop()
    proof = KeyProof(require_key(security), MESSAGES, dialling=True)
    connected = await _connect_tcp_socket(place)
    with closing_on_error(connected):
        context = tls_for_connecting(security, connected.getpeername()[0])
    admitted: asyncio.Future[Connection] = loop.create_future()

    def refuse(error: MemServeError) -> None:
        if not admitted.done():
            admitted.set_exception(error)

    def let_through() -> Connection:
        connection = Connection(protocol, handler)
        if not admitted.done():
            admitted.set_result(connection)
        return connection

    try:
        transport, _ = await loop.create_connection(
            lambda: Gate(proof, timeout, let_through, refuse),
            sock=connected,
            ssl=context,
            server_hostname=place.host if context is not None else None,
        )
    except (ssl.SSLError, ConnectionError) as error:
        reason = str(error) or "the other side closed the connection; does it use TLS at all?"
        raise NotAuthenticated(f"TLS was refused: {reason}") from error
    try:
        return await admitted
    except BaseException:
        transport.abort()
        raise


async def _connect_tcp_socket(place: TcpAddress) -> socket.socket:
    loop = asyncio.get_running_loop()
    failed: OSError = ConnectionRefusedError("the name has no address")
    for family, kind, number, _, where in await loop.getaddrinfo(
        place.host, place.port, type=socket.SOCK_STREAM
    ):
        connected = socket.socket(family, kind | socket.SOCK_NONBLOCK, number)
        try:
            with closing_on_error(connected):
                await loop.sock_connect(connected, where)
        except OSError as error:
            failed = error
        else:
            return connected
    raise failed


async def _connect_unix_socket(path: str) -> socket.socket:
    # uvloop cannot connect to abstract names itself. Connecting to a local socket never waits, unless the
    # listener's queue is full, which says EAGAIN.
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with closing_on_error(connected):
        while True:
            try:
                connected.connect(path)
                return connected
            except BlockingIOError:
                await asyncio.sleep(_QUEUE_FULL_SECONDS)


def encode_notification(message: Message) -> bytes:
    """One whole frame, for senders that have no event loop."""
    body = msgspec.msgpack.encode(message)
    return _HEADER.pack(len(body), 0, _NOTIFY) + body


def _log_refusal(error: MemServeError) -> None:
    log.warning("refused a connection: %s", error)


def _admitted(transport: asyncio.Transport) -> bool:
    """Unix sockets: the same user or root. TCP connections have come through the gate."""
    raw = transport.get_extra_info("socket")
    if raw is None:
        return False
    return raw.family != socket.AF_UNIX or same_user(raw)


def same_user(connected: socket.socket) -> bool:
    """Whether a Unix socket's other end is a process of this user, or of root."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return _PEER_CREDENTIALS.unpack(raw)[1] in (os.getuid(), 0)
