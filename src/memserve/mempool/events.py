"""The pool's event log: numbered, bounded. A reader that is too slow sees a gap and asks for a snapshot."""

from __future__ import annotations

from collections.abc import Callable

from memserve.core.messages import PoolEvent, PoolEvents
from memserve.core.types import InstanceId


class EventLog:
    """Events not taken yet, at most ``limit_bytes`` of tokens; beyond it all of them are forgotten."""

    def __init__(self, instance: InstanceId, incarnation: int, limit_bytes: int = 64 << 20) -> None:
        self._instance = instance
        self._incarnation = incarnation
        self._limit_bytes = limit_bytes
        self._waiting: list[PoolEvent] = []
        self._bytes = 0
        self._first = 0
        self.notify: Callable[[], None] = _nobody

    @property
    def next_seq(self) -> int:
        """The number that the next event will get."""
        return self._first + len(self._waiting)

    def append(self, event: PoolEvent) -> None:
        """Number an event. Forgets the backlog first if it is over the limit."""
        if self._bytes > self._limit_bytes:
            self.forget()
        self._waiting.append(event)
        self._bytes += len(event.tokens)
        if len(self._waiting) == 1:
            self.notify()

    def take(self) -> PoolEvents | None:
        """All events since the last call, or None if there are none."""
        if not self._waiting:
            return None
        batch = PoolEvents(self._instance, self._incarnation, self._first, tuple(self._waiting))
        self.forget()
        return batch

    def forget(self) -> None:
        """Drop what waits; its numbers are used up."""
        self._first = self.next_seq
        self._waiting = []
        self._bytes = 0


def _nobody() -> None:
    """The reader polls."""
