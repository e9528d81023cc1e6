"""Costs that are learned from what was measured: a sum of terms, each an amount times a price. Pure."""

from __future__ import annotations

from collections.abc import Sequence

_RATE = 0.1
"""Weight of a new measurement against what is known; the first ones weigh more."""
_SURPRISE = 0.5
"""A measurement counts as at most this much off, as a part of what was predicted: outliers move little."""
_NO_TIME = 1e-9
"""Less than a clock can tell from nothing."""


class LinearCost:
    """``seconds = sum(price[i] * amount[i])`` with positive prices, followed online.

    A normalised least-mean-squares filter (Nagumo and Noda, 1967) on relative prices: each term answers for
    its part of the error, and a price that a measurement says nothing about stays as it is.

    Parameters
    ----------
    prior : seconds per unit of each term. The first measurement scales them all; their ratios are what
        counts until then.
    measured : the prior comes from measurements, and new ones only correct it.
    """

    def __init__(self, prior: Sequence[float], *, measured: bool = False) -> None:
        assert all(price > 0 for price in prior), "a price must be positive"
        self._prices = list(prior)
        self._seen = round(1 / _RATE) if measured else 0

    @property
    def prices(self) -> tuple[float, ...]:
        """Seconds per unit of each term."""
        return tuple(self._prices)

    @property
    def seen(self) -> int:
        """Measurements that were learnt from; a measured prior counts as some."""
        return self._seen

    def predict(self, amounts: Sequence[float]) -> float:
        """Seconds that ``amounts`` will cost."""
        return sum(price * amount for price, amount in zip(self._prices, amounts, strict=True))

    def learn(self, amounts: Sequence[float], seconds: float) -> None:
        """``amounts``, none negative, have cost ``seconds``."""
        parts = [price * amount for price, amount in zip(self._prices, amounts, strict=True)]
        predicted = sum(parts)
        if predicted <= 0 or seconds < _NO_TIME:
            return
        self._seen += 1
        if self._seen == 1:
            self._prices = [price * seconds / predicted for price in self._prices]
            return
        off = min(max(seconds / predicted - 1, -_SURPRISE), _SURPRISE)
        step = max(_RATE, 1 / self._seen) * off * predicted / sum(part * part for part in parts)
        self._prices = [
            price * max(0.5, 1 + step * part) for price, part in zip(self._prices, parts, strict=True)
        ]
