"""The door of asyncio's TCP connections: lets one through when both sides have proved the cluster key."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

from memserve.core.errors import MemServeError, NotAuthenticated, PeerLost
from memserve.wire.security import KeyProof
from memserve.wire.sockets import tune_tcp


class Gate(asyncio.Protocol):
    """Runs ``proof`` within ``seconds``; then hands the transport to ``make()``, or gives it up.

    ``refused`` is told why not, at most once.
    """

    def __init__(
        self,
        proof: KeyProof,
        seconds: float,
        make: Callable[[], asyncio.Protocol],
        refused: Callable[[MemServeError], None],
    ) -> None:
        self._proof = proof
        self._seconds = seconds
        self._make = make
        self._refused: Callable[[MemServeError], None] | None = refused
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        raw = transport.get_extra_info("socket")
        if raw is not None:
            tune_tcp(raw)
        late = NotAuthenticated(f"no proof of the cluster key within {self._seconds} s")
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._refuse, late)
        self._transport.write(self._proof.start())

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None, "data came before the connection"
        self._buffer += data
        try:
            while not self._proof.done and len(self._buffer) >= self._proof.wanted:
                message = bytes(self._buffer[: self._proof.wanted])
                del self._buffer[: len(message)]
                self._transport.write(self._proof.feed(message))
        except NotAuthenticated as error:
            self._refuse(error)
            return
        if self._proof.done:
            self._let_through(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ssl.SSLError):
            self._refuse(NotAuthenticated(f"TLS was refused: {exc}"))
        else:
            self._refuse(
                PeerLost(
                    "the other side closed it before the keys were compared; "
                    "if it lives, see whether both use TLS and it trusts this side's certificate"
                )
            )

    def _let_through(self, transport: asyncio.Transport) -> None:
        self._settle()
        inside = self._make()
        transport.set_protocol(inside)
        inside.connection_made(transport)
        if self._buffer:
            inside.data_received(bytes(self._buffer))

    def _refuse(self, error: MemServeError) -> None:
        refused = self._refused
        self._settle()
        if self._transport is not None:
            self._transport.abort()
        if refused is not None:
            refused(error)

    def _settle(self) -> None:
        self._refused = None
        if self._timer is not None:
            self._timer.cancel()
