"""Transfers on their way into this pool: reserved, revoked, finished. Pure; copies nothing, frees nothing.

A transfer id is used once. ``revoked`` means that it can no longer publish, but its writer may still be
at work, so its blocks must not be used for anything else yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from memserve.core.errors import LeaseExpired, MemServeError, StaleAddress, TransferAborted
from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.mempool.address import Addresses
from memserve.mempool.loans import Loan

_REMEMBERED = 4096
"""Finished transfers whose outcome is kept for late and repeated messages."""


@dataclass(slots=True)
class Reservation:
    """Blocks that wait for a peer's bytes.

    ``held`` is the part of the path that was here already (referenced), ``fresh`` what the peer writes.
    ``tokens`` is empty for a plain transfer. ``deadline`` is in seconds of the pool's clock. ``loans`` hold
    the references to ``fresh`` if the peer has chosen its blocks.
    """

    transfer: str
    peer: InstanceId
    namespace: Namespace
    tokens: Tokens
    held: Addresses
    fresh: Addresses
    seconds: float
    deadline: float
    loans: tuple[Loan, ...] = ()
    revoked: bool = False

    @property
    def addrs(self) -> Addresses:
        """All blocks of the path, in order."""
        return self.held.concat(self.fresh)

    @property
    def owned(self) -> Addresses:
        """Blocks to which the reservation itself holds a reference."""
        return self.held if self.loans else self.addrs

    def same_request(
        self, peer: InstanceId, namespace: Namespace, tokens: Tokens, blocks: int, dst: Addresses | None
    ) -> bool:
        """Whether a repeated request is the one that made this reservation."""
        same = (self.peer, self.namespace, len(self.addrs)) == (peer, namespace, blocks)
        chosen = dst is None or dst[len(self.held) :] == self.fresh
        return same and chosen and np.array_equal(self.tokens, tokens)


@dataclass(frozen=True, slots=True)
class Completed:
    """A transfer that was published: ``inserted`` blocks were new in the index."""

    transfer: str
    inserted: int


class ReservationTable:
    """Reservations by transfer id, and how the finished ones ended."""

    def __init__(self) -> None:
        self._standing: dict[str, Reservation] = {}
        self._ended: OrderedDict[str, Completed | MemServeError] = OrderedDict()

    def __len__(self) -> int:
        return len(self._standing)

    def __iter__(self) -> Iterator[Reservation]:
        return iter(list(self._standing.values()))

    def add(self, reservation: Reservation) -> None:
        assert reservation.transfer not in self._standing, "a transfer id is used once"
        self._standing[reservation.transfer] = reservation

    def find(self, transfer: str) -> Reservation | None:
        """A standing reservation, revoked or not."""
        return self._standing.get(transfer)

    def outcome(self, transfer: str) -> Completed | None:
        """What a published transfer brought, None if it has not ended; raises how it failed otherwise."""
        ended = self._ended.get(transfer)
        if isinstance(ended, MemServeError):
            raise ended.with_traceback(None)
        return ended

    def require(self, transfer: str) -> Reservation:
        """The reservation, if it can still publish. Raises ``LeaseExpired`` or how the transfer ended."""
        reservation = self._standing.get(transfer)
        if reservation is not None and not reservation.revoked:
            return reservation
        if reservation is not None:
            raise LeaseExpired(
                f"transfer {transfer}: no progress for {reservation.seconds} s; nothing was published"
            )
        self.outcome(transfer)
        raise StaleAddress(f"transfer {transfer} is unknown here; reserve first")

    def revoke_overdue(self, now: float) -> list[Reservation]:
        """Reservations past their deadline; each is named once."""
        overdue = [r for r in self._standing.values() if not r.revoked and r.deadline <= now]
        for reservation in overdue:
            reservation.revoked = True
        return overdue

    def next_deadline(self) -> float | None:
        """When the next reservation runs out; None if none can."""
        return min((r.deadline for r in self._standing.values() if not r.revoked), default=None)

    def of_peer(self, peer: InstanceId) -> list[Reservation]:
        return [reservation for reservation in self._standing.values() if reservation.peer == peer]

    def end(self, transfer: str, outcome: Completed | MemServeError) -> Reservation | None:
        """Forget a reservation and remember how it ended. The first outcome of a transfer stands."""
        self._ended.setdefault(transfer, outcome)
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        return self._standing.pop(transfer, None)

    def abort(self, transfer: str, reason: str) -> Reservation | None:
        """End a transfer without publishing; one that is not known yet will be refused when it comes."""
        reservation = self._standing.get(transfer)
        error = LeaseExpired if reservation is not None and reservation.revoked else TransferAborted
        return self.end(
            transfer, error(f"transfer {transfer} was ended: {reason}; its blocks are free again")
        )
