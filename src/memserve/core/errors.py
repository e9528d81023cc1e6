"""Every error MemServe raises on purpose. The type says whose fault it is and what was done about it."""

from __future__ import annotations

import enum


class MemServeError(Exception):
    """Base of all errors raised by MemServe."""


# --- the caller's side -------------------------------------------------------------------------------


class InvalidRequest(MemServeError):
    """A request that can never work as it stands.

    Attributes
    ----------
    field : str
        Name of the offending field, as the caller spelt it.
    code : str
        Machine-readable reason, for example ``context_length_exceeded``.
    """

    def __init__(self, message: str, *, field: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class ConfigError(MemServeError):
    """A setting is wrong; the message names it, its value and what would be accepted."""


class ModelError(MemServeError):
    """A model cannot be loaded; the message names the file and what is wrong with it."""


# --- MemPool ------------------------------------------------------------------------------------------


class OutOfBlocks(MemServeError):
    """An allocation that cannot be met now, even after evicting all that may be evicted. Units: blocks."""

    def __init__(self, *, asked: int, free: int, evictable: int, pinned: int) -> None:
        super().__init__(
            f"{asked} blocks asked for; {free} free, {evictable} evictable, "
            f"{pinned} held by requests or leases"
        )
        self.asked = asked
        self.free = free
        self.evictable = evictable
        self.pinned = pinned


class PeerOutOfBlocks(OutOfBlocks):
    """The receiver of a transfer has no room; its numbers are in the message only. Try again later."""

    def __init__(self, message: str) -> None:
        super().__init__(asked=0, free=0, evictable=0, pinned=0)
        self.args = (message,)


class StaleAddress(MemServeError):
    """An address whose block has since been freed or belongs to an earlier incarnation of its instance."""


class LayoutMismatch(MemServeError):
    """Two pools whose blocks do not have the same fingerprint cannot exchange them."""


class CorruptBlock(MemServeError):
    """Bytes that do not agree with their checksum; they were discarded."""


class LeaseExpired(MemServeError):
    """A lease or reservation that ran out before it was used."""


class TransferAborted(MemServeError):
    """A transfer that did not publish; what it had allocated on the receiver is free again."""


# --- processes and wires ------------------------------------------------------------------------------


class PeerLost(MemServeError):
    """The process at the other end of a connection is gone or does not answer."""


class NotAuthenticated(MemServeError):
    """A connection that one of its ends refused: keys, certificates or users do not agree."""


class ProtocolError(MemServeError):
    """The other side sent something that the protocol does not allow."""


class NoInstance(MemServeError):
    """No living instance can take the request; it may be tried again later."""


class Refusal(enum.StrEnum):
    """Why a request is not taken that could be at another time."""

    OVERLOADED = "overloaded"
    TENANT_QUEUE_FULL = "tenant_queue_full"
    QUEUE_FULL = "queue_full"
    SLO_TTFT = "slo_ttft"


class Overloaded(MemServeError):
    """The request was refused because too much is to be done; it may be tried again later.

    Attributes
    ----------
    reason : Refusal
    retry_after : float
        Seconds after which that is promising.
    """

    def __init__(
        self, message: str, *, reason: Refusal = Refusal.OVERLOADED, retry_after: float = 1.0
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class RequestFailed(MemServeError):
    """A request that was accepted and could not be finished; the message says why."""


_BY_NAME: dict[str, type[MemServeError]] = {
    cls.__name__: cls
    for cls in (
        ConfigError,
        StaleAddress,
        LayoutMismatch,
        CorruptBlock,
        LeaseExpired,
        TransferAborted,
        PeerLost,
        NotAuthenticated,
        ProtocolError,
        NoInstance,
        Overloaded,
        RequestFailed,
    )
}


def error_from_wire(kind: str, message: str) -> MemServeError:
    """Rebuild an error that another process reported; an unknown kind becomes ``RequestFailed``."""
    if kind == OutOfBlocks.__name__:
        return PeerOutOfBlocks(message)
    if kind == InvalidRequest.__name__:
        return InvalidRequest(message, field="")
    return _BY_NAME.get(kind, RequestFailed)(message if kind in _BY_NAME else f"{kind}: {message}")
