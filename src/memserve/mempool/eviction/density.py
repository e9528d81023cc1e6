"""Hits that a block may still bring, per second of its stay, learnt from when blocks were used again. Pure.

Hit density: Beckmann and Sanchez, "LHD: Improving Cache Hit Rate by Maximizing Hit Density", NSDI 2018.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np

_AGE_LIMITS = (5, 15, 30, 45, 60, 90, 120, 180, 240, 300, 420, 600, 900, 1200, 1800, 3600)
"""Seconds since the last use up to which ages are told apart. What is older promises nothing."""
_AGE_ENDS = (*_AGE_LIMITS, math.inf)
_FIRST_STAY = 60.0
"""Seconds that an evicted block is taken to have been idle before the first eviction."""
_STAY_WEIGHT = 0.01 / 32
"""How much one evicted block counts in the running mean of that."""


class HitDensities:
    """Densities by class of blocks and age. Each evaluation lets the counts fade by the factor ``fade``."""

    def __init__(self, classes: int, fade: float) -> None:
        limits = np.array(_AGE_LIMITS, np.float64)
        self._fade = fade
        self._entered = [1.0] * classes
        """Blocks by class: how many became it."""
        self._used = [[0.0] * (len(limits) + 1) for _ in range(classes)]
        """Blocks by class and age: how many were used again at it."""
        waits = limits[None, :] - np.concatenate(([0.0], limits[:-1]))[:, None]
        self._waits = np.where(waits > 0, waits, np.inf)
        """Seconds from the begin of one age (row) to the end of another (column), if that comes later."""
        self._stay = _FIRST_STAY
        self._table = [[0.0] * (len(limits) + 1) for _ in range(classes)]

    def enter(self, kind: int, blocks: int) -> None:
        """``blocks`` blocks belong to the class ``kind`` from now on."""
        self._entered[kind] += blocks

    def use(self, kind: int, age: float, blocks: int, next_kind: int) -> None:
        """``blocks`` blocks of a class were used again after ``age`` seconds, cached still or not.

        They belong to the class ``next_kind`` from now on.
        """
        self._used[kind][bisect_left(_AGE_LIMITS, age)] += blocks
        self._entered[next_kind] += blocks

    def evicted(self, age: float, blocks: int) -> None:
        """``blocks`` blocks were evicted that had not been used for ``age`` seconds."""
        self._stay += (age - self._stay) * min(1.0, blocks * _STAY_WEIGHT)

    def of(self, kind: int, age: float) -> tuple[float, float]:
        """Hits per block and second to expect of a class at an age, as last evaluated; up to what age."""
        at = bisect_left(_AGE_LIMITS, age)
        return self._table[kind][at], _AGE_ENDS[at]

    def evaluate(self) -> None:
        """Bring the densities up to date.

        For a block that has come to an age: the best ratio, over all times to keep it for, of the chance
        that it is used in that time to that time. A stay costs at least what evicted blocks stay on average.
        """
        counts, entered = np.array(self._used), np.array(self._entered)
        used = counts[:, :-1]
        upto = np.cumsum(used, axis=1)
        before = upto - used
        left = np.maximum(entered[:, None] - before, 1.0)
        until = upto[:, None, :] - before[:, :, None]
        rates = until / left[:, :, None] / (self._waits + self._stay)
        self._table = [[*row, 0.0] for row in rates.max(axis=2).tolist()]
        self._entered = (entered * self._fade).tolist()
        self._used = (counts * self._fade).tolist()
