"""Who may talk over TCP: a cluster key, proved by both sides, and mutual TLS between hosts. Does no I/O.

The proof is a challenge and response with HMAC-SHA256. Each side's answer covers both sides' random numbers,
its own part (dialling or listening) and what the connection is for, so no answer is good anywhere else.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import ssl
from dataclasses import dataclass, field

from memserve.core.errors import ConfigError, NotAuthenticated
from memserve.wire.address import is_loopback

_GREETING = b"memserve"
_VERSION = b"\x01"
_OPENING = _GREETING + _VERSION
_NONCE_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_SHORTEST_KEY = 16


@dataclass(frozen=True, slots=True)
class Security:
    """What TCP connections need: the cluster's key, at least 16 random bytes, the same in all its processes.

    Beyond loopback both sides present certificates: ``server_tls`` is used for listening, ``client_tls`` for
    connecting, and each must demand the other side's certificate. Raises ``ConfigError`` otherwise.
    """

    cluster_key: bytes = field(repr=False)
    server_tls: ssl.SSLContext | None = None
    client_tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        if len(self.cluster_key) < _SHORTEST_KEY:
            raise ConfigError(
                f"the cluster key has {len(self.cluster_key)} bytes; use at least {_SHORTEST_KEY} random ones"
            )
        for name in ("server_tls", "client_tls"):
            context: ssl.SSLContext | None = getattr(self, name)
            if context is not None and context.verify_mode is not ssl.CERT_REQUIRED:
                raise ConfigError(f"{name} does not demand a certificate; set verify_mode to CERT_REQUIRED")


def tls_for_listening(security: Security | None, ip: str) -> ssl.SSLContext | None:
    """The context to listen with at ``ip``; None on loopback without one. Raises ``ConfigError``."""
    return _require(security, ip, None if security is None else security.server_tls, "server_tls")


def tls_for_connecting(security: Security | None, ip: str) -> ssl.SSLContext | None:
    """The context to reach ``ip`` with; None on loopback without one. Raises ``ConfigError``."""
    return _require(security, ip, None if security is None else security.client_tls, "client_tls")


def require_key(security: Security | None) -> bytes:
    """The cluster key. Raises ``ConfigError`` when there is none: TCP is never open to everybody."""
    if security is None:
        raise ConfigError("tcp:// addresses need the cluster key; give a Security, or use @name on one host")
    return security.cluster_key


class KeyProof:
    """One side's part in proving the cluster key. Feed it exactly ``wanted`` bytes at a time until ``done``.

    listening                              dialling
        <- opening, nonce
        -> opening, nonce, listener's proof
        <- dialler's proof
    """

    def __init__(self, key: bytes, purpose: str, *, dialling: bool) -> None:
        self._key = key
        self._purpose = purpose.encode()
        self._dialling = dialling
        self._own = secrets.token_bytes(_NONCE_BYTES)
        self._other = b""
        self.done = False

    @property
    def wanted(self) -> int:
        """How many bytes :meth:`feed` takes next."""
        if self._dialling:
            return len(_OPENING) + _NONCE_BYTES + _PROOF_BYTES
        return _PROOF_BYTES if self._other else len(_OPENING) + _NONCE_BYTES

    def start(self) -> bytes:
        """What to send before anything has come."""
        return _OPENING + self._own if self._dialling else b""

    def feed(self, received: bytes) -> bytes:
        """Take what the other side sent; returns what to send. Raises ``NotAuthenticated``."""
        assert len(received) == self.wanted, "a proof is fed message by message"
        if not self._other:
            self._read_opening(received)
        if not self._dialling and len(received) != _PROOF_BYTES:
            return _OPENING + self._own + self._proof("listening")
        theirs = "listening" if self._dialling else "dialling"
        if not hmac.compare_digest(received[-_PROOF_BYTES:], self._proof(theirs)):
            raise NotAuthenticated("the other side has another cluster key; give both the same one")
        self.done = True
        return self._proof("dialling") if self._dialling else b""

    def _read_opening(self, received: bytes) -> None:
        if not received.startswith(_GREETING):
            raise NotAuthenticated(
                "the other side does not speak MemServe's protocol, or only one side uses TLS"
            )
        if not received.startswith(_OPENING):
            raise NotAuthenticated("the other side is of another version; run the same MemServe on both")
        self._other = received[len(_OPENING) : len(_OPENING) + _NONCE_BYTES]

    def _proof(self, part: str) -> bytes:
        dialled, listened = (self._own, self._other) if self._dialling else (self._other, self._own)
        text = b"|".join((_OPENING, part.encode(), self._purpose)) + b"|" + dialled + listened
        return hmac.digest(self._key, text, hashlib.sha256)


def _require(
    security: Security | None, ip: str, context: ssl.SSLContext | None, name: str
) -> ssl.SSLContext | None:
    require_key(security)
    if context is None and not is_loopback(ip):
        raise ConfigError(f"{ip} is not loopback: connections need mutual TLS; give Security.{name}")
    return context
