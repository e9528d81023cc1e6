"""Names of blocks: packed 64-bit integers in numpy arrays, never lists of objects.

A packed address is ``tier (2 bits) | block number (30 bits) | generation (32 bits)``. The generation goes
up each time the block is freed, so an address that was kept too long never names the block's next use.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import StaleAddress
from memserve.core.messages import TierName
from memserve.core.types import InstanceId

Packed = NDArray[np.uint64]
"""Packed addresses: uint64[n]."""
BlockNumbers = NDArray[np.int64]
"""Block numbers as numpy likes them for indexing: int64[n]."""

MAX_BLOCKS = 1 << 30
LOW_HALF = 0 if sys.byteorder == "little" else 1
"""Where the generation lies when packed addresses are viewed as pairs of uint32."""

# Zero-dimensional arrays: numpy combines them with arrays faster than its own or Python's scalars.
_GENERATION_BITS = np.array(32, np.uint64)
_NUMBER_MASK = np.array(MAX_BLOCKS - 1, np.uint64)
_TIER_SHIFT = 62


class Tier(enum.IntEnum):
    """Where a block lies, from the fastest down: kernels read ``DEVICE`` in place."""

    DEVICE = 0
    HOST = 1
    DISK = 2

    @property
    def label(self) -> TierName:
        """Its name in messages."""
        return _LABELS[self]


_LABELS: tuple[TierName, ...] = ("device", "host", "disk")


class Origin(enum.IntEnum):
    """Who computed a block's KV, for the ledger of the request that finds it cached."""

    COMPUTED = 0
    PEER = 1
    BACKFLOW = 2


def numbers_of(packed: Packed) -> BlockNumbers:
    """Block numbers of packed addresses."""
    return ((packed >> _GENERATION_BITS) & _NUMBER_MASK).view(np.int64)


def are_distinct(numbers: BlockNumbers) -> bool:
    """Whether no block is named twice."""
    return len(np.unique(numbers)) == len(numbers)


def tiers_in(packed: Packed) -> NDArray[np.uint8]:
    """The :class:`Tier` of each packed address: uint8[n]."""
    return (packed >> np.uint64(_TIER_SHIFT)).astype(np.uint8)


def pack_first(blocks: int, tier: Tier, first: int = 0) -> Packed:
    """Addresses of ``blocks`` blocks from number ``first`` on, in their generation 0."""
    numbers = np.arange(first, first + blocks, dtype=np.uint64)
    return (numbers << _GENERATION_BITS) | np.uint64(int(tier) << _TIER_SHIFT)


@dataclass(frozen=True, slots=True, eq=False)
class Addresses:
    """Blocks of one instance in one of its lives (``incarnation``); ``packed``: uint64[n]."""

    instance: InstanceId
    incarnation: int
    packed: Packed

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, part: slice) -> Addresses:
        return Addresses(self.instance, self.incarnation, self.packed[part])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Addresses):
            return NotImplemented
        return self._owner == other._owner and np.array_equal(self.packed, other.packed)

    __hash__ = None  # type: ignore[assignment]

    @property
    def blocks(self) -> NDArray[np.int32]:
        """Block numbers: int32[n]."""
        return numbers_of(self.packed).astype(np.int32)

    @property
    def tiers(self) -> NDArray[np.uint8]:
        """The :class:`Tier` of each block: uint8[n]."""
        return tiers_in(self.packed)

    @property
    def generations(self) -> NDArray[np.uint32]:
        """Generations: uint32[n]."""
        return self.packed.astype(np.uint32)

    def concat(self, other: Addresses) -> Addresses:
        """These, then those of ``other``, which must be of the same instance and incarnation."""
        if self._owner != other._owner:
            raise StaleAddress(f"cannot join blocks of {self.owner_text} and of {other.owner_text}")
        return Addresses(self.instance, self.incarnation, np.concatenate((self.packed, other.packed)))

    def to_bytes(self) -> bytes:
        """``packed`` as little-endian bytes, for messages."""
        return self.packed.astype("<u8", copy=False).tobytes()

    @staticmethod
    def from_bytes(instance: InstanceId, incarnation: int, raw: bytes) -> Addresses:
        """Inverse of :meth:`to_bytes`."""
        return Addresses(instance, incarnation, np.frombuffer(raw, "<u8").astype(np.uint64, copy=False))

    @property
    def owner_text(self) -> str:
        """Whose blocks these are, for people."""
        return f"{self.instance} (incarnation {self.incarnation})"

    @property
    def _owner(self) -> tuple[InstanceId, int]:
        return self.instance, self.incarnation
