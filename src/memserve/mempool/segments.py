"""Where blocks, and parts of them, lie in segments of memory. Pure arithmetic; touches no memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.mempool.address import BlockNumbers

Parts = NDArray[np.int64]
"""Which part of its block a unit is: int64[n]."""


@dataclass(frozen=True, slots=True, eq=False)
class SegmentMap:
    """Segments of ``blocks`` blocks from number ``firsts`` on, whose memory begins at ``bases``: int64[s].

    A block consists of ``pieces`` pieces; a segment is [pieces][blocks][bytes of a piece], so with one piece
    a block is contiguous. A unit of a transfer is a piece, or a part of a block that is one piece.
    """

    firsts: NDArray[np.int64]
    blocks: NDArray[np.int64]
    bases: NDArray[np.int64]
    block_bytes: int
    pieces: int = 1

    def segments_of(self, numbers: BlockNumbers) -> NDArray[np.int64]:
        """Which segment each block lies in: int64[n]."""
        return np.searchsorted(self.firsts, numbers, side="right") - 1

    def pointers(self, numbers: BlockNumbers) -> NDArray[np.uint64]:
        """Addresses of all pieces, block by block: uint64[n * pieces]."""
        if self.pieces == 1:
            return self.unit_pointers(numbers, _NO_PARTS, self.block_bytes)
        parts = np.tile(np.arange(self.pieces), len(numbers))
        return self.unit_pointers(np.repeat(numbers, self.pieces), parts, self.block_bytes // self.pieces)

    def unit_pointers(self, numbers: BlockNumbers, parts: Parts, unit_bytes: int) -> NDArray[np.uint64]:
        """Addresses of units of ``unit_bytes`` bytes, parts ``parts`` of blocks ``numbers``: uint64[n]."""
        at = 0 if len(self.firsts) == 1 else self.segments_of(numbers)
        within, bases = numbers - self.firsts[at], self.bases[at]
        if unit_bytes == self.block_bytes:
            pointers = within * self.block_bytes + bases
        elif self.pieces == 1:
            pointers = within * self.block_bytes + parts * unit_bytes + bases
        else:
            pointers = (parts * self.blocks[at] + within) * unit_bytes + bases
        return np.asarray(pointers, np.int64).view(np.uint64)

    def touching(self, numbers: BlockNumbers, parts: Parts, unit_bytes: int) -> NDArray[np.bool_]:
        """Whether each unit but the last is followed by the next one without a gap: bool[n - 1]."""
        pointers = self.unit_pointers(numbers, parts, unit_bytes).view(np.int64)
        touches: NDArray[np.bool_] = np.diff(pointers) == unit_bytes
        if len(self.firsts) > 1:
            # Two mappings may happen to lie side by side.
            touches &= np.diff(self.segments_of(numbers)) == 0
        return touches


_NO_PARTS = np.zeros(0, np.int64)


def runs_of(touching: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Runs of units of which each touches the next: where they begin and how many units each has.

    ``touching``: bool[n - 1] for n > 0 units, of one side or of both combined with ``&``.
    """
    starts = np.flatnonzero(np.concatenate(([True], ~touching)))
    return starts, np.diff(np.append(starts, len(touching) + 1))
