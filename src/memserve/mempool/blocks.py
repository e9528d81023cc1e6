"""The block table: which blocks are free, who holds how many references, what is indexed. Pure numpy.

Every block is in exactly one state, derived from two numbers:

free        no reference, not indexed
active      referenced; perhaps indexed as well
historical  indexed, not referenced
incoming    referenced by a reservation, being written by a peer; not readable, never indexed

Callers pass block numbers as int64[n] without repetitions unless a method says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.mempool.address import (
    LOW_HALF,
    MAX_BLOCKS,
    BlockNumbers,
    Origin,
    Packed,
    Tier,
    numbers_of,
    pack_first,
)

# References and the indexed bit share one integer per block, so that one test tells all about a block:
# 0 free, 1 historical, 2k active, 2k + 1 active and indexed.
_FREE = 0
_INDEXED = 1
_REFERENCE = 2
# Numpy combines zero-dimensional arrays with arrays faster than scalars.
_INDEXED_BIT = np.array(_INDEXED, np.int32)
_ONE_REFERENCE = np.array(_REFERENCE, np.int32)
_ONE_GENERATION = np.array(1, np.uint32)


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Blocks per state."""

    free: int
    active: int
    historical: int
    incoming: int


class BlockTable:
    """State of ``blocks`` blocks of one tier. Numbers are valid from 0 to ``blocks - 1``."""

    def __init__(self, blocks: int, tier: Tier = Tier.DEVICE) -> None:
        assert 0 < blocks <= MAX_BLOCKS, f"{blocks} blocks; 1 to {MAX_BLOCKS} are possible"
        self.blocks = blocks
        self.historical = 0
        self._packed = pack_first(blocks, tier)
        self._generations = self._packed.view(np.uint32)[LOW_HALF::2]
        self._uses = np.zeros(blocks, np.int32)
        self._incoming = np.zeros(blocks, np.bool_)
        self._origins = np.zeros(blocks, np.uint8)
        self._free_stack = np.arange(blocks - 1, -1, -1, dtype=np.int64)
        self._free_count = blocks
        self._marks = np.empty(blocks, np.int64)
        self._positions = np.arange(blocks, dtype=np.int64)

    # --- reading ---

    @property
    def free(self) -> int:
        """Blocks that can be allocated now."""
        return self._free_count

    def addresses_of(self, numbers: BlockNumbers) -> Packed:
        """Present addresses of blocks: uint64[n]."""
        return self._packed[numbers]

    def origins_of(self, numbers: BlockNumbers) -> NDArray[np.uint8]:
        """The :class:`Origin` of each block: uint8[n]."""
        return self._origins[numbers]

    def references_of(self, numbers: BlockNumbers) -> NDArray[np.int32]:
        """References to each block: int32[n]."""
        return self._uses[numbers] >> 1

    def is_indexed(self, numbers: BlockNumbers) -> NDArray[np.bool_]:
        """Whether each block is in the index."""
        indexed: NDArray[np.bool_] = (self._uses[numbers] & _INDEXED) != 0
        return indexed

    def all_held_unindexed(self, numbers: BlockNumbers) -> bool:
        """Whether each block is referenced and none is indexed: what may enter the index."""
        uses = self._uses[numbers]
        held, indexed = np.count_nonzero(uses), np.count_nonzero(uses & _INDEXED_BIT)
        return bool(held == len(uses) and indexed == 0)

    def current(self, packed: Packed) -> NDArray[np.bool_]:
        """Whether each address names its block's present generation; any repetition, any numbers."""
        numbers = numbers_of(packed)
        inside = numbers < self.blocks
        found = np.zeros(len(packed), np.bool_)
        found[inside] = self._packed[numbers[inside]] == packed[inside]
        return found

    def all_current(self, packed: Packed, numbers: BlockNumbers) -> bool:
        """The same as one quick answer; ``numbers`` are those of ``packed``."""
        try:
            return self._packed[numbers].tobytes() == packed.tobytes()
        except IndexError:
            return False

    def distinct(self, numbers: BlockNumbers) -> bool:
        """Whether no number is repeated."""
        positions = self._positions[: len(numbers)]
        if len(positions) < len(numbers):
            return False
        self._marks[numbers] = positions
        return self._marks[numbers].tobytes() == positions.tobytes()

    def counts(self) -> BlockCounts:
        """Blocks per state. Costs a pass over the table."""
        incoming = int(np.count_nonzero(self._incoming))
        active = self.blocks - self._free_count - self.historical - incoming
        return BlockCounts(self._free_count, active, self.historical, incoming)

    # --- references ---

    def alloc(self, count: int) -> BlockNumbers:
        """Take ``count`` free blocks, each with one reference; there must be as many."""
        assert count <= self._free_count, f"{count} blocks asked of {self._free_count} free"
        left = self._free_count - count
        numbers = self._free_stack[left : self._free_count][::-1].copy()
        self._free_count = left
        self._uses[numbers] = _REFERENCE
        return numbers

    def retain(self, numbers: BlockNumbers) -> None:
        """Add one reference to each; blocks must be indexed or referenced."""
        uses = self._uses[numbers]
        assert np.count_nonzero(uses) == len(uses), "a free block cannot be retained"
        self.historical -= int(np.count_nonzero(uses == _INDEXED))
        self._uses[numbers] = uses + _ONE_REFERENCE

    def release(self, numbers: BlockNumbers) -> NDArray[np.bool_] | None:
        """Drop one reference of each. A block with none left becomes historical if indexed, else free.

        Returns None, or which of the blocks had no reference to drop (those are left alone).
        """
        uses = self._uses[numbers] - _ONE_REFERENCE
        unheld = None
        if not np.count_nonzero(uses):
            self._uses[numbers] = _FREE
            self._give_back(numbers)
            return None
        if int(uses.min()) < 0:
            unheld = uses < 0
            numbers, uses = numbers[~unheld], uses[~unheld]
        self._uses[numbers] = uses
        self.historical += int(np.count_nonzero(uses == _INDEXED))
        self._give_back(numbers[uses == _FREE])
        return unheld

    # --- the index's and the reservations' marks ---

    def index(self, numbers: BlockNumbers, origin: Origin) -> None:
        """Mark referenced blocks as indexed."""
        self._uses[numbers] |= _INDEXED_BIT
        self._origins[numbers] = origin

    def unindex(self, numbers: BlockNumbers) -> int:
        """Take blocks out of the index; those without references become free. Returns how many did."""
        uses = self._uses[numbers] & ~_INDEXED
        self._uses[numbers] = uses
        unused = numbers[uses == _FREE]
        self.historical -= len(unused)
        self._give_back(unused)
        return len(unused)

    def mark_incoming(self, numbers: BlockNumbers, incoming: bool) -> None:
        """Say that a peer writes these blocks, or that it has ended."""
        self._incoming[numbers] = incoming

    # --- invariants ---

    def check(self) -> None:
        """Assert that every block is in exactly one state and that the free stack is complete."""
        free = self._free_stack[: self._free_count]
        assert len(np.unique(free)) == len(free), "a block is free twice"
        assert np.array_equal(np.sort(free), np.flatnonzero(self._uses == _FREE)), (
            "free stack and uses disagree"
        )
        assert int(self._uses.min()) >= 0, "a block has negative uses"
        assert self.historical == np.count_nonzero(self._uses == _INDEXED), "historical blocks are miscounted"
        incoming = self._uses[self._incoming]
        assert bool(np.all(incoming == _REFERENCE)), "an incoming block is indexed or not held exactly once"
        assert np.array_equal(numbers_of(self._packed), self._positions), "an address has a wrong number"

    def _give_back(self, numbers: BlockNumbers) -> None:
        self._generations[numbers] += _ONE_GENERATION
        upto = self._free_count + len(numbers)
        # Reversed, so that a run of neighbours is handed out as a run of neighbours again.
        self._free_stack[self._free_count : upto] = numbers[::-1]
        self._free_count = upto
