"""Sockets: opening, listening, and the blocking handshake for threads that have no event loop."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator

from memserve.core.errors import NotAuthenticated, PeerLost
from memserve.wire.address import TcpAddress, UnixAddress, parse_address
from memserve.wire.security import (
    KeyProof,
    Security,
    require_key,
    tls_for_connecting,
    tls_for_listening,
)

MESSAGES = "messages"
"""What connections are for unless said otherwise; the key's proof covers it."""
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
_BACKLOG = 128


def open_socket(
    address: str, timeout: float, security: Security | None = None, purpose: str = MESSAGES
) -> socket.socket:
    """A blocking socket connected to ``address``, each operation bounded by ``timeout`` seconds.

    Over TCP both sides have proved the cluster key when this returns. Raises ``OSError``, ``PeerLost``,
    ``NotAuthenticated``, ``ConfigError``.
    """
    place = parse_address(address)
    if isinstance(place, UnixAddress):
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with closing_on_error(opened):
            opened.settimeout(timeout)
            opened.connect(place.path)
        return opened
    require_key(security)
    opened = socket.create_connection((place.host, place.port), timeout)
    with closing_on_error(opened):
        tune_tcp(opened)
        context = tls_for_connecting(security, opened.getpeername()[0])
    return secure(opened, context, security, purpose, server_hostname=place.host)


def secure(
    plain: socket.socket,
    context: ssl.SSLContext | None,
    security: Security | None,
    purpose: str,
    server_hostname: str | None = None,
) -> socket.socket:
    """TLS if there is a ``context``, then the proof of the key; ``server_hostname`` is the dialling side's.

    Takes ``plain`` over, which has a timeout. Raises ``NotAuthenticated``, ``PeerLost``.
    """
    secured = plain
    try:
        if context is not None:
            dialling = server_hostname is not None
            secured = context.wrap_socket(plain, server_side=not dialling, server_hostname=server_hostname)
        _prove(secured, KeyProof(require_key(security), purpose, dialling=server_hostname is not None))
    except ssl.SSLError as error:
        secured.close()
        raise NotAuthenticated(f"TLS was refused: {error}") from error
    except OSError as error:
        secured.close()
        raise PeerLost(f"the connection ended during the handshake: {error}") from error
    except BaseException:
        secured.close()
        raise
    return secured


def bind_tcp(place: TcpAddress, security: Security | None) -> tuple[socket.socket, ssl.SSLContext | None]:
    """A listening socket and the TLS to use on it. Raises ``ConfigError``, ``OSError``."""
    require_key(security)
    found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, number, _, where = found[0]
    context = tls_for_listening(security, str(where[0]))
    bound = socket.socket(family, kind, number)
    with closing_on_error(bound):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    return bound, context


def tune_tcp(connected: socket.socket) -> None:
    """Send at once, and notice a host that has vanished even while nothing is sent."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connected.setsockopt(socket.IPPROTO_TCP, option, value)


@contextlib.contextmanager
def closing_on_error(opened: socket.socket) -> Iterator[None]:
    """Close ``opened`` when the body fails."""
    try:
        yield
    except BaseException:
        opened.close()
        raise


def receive_exactly(connected: socket.socket, size: int) -> bytes:
    """Read ``size`` bytes. Raises ``ConnectionError`` when the stream ends before."""
    received = bytearray()
    while len(received) < size:
        part = connected.recv(size - len(received))
        if not part:
            raise ConnectionResetError("the other side closed it")
        received += part
    return bytes(received)


def _prove(connected: socket.socket, proof: KeyProof) -> None:
    connected.sendall(proof.start())
    while not proof.done:
        connected.sendall(proof.feed(receive_exactly(connected, proof.wanted)))
