"""What became of prefixes, cached still or not: a bounded table of fingerprints. Pure.

It remembers ``CHUNK_BLOCKS`` blocks at a time, at fixed distances from a prompt's start. A chunk's
fingerprint covers every eighth token before it and some of its first block. That may take two prompts that
differ in a word for one, which costs a statistic, never a wrong block.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.core.types import Namespace, Tokens

CHUNK_BLOCKS = 32
"""So many that the table is small, so few that prompts seldom part within a chunk."""
_STRIDE = 8
"""Of the tokens before it a fingerprint covers one in so many: covering all costs as much as the index."""
_SAMPLED = (0, 3, 7)
"""Tokens of a chunk's first block that its fingerprint covers."""
_WEIGHT_BITS = np.uint64(39)
"""Weights keep the 25 bits above: sums of 2**10 products with tokens below 2**18 are exact in a float64."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Fingerprints = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Past:
    """The past of consecutive chunks from a prompt's start; see :class:`~memserve.mempool.usage.Run`."""

    uses: NDArray[np.uint8]
    follows: NDArray[np.uint8]
    stamps: NDArray[np.float64]


class PrefixHistory:
    """Room for ``capacity`` chunks, rounded up to a power of two, of blocks of ``block_tokens`` tokens.

    Direct-mapped: a new chunk takes the place of an old one, so every operation costs the same.
    """

    def __init__(self, capacity: int, block_tokens: int) -> None:
        size = 1 << max(capacity - 1, 1).bit_length()
        self._span = CHUNK_BLOCKS * block_tokens
        self._mask = np.uint64(size - 1)
        self._prints = np.zeros(size, np.uint64)
        self._uses = np.zeros(size, np.uint8)
        self._follows = np.zeros(size, np.uint8)
        self._stamps = np.zeros(size, np.float64)
        self._weights = (_odd_numbers(-(-self._span // _STRIDE)) >> _WEIGHT_BITS).astype(np.float64)
        self._factors = _odd_numbers(64)
        self._seeds: dict[Namespace, int] = {}

    def fingerprints(self, namespace: Namespace, tokens: Tokens) -> Fingerprints:
        """Of every chunk that begins within ``tokens`` (int32[n]): uint64[n / span, rounded up]."""
        span = self._span
        count = -(-len(tokens) // span)
        whole = max(count - 1, 0)
        if count > len(self._factors):
            self._factors = _odd_numbers(2 * count)
        before = np.empty(count, np.uint64)
        before[:1] = self._seed(namespace)
        if whole:
            sampled = tokens[: whole * span].reshape(whole, span)[:, ::_STRIDE]
            before[1:] = (sampled.astype(np.float64) @ self._weights).astype(np.uint64)
            before[1:] *= self._factors[:whole]
        found: Fingerprints = np.add.accumulate(before)
        for at in _SAMPLED:
            sample = tokens[at::span]
            found[: len(sample)] += sample.astype(np.uint64)
            found *= _GOLDEN
        found ^= found >> np.uint64(32)
        return found

    def put(self, prints: Fingerprints, past: Past) -> None:
        """Remember this of these chunks."""
        places = prints & self._mask
        self._prints[places] = prints
        self._uses[places] = past.uses
        self._follows[places] = past.follows
        self._stamps[places] = past.stamps

    def find(self, prints: Fingerprints) -> Past:
        """What is remembered of the chunks of a prompt, up to the last known one.

        One that was overwritten is taken to be like the next, which cannot have been here without it.
        """
        places = prints & self._mask
        known = np.flatnonzero(self._prints[places] == prints)
        if len(known):
            places = places[: known[-1] + 1]
        if len(known) < len(places):
            places = places[known[np.searchsorted(known, np.arange(len(places) if len(known) else 0))]]
        return Past(self._uses[places], self._follows[places], self._stamps[places])

    def _seed(self, namespace: Namespace) -> int:
        seed = self._seeds.get(namespace)
        if seed is None:
            text = "\0".join((namespace.model, namespace.adapter, namespace.salt))
            seed = self._seeds[namespace] = zlib.crc32(text.encode()) << 32 | 1
        return seed


def _odd_numbers(count: int) -> NDArray[np.uint64]:
    """Fixed odd numbers without a pattern (splitmix64)."""
    x = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
