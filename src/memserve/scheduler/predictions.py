"""The time to the first token: what steps' prices leave out, learned; and how well it was foreseen. Pure."""

from __future__ import annotations

import statistics
from collections import deque

import msgspec

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


class Forecast(msgspec.Struct, frozen=True, gc=False):
    """What the prices of steps say, in seconds.

    ``served``: until the request is prefilled, were time divided at will; ``step``: the length of the steps
    that it comes into the middle of, 0 where none run.
    """

    served: float = 0.0
    step: float = 0.0


_STEP_SHARE = 0.5
_PRIOR = (0.0, _STEP_SHARE, 1.0)
_DOUBT = (0.03**2, 0.5**2, 0.2**2)
_DRIFT = (1e-3**2, 0.005**2, 0.02**2)
"""Variances of the three coefficients at first, and what they grow by with each prediction."""
_NOISE = 0.3
"""Relative error that is nobody's fault."""
_LARGEST = 0.5
"""An error counts as at most so much of what was foreseen: one stall must not teach."""


class Correction:
    """What first tokens of one instance really take: ``constant + a * step + b * served``.

    The coefficients are tracked by a Kalman filter, which is recursive least squares for what may change.
    """

    __slots__ = ("_covariance", "_weights")

    def __init__(self) -> None:
        self._weights = list(_PRIOR)
        self._covariance = [
            [_DOUBT[row] if row == column else 0.0 for column in range(3)] for row in range(3)
        ]

    def seconds(self, forecast: Forecast) -> float:
        """The corrected time to the first token."""
        constant, step, served = self._weights
        return max(constant + step * forecast.step + served * forecast.served, 0.1 * forecast.served)

    def learn(self, forecast: Forecast, actual: float) -> None:
        """It took ``actual`` seconds, which is positive."""
        inputs = (1.0, forecast.step, forecast.served)
        covariance = self._covariance
        for at, drift in enumerate(_DRIFT):
            covariance[at][at] += drift
        expected = self.seconds(forecast)
        limit = _LARGEST * expected
        error = min(max(actual - expected, -limit), limit)
        reach = [sum(c * x for c, x in zip(row, inputs, strict=True)) for row in covariance]
        spread = sum(r * x for r, x in zip(reach, inputs, strict=True)) + (_NOISE * expected) ** 2
        if spread <= 0:
            return
        for row in range(3):
            self._weights[row] += reach[row] / spread * error
            for column in range(3):
                covariance[row][column] -= reach[row] * reach[column] / spread
