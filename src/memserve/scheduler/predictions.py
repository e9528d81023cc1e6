"""How well the time to the first token was foreseen, of late. Pure."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT = 256
_ENOUGH = 32
"""Predictions that must have come true, or not, before their quality says anything."""


class Predictions:
    """Relative errors of the last predictions: ``|predicted - actual| / actual``."""

    def __init__(self) -> None:
        self._errors: deque[float] = deque(maxlen=_KEPT)
        self._typical = 0.0

    def learn(self, predicted: float, actual: float) -> None:
        """What was foreseen, and what came; seconds. Nothing is learnt where nothing was foreseen."""
        if predicted <= 0 or actual <= 0:
            return
        self._errors.append(abs(predicted - actual) / actual)
        if len(self._errors) >= _ENOUGH and len(self._errors) % (_ENOUGH // 4) == 0:
            self._typical = statistics.median(self._errors)

    @property
    def typical(self) -> float:
        """Median error; 0 while there are too few."""
        return self._typical

    def quantile(self, share: float) -> float:
        """The error that ``share`` of the last predictions stayed below; 0 if there are none."""
        if not self._errors:
            return 0.0
        ordered = sorted(self._errors)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
