"""When an instance will have prefilled what it was given: a forecast that corrects itself. Pure."""

from __future__ import annotations

from collections import deque

from memserve.core.types import RequestId


class Mark:
    """A place in a line; ``at``: when all ahead of it had gone, None while they have not."""

    __slots__ = ("at", "number")

    def __init__(self, number: int, at: float | None = None) -> None:
        self.number = number
        self.at = at


class PrefillLine:
    """Requests that one instance has to prefill, with the seconds each is expected to take.

    The forecast assumes that they are served in order. Whatever the real order, it is never later than
    everything that is left would take from now on, and never earlier than now.
    """

    __slots__ = ("_ends", "_joined", "_left", "_marks", "free_at")

    def __init__(self) -> None:
        self.free_at = 0.0
        self._ends: dict[RequestId, tuple[float, float, int]] = {}
        self._left = 0.0
        self._joined = 0
        self._marks: deque[Mark] = deque()

    @property
    def last(self) -> RequestId | None:
        """Who is at the end of the line."""
        return next(reversed(self._ends), None)

    def join(self, request: RequestId, now: float, seconds: float) -> float:
        """Add a request at the end; returns when it will be done."""
        self.free_at = max(now, self.free_at) + seconds
        self._joined += 1
        self._ends[request] = (self.free_at, seconds, self._joined)
        self._left += seconds
        return self.free_at

    def leave(self, request: RequestId, now: float) -> None:
        """A request is prefilled, or was given up. Unknown ones are ignored."""
        if request not in self._ends:
            return
        first = next(iter(self._ends)) == request
        end, seconds, _ = self._ends.pop(request)
        self._left = self._left - seconds if self._ends else 0.0
        if first:
            self.free_at += max(0.0, now - end)
            self._move_on(now)
        self.free_at = min(max(self.free_at, now), now + self._left)

    def mark(self, now: float) -> Mark:
        """The end of the line as it is now. It learns when all ahead of it have gone."""
        if not self._ends:
            return Mark(self._joined, now)
        if not self._marks or self._marks[-1].number != self._joined:
            self._marks.append(Mark(self._joined))
        return self._marks[-1]

    def _move_on(self, now: float) -> None:
        front = next(iter(self._ends.values()))[2] if self._ends else self._joined + 1
        while self._marks and self._marks[0].number < front:
            self._marks.popleft().at = now
