"""The pool's event log: numbered, bounded. A reader that is too slow sees a gap and asks for a snapshot.

Until somebody reads, events are only numbered: whoever comes later sees a gap, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memserve.core.messages import Moved, PoolEvent, PoolEvents, Removed, Stored
from memserve.core.types import InstanceId, Namespace, Tokens, pack_tokens
from memserve.mempool.address import Tier


class EventLog:
    """Events not taken yet, at most ``limit_bytes`` of tokens; beyond it all of them are forgotten."""

    def __init__(self, instance: InstanceId, incarnation: int, limit_bytes: int = 64 << 20) -> None:
        self._instance = instance
        self._incarnation = incarnation
        self._limit_bytes = limit_bytes
        self._waiting: list[PoolEvent] = []
        self._bytes = 0
        self._first = 0
        self._told = 0
        """The number that the reader expects next."""
        self._followed = False
        self._notify: Callable[[], None] = _nobody

    @property
    def next_seq(self) -> int:
        """The number that the next event will get."""
        return self._first + len(self._waiting)

    def follow(self, notify: Callable[[], None]) -> None:
        """Keep events from now on, and have ``notify`` called when there is something to :meth:`take`."""
        self._followed = True
        self._notify = notify
        if self._told < self.next_seq:
            notify()

    def stored(self, namespace: Namespace, tokens: Tokens) -> None:
        """``tokens``, whole blocks from the root on, can be found now."""
        if self._followed:
            self._append(Stored(namespace, pack_tokens(tokens)))
        else:
            self._first += 1

    def removed(self, namespace: Namespace, path: Sequence[Tokens], keep: int) -> None:
        """Of what begins with the parts of ``path`` only the first ``keep`` tokens are left."""
        if self._followed:
            self._append(Removed(namespace, pack_tokens(*path), keep))
        else:
            self._first += 1

    def moved(self, namespace: Namespace, tokens: Tokens, start: int, tier: Tier) -> None:
        """Of the path ``tokens``, what begins with token ``start`` lies in ``tier`` now."""
        if self._followed:
            self._append(Moved(namespace, pack_tokens(tokens), start, tier.label))
        else:
            self._first += 1

    def take(self) -> PoolEvents | None:
        """All events since the last call, None without any; after a gap the batch may be empty."""
        self._followed = True
        if self._told == self.next_seq:
            return None
        batch = PoolEvents(self._instance, self._incarnation, self._first, tuple(self._waiting))
        self.forget()
        return batch

    def forget(self) -> None:
        """The reader gets to know what happened so far by other means; the numbers are used up."""
        self._followed = True
        self._drop()
        self._told = self._first

    def _append(self, event: PoolEvent) -> None:
        if self._bytes > self._limit_bytes:
            self._drop()
        self._waiting.append(event)
        self._bytes += len(event.tokens)
        if len(self._waiting) == 1:
            self._notify()

    def _drop(self) -> None:
        self._first += len(self._waiting)
        self._waiting = []
        self._bytes = 0


def _nobody() -> None:
    """The reader polls."""
