"""When an instance will have prefilled what it was given: a forecast that corrects itself. Pure."""

from __future__ import annotations

from memserve.core.types import RequestId


class PrefillLine:
    """Requests that one instance has to prefill, with the seconds each is expected to take.

    The forecast assumes that they are served in order. Whatever the real order, it is never later than
    everything that is left would take from now on, and never earlier than now.
    """

    __slots__ = ("_ends", "_left", "free_at")

    def __init__(self) -> None:
        self.free_at = 0.0
        self._ends: dict[RequestId, tuple[float, float]] = {}
        self._left = 0.0

    @property
    def last(self) -> RequestId | None:
        """Who is at the end of the line."""
        return next(reversed(self._ends), None)

    def join(self, request: RequestId, now: float, seconds: float) -> float:
        """Add a request at the end; returns when it will be done."""
        self.free_at = max(now, self.free_at) + seconds
        self._ends[request] = (self.free_at, seconds)
        self._left += seconds
        return self.free_at

    def leave(self, request: RequestId, now: float) -> None:
        """A request is prefilled, or was given up. Unknown ones are ignored."""
        if request not in self._ends:
            return
        first = next(iter(self._ends)) == request
        end, seconds = self._ends.pop(request)
        self._left = self._left - seconds if self._ends else 0.0
        if first:
            self.free_at += max(0.0, now - end)
        self.free_at = min(max(self.free_at, now), now + self._left)
