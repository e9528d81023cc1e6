"""When an instance will have prefilled what it was given: a forecast that corrects itself. Pure.

As engines do it: half of the time goes to the prompt that came first, the other half to the shortest.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import islice

from memserve.core.types import RequestId


class Mark:
    """A place in a line; ``at``: when all ahead of it had gone, None while they have not."""

    __slots__ = ("at", "number")

    def __init__(self, number: int, at: float | None = None) -> None:
        self.number = number
        self.at = at


_NOBODY_AHEAD = Mark(0, -math.inf)


class PrefillLine:
    """Requests that one instance has to prefill, with the seconds each is expected to take.

    One that should be done and is not keeps its share of the instance until it leaves. The end of the whole
    line is never later than everything that is left would take from now on, and never earlier than now.
    """

    __slots__ = ("_at", "_joined", "_left", "_marks", "_numbers", "_stepping", "_whole", "free_at")

    def __init__(self) -> None:
        self.free_at = 0.0
        self._at = 0.0
        self._left: dict[RequestId, float] = {}
        """Seconds of work, in order of arrival."""
        self._whole: dict[RequestId, float] = {}
        """Seconds of work that each came with."""
        self._numbers: dict[RequestId, int] = {}
        self._joined = 0
        self._stepping = 0
        """Who came up to then may be in the step that runs."""
        self._marks: deque[Mark] = deque()

    def behind_first(self, enough: float) -> float:
        """Seconds that all but the first in line came with, counted until they are ``enough``.

        Passing time does not lessen them: where work takes longer than was expected, they stay.
        """
        seconds = 0.0
        for whole in islice(self._whole.values(), 1, None):
            seconds += whole
            if seconds >= enough:
                break
        return seconds

    def count_delayed(self, step: float) -> int:
        """How many would be done later if one more joined, where a whole step of prompts takes ``step`` s.

        All but those who may be done with the step that runs: whoever comes now gets into the next one.
        """
        delayed = len(self._left)
        for request, left in self._left.items():
            if self._numbers[request] > self._stepping:
                break
            delayed -= left <= step
        return delayed

    def join(self, request: RequestId, now: float, seconds: float) -> float:
        """Add a request at the end; returns when the line will be done."""
        self._advance(now)
        self.free_at = max(now, self.free_at) + seconds
        self._joined += 1
        if not self._left:
            self._stepping = self._joined
        self._left[request] = self._whole[request] = seconds
        self._numbers[request] = self._joined
        return self.free_at

    def leave(self, request: RequestId, now: float) -> None:
        """A request is prefilled, or was given up. Unknown ones are ignored."""
        if request not in self._left:
            return
        self._advance(now)
        # First tokens come with the end of a step, and who has come by then gets into the next.
        self._stepping = self._joined
        del self._left[request], self._whole[request], self._numbers[request]
        self.free_at = now + sum(self._left.values())
        self._move_on(now)

    def forecast(self, now: float, seconds: float) -> float:
        """Seconds until one that joined now would be prefilled; nobody joins after it."""
        self._advance(now)
        lefts = [*self._left.values(), seconds]
        new, oldest, passed = len(lefts) - 1, 0, 0.0
        for shortest in sorted(range(len(lefts)), key=lefts.__getitem__):
            while lefts[shortest] > 0:
                while lefts[oldest] <= 0:
                    oldest += 1
                alone = lefts[oldest] <= lefts[shortest]
                served = oldest if alone else shortest
                passed += lefts[served] if alone else 2 * lefts[served]
                lefts[oldest] -= lefts[served]
                lefts[served] = 0.0
            if lefts[new] <= 0:
                break
        return passed

    def mark(self) -> Mark:
        """The end of the line as it is now. It learns when all ahead have gone: always, if nobody is."""
        if not self._left:
            return _NOBODY_AHEAD
        if not self._marks or self._marks[-1].number != self._joined:
            self._marks.append(Mark(self._joined))
        return self._marks[-1]

    # --- inside ---

    def _advance(self, now: float) -> None:
        """Let time pass for the two that are being served."""
        left, passed = self._left, now - self._at
        self._at = now
        if not left:
            return
        oldest = next(iter(left))
        shortest = min(left, key=left.__getitem__)
        if left[oldest] <= left[shortest]:
            left[oldest] = max(0.0, left[oldest] - passed)
            return
        for request in (oldest, shortest):
            left[request] = max(0.0, left[request] - passed / 2)

    def _move_on(self, now: float) -> None:
        front = self._numbers[next(iter(self._left))] if self._left else self._joined + 1
        while self._marks and self._marks[0].number < front:
            self._marks.popleft().at = now
