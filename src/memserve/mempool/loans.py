"""Blocks that peers have allocated in this pool: each loan runs out unless it is used. Pure; frees nothing.

A loan that has ended while a transfer writes to its blocks is over when that transfer is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memserve.core.errors import InvalidRequest
from memserve.core.types import InstanceId
from memserve.mempool.address import Addresses, Packed


@dataclass(slots=True)
class Loan:
    """Blocks held for ``peer``. ``deadline`` is in seconds of the pool's clock; ``writers`` are transfers."""

    loan: str
    peer: InstanceId
    addrs: Addresses
    seconds: float
    deadline: float
    writers: int = 0
    ended: bool = False


class LoanTable:
    """Loans by id. What a method returns to be freed is forgotten here."""

    def __init__(self) -> None:
        self._standing: dict[str, Loan] = {}

    def __iter__(self) -> Iterator[Loan]:
        return iter(list(self._standing.values()))

    @property
    def blocks(self) -> int:
        """Blocks lent now."""
        return sum(len(loan.addrs) for loan in self._standing.values())

    def find(self, loan: str) -> Loan | None:
        return self._standing.get(loan)

    def add(self, loan: Loan) -> None:
        assert loan.loan not in self._standing, "a loan's id is used once"
        self._standing[loan.loan] = loan

    def covering(self, peer: InstanceId, packed: Packed) -> tuple[Loan, ...]:
        """The loans of these blocks. Raises ``InvalidRequest`` unless all of them are lent to ``peer``."""
        found = [(loan, np.count_nonzero(np.isin(packed, loan.addrs.packed))) for loan in self._of_peer(peer)]
        if sum(count for _, count in found) != len(packed):
            raise InvalidRequest(f"some of {len(packed)} blocks are not lent to {peer}", field="dst")
        return tuple(loan for loan, count in found if count)

    def begin_write(self, loans: Sequence[Loan], now: float) -> None:
        """A transfer writes to blocks of these loans."""
        for loan in loans:
            loan.writers += 1
        self.renew(loans, now)

    def end_write(self, loans: Sequence[Loan], now: float) -> list[Addresses]:
        """A transfer to blocks of these loans is over. Returns what to free."""
        for loan in loans:
            loan.writers -= 1
        self.renew(loans, now)
        return self._drop([loan for loan in loans if loan.ended])

    def renew(self, loans: Sequence[Loan], now: float) -> None:
        """These loans are in use."""
        for loan in loans:
            loan.deadline = now + loan.seconds

    def take_back(self, peer: InstanceId, packed: Packed) -> list[Addresses]:
        """``peer`` needs these blocks no longer; what is not lent to it is left alone. Returns what to free.

        Raises ``InvalidRequest`` while a transfer writes to their loan.
        """
        given = [(loan, np.isin(loan.addrs.packed, packed)) for loan in self._of_peer(peer)]
        given = [(loan, which) for loan, which in given if which.any()]
        busy = [loan.loan for loan, _ in given if loan.writers]
        if busy:
            raise InvalidRequest(f"a transfer writes to {busy[0]}; wait for its end", field="addrs")
        freed = []
        for loan, which in given:
            held = loan.addrs
            freed.append(Addresses(held.instance, held.incarnation, held.packed[which]))
            loan.addrs = Addresses(held.instance, held.incarnation, held.packed[~which])
            if not len(loan.addrs):
                del self._standing[loan.loan]
        return freed

    def end_of_peer(self, peer: InstanceId) -> list[Addresses]:
        """``peer`` is gone. Returns what to free."""
        return self._drop(self._of_peer(peer))

    def end_overdue(self, now: float) -> list[Addresses]:
        """End what has run out and is not in use. Returns what to free."""
        return self._drop([loan for loan in self if loan.deadline <= now and not loan.writers])

    def next_deadline(self) -> float | None:
        """When the next loan that is not being written to runs out; None if there is none."""
        return min((loan.deadline for loan in self._standing.values() if not loan.writers), default=None)

    def _of_peer(self, peer: InstanceId) -> list[Loan]:
        return [loan for loan in self if loan.peer == peer and not loan.ended]

    def _drop(self, loans: Sequence[Loan]) -> list[Addresses]:
        freed = []
        for loan in loans:
            loan.ended = True
            if not loan.writers:
                del self._standing[loan.loan]
                freed.append(loan.addrs)
        return freed
