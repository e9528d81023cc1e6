"""Rotary embeddings: at which angle each pair of dimensions turns per token, and how models stretch that.

Knows formulas only; readers of files choose one, runners compute with the result.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

Double = NDArray[np.float64]


class LinearScaling(msgspec.Struct, frozen=True, tag=True):
    """Positions divided by ``factor`` (position interpolation, arXiv 2306.15595)."""

    factor: float

    def scale(self, frequencies: Double, theta: float) -> Double:
        return frequencies / self.factor

    @property
    def amplitude(self) -> float:
        return 1.0


class Llama3Scaling(msgspec.Struct, frozen=True, tag=True):
    """Llama 3.1: long waves divided by ``factor``, short ones kept, those between interpolated.

    A wave is short if the ``original_context`` (tokens) holds at least ``high_frequency_factor`` of it, and
    long if it holds fewer than ``low_frequency_factor``.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int

    def scale(self, frequencies: Double, theta: float) -> Double:
        waves = self.original_context * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((waves - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)

    @property
    def amplitude(self) -> float:
        return 1.0


class YarnScaling(msgspec.Struct, frozen=True, tag=True):
    """YaRN (arXiv 2309.00071, section 3): as Llama 3, but interpolated over the index of the pair.

    ``attention_factor`` scales rotated q and k; None is the paper's 0.1 ln(factor) + 1 (equation 22).
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def scale(self, frequencies: Double, theta: float) -> Double:
        pairs = len(frequencies)
        first = max(math.floor(self._pair_turning(self.beta_fast, pairs, theta)), 0)
        last = min(math.ceil(self._pair_turning(self.beta_slow, pairs, theta)), 2 * pairs - 1)
        stretched = np.clip((np.arange(pairs) - first) / max(last - first, 0.001), 0, 1)
        return frequencies * (1 - stretched + stretched / self.factor)

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def _pair_turning(self, times: float, pairs: int, theta: float) -> float:
        """Index of the pair that turns ``times`` times within the original context."""
        return pairs * math.log(self.original_context / (times * 2 * math.pi)) / math.log(theta)


class FrequencyDivisors(msgspec.Struct, frozen=True, tag=True):
    """One divisor per pair: how GGUF files store Llama 3's scaling (tensor ``rope_freqs``)."""

    divisors: tuple[float, ...]

    def scale(self, frequencies: Double, theta: float) -> Double:
        return frequencies / np.array(self.divisors, np.float64)

    @property
    def amplitude(self) -> float:
        return 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyDivisors
"""Each turns the plain frequencies (radians per token) of a base ``theta`` into its own: ``scale``; and has
the factor that it puts on cosines and sines: ``amplitude``."""


def rope_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> Double:
    """Radians per token, float64[head_dim / 2] (RoFormer, equation 15); pair i is (i, i + head_dim / 2)."""
    plain = np.power(theta, -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return plain if scaling is None else scaling.scale(plain, theta)


def rope_amplitude(scaling: RopeScaling | None) -> float:
    """The factor on cosines and sines."""
    return 1.0 if scaling is None else scaling.amplitude
