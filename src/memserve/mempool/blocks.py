"""The block table: which blocks are free, who holds how many references, what is indexed. Pure.

Every block is in exactly one state, derived from two numbers:

free        no reference, not indexed
active      referenced; perhaps indexed as well
historical  indexed, not referenced
incoming    referenced by a reservation, being written by a peer; not readable, never indexed
retired     free, but not to be handed out: the pool has shrunk by it

Callers pass block numbers as int64[n] without repetitions unless a method says otherwise, and edges of the
index as lists of int32[n]. What touches every block of a prompt is one native pass; see ``native/blocks.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve._native import (
    BlockColumns,
    enter_index,
    idle_tail,
    lease_edges,
    leave_index,
    occupy_blocks,
    release_addresses,
    resolve_addresses,
    retain_blocks,
)
from memserve.mempool.address import (
    LOW_HALF,
    MAX_BLOCKS,
    BlockNumbers,
    Origin,
    Packed,
    Tier,
    are_distinct,
    numbers_of,
    pack_first,
)

# References and the indexed bit share one integer per block, so that one test tells all about a block:
# 0 free, 1 historical, 2k active, 2k + 1 active and indexed.
_FREE = 0
_INDEXED = 1
_REFERENCE = 2

Edges = list[NDArray[np.int32]]
"""Block numbers of edges of the index, one after the other."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Blocks per state."""

    free: int
    active: int
    historical: int
    incoming: int


class _FreeStack:
    """The free blocks of one tier; hands neighbours out as neighbours, and what was used last first."""

    __slots__ = ("_stack", "count")

    def __init__(self, first: int, blocks: int) -> None:
        self._stack = np.arange(first + blocks - 1, first - 1, -1, dtype=np.int64)
        self.count = blocks

    @property
    def numbers(self) -> BlockNumbers:
        return self._stack[: self.count]

    def make_room(self, count: int) -> None:
        """There will be ``count`` more blocks than before."""
        self._stack = np.concatenate((self._stack, np.empty(count, np.int64)))

    def take(self, count: int) -> BlockNumbers:
        left = self.count - count
        numbers = self._stack[left : self.count][::-1].copy()
        self.count = left
        return numbers

    def pop(self, count: int) -> BlockNumbers:
        """The same, in reverse and in place: valid until the next change."""
        self.count -= count
        return self._stack[self.count : self.count + count]

    def give(self, numbers: BlockNumbers) -> None:
        upto = self.count + len(numbers)
        # Reversed, so that a run of neighbours is handed out as a run of neighbours again.
        self._stack[self.count : upto] = numbers[::-1]
        self.count = upto

    def take_these(self, numbers: BlockNumbers) -> None:
        """Take certain blocks, all of them free. Costs a pass over the stack."""
        left = self.numbers[~np.isin(self.numbers, numbers)]
        assert len(left) + len(numbers) == self.count, "a block that is not free cannot be taken"
        self._stack[: len(left)] = left
        self.count = len(left)

    def use_last(self, numbers: BlockNumbers) -> None:
        """Hand these free blocks out only when no others are left. Costs a pass over the stack."""
        self.take_these(numbers)
        others = self.numbers.copy()
        self._stack[: len(numbers)] = numbers
        self._stack[len(numbers) : len(numbers) + len(others)] = others
        self.count = len(numbers) + len(others)


class BlockTable:
    """State of all blocks, numbered from 0: those of the device, of host and disk, then what was added."""

    def __init__(self, device: int, host: int = 0, disk: int = 0) -> None:
        assert device > 0, "a pool without a block on the device"
        self.capacity = [device, host, disk]
        """Blocks of each tier, whatever their state, but for the retired."""
        self.blocks = 0
        """All blocks that there are or have been, retired ones included."""
        self.tiered = host + disk > 0
        """Whether there is, or has been, more than the device."""
        self._historical = np.zeros(len(Tier), np.int64)
        self._packed = np.empty(0, np.uint64)
        self._generations = self._packed.view(np.uint32)[LOW_HALF::2]
        self._tier_of = np.empty(0, np.uint8)
        self._uses = np.empty(0, np.int32)
        self._incoming = np.empty(0, np.bool_)
        self._retired = np.empty(0, np.bool_)
        self._origins = np.empty(0, np.uint8)
        for tier in Tier:
            self._append(self.capacity[tier], tier)
        firsts = (0, device, device + host)
        self._free = tuple(_FreeStack(firsts[tier], self.capacity[tier]) for tier in Tier)

    # --- reading ---

    def free_in(self, tier: Tier) -> int:
        """Blocks that can be allocated now."""
        return self._free[tier].count

    def historical_in(self, tier: Tier) -> int:
        """Blocks that are indexed and that nobody holds."""
        return int(self._historical[tier])

    def tiers_of(self, numbers: BlockNumbers) -> NDArray[np.uint8]:
        """The :class:`Tier` of each block: uint8[n]."""
        return self._tier_of[numbers]

    def numbers_in(self, tier: Tier) -> BlockNumbers:
        """All blocks of a tier, retired ones included, ascending. Costs a pass over the table."""
        numbers: BlockNumbers = np.flatnonzero(self._tier_of == tier)
        return numbers

    def part(self, numbers: BlockNumbers, tier: Tier) -> BlockNumbers:
        """Those of ``numbers`` that lie in ``tier``."""
        part: BlockNumbers = numbers[self._tier_of[numbers] == tier]
        return part

    def on_device(self, numbers: BlockNumbers) -> NDArray[np.bool_]:
        """Whether each block lies on the device."""
        above: NDArray[np.bool_] = self._tier_of[numbers] == Tier.DEVICE
        return above

    def all_on_device(self, numbers: BlockNumbers) -> bool:
        """Whether no block lies in a lower tier."""
        return not self.tiered or not self._tier_of[numbers].any()

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

    def all_writable(self, numbers: BlockNumbers) -> bool:
        """Whether each block is named once, has one holder, and is neither indexed nor being written."""
        held_once = (self._uses[numbers] == _REFERENCE) & ~self._incoming[numbers]
        return bool(held_once.all()) and are_distinct(numbers)

    def current(self, packed: Packed) -> NDArray[np.bool_]:
        """Whether each address names its block's present generation; any repetition, any numbers."""
        numbers = numbers_of(packed)
        inside = numbers < self.blocks
        found = np.zeros(len(packed), np.bool_)
        found[inside] = self._packed[numbers[inside]] == packed[inside]
        return found

    def may_enter(self, numbers: BlockNumbers) -> bool:
        """Whether :meth:`index` would take these."""
        uses = self._uses[numbers]
        fit = (uses >= _REFERENCE) & ((uses & _INDEXED) == 0)
        return bool(fit.all()) and are_distinct(numbers)

    def resolve(self, packed: Packed) -> BlockNumbers | None:
        """Block numbers of addresses, any repetition; None if one of them is not current."""
        numbers = np.empty(len(packed), np.int64)
        found = resolve_addresses(self._columns, packed, numbers)
        return numbers if found == len(packed) else None

    def idle_tail(self, edge: NDArray[np.int32], end: int, most: int) -> int:
        """Of the first ``end`` blocks of ``edge``, how many at the end nobody holds; looks at ``most``."""
        return idle_tail(self._columns, edge, end, most)

    def counts(self, tier: Tier = Tier.DEVICE) -> BlockCounts:
        """Blocks of a tier per state. Costs a pass over the table."""
        incoming = int(np.count_nonzero(self._incoming & (self._tier_of == tier)))
        free, historical = self.free_in(tier), self.historical_in(tier)
        return BlockCounts(free, self.capacity[tier] - free - historical - incoming, historical, incoming)

    # --- size ---

    def grow(self, count: int, tier: Tier) -> None:
        """Add ``count`` free blocks, numbered from ``blocks`` on."""
        numbers = self._append(count, tier)
        self._free[tier].make_room(count)
        self._free[tier].give(numbers)
        self.capacity[tier] += count
        self.tiered = self.tiered or tier is not Tier.DEVICE

    def retire(self, count: int, tier: Tier) -> BlockNumbers:
        """Take ``count`` free blocks, as many there must be, out of use; returns which."""
        numbers = self._free[tier].take(count)
        self._retired[numbers] = True
        self.capacity[tier] -= count
        return numbers

    def retired_in(self, tier: Tier) -> int:
        """Blocks out of use. Costs a pass over the table."""
        return int(np.count_nonzero(self._tier_of[self._retired] == tier))

    def bring_back(self, count: int, tier: Tier) -> None:
        """Put ``count`` retired blocks, as many there must be, into use again, as free ones."""
        numbers = np.flatnonzero(self._retired & (self._tier_of == tier))[:count]
        assert len(numbers) == count, f"{count} blocks asked of {len(numbers)} retired"
        self._retired[numbers] = False
        self._free[tier].give(numbers)
        self.capacity[tier] += count

    # --- references ---

    def alloc(self, count: int, tier: Tier = Tier.DEVICE) -> BlockNumbers:
        """Take ``count`` free blocks, each with one reference; there must be as many."""
        return numbers_of(self.alloc_at(count, tier))

    def alloc_at(self, count: int, tier: Tier = Tier.DEVICE) -> Packed:
        """The same; returns their addresses."""
        free = self._free[tier]
        assert count <= free.count, f"{count} blocks asked of {free.count} free"
        packed = np.empty(count, np.uint64)
        occupy_blocks(self._columns, free.pop(count), packed)
        return packed

    def retain(self, numbers: BlockNumbers) -> None:
        """Add one reference to each; blocks must be indexed or referenced."""
        done = retain_blocks(self._columns, numbers)
        assert done == len(numbers), "a free block cannot be retained"

    def lease(self, edges: Edges, blocks: int) -> tuple[Packed, NDArray[np.uint8]]:
        """Add one reference to each of the ``blocks`` blocks of indexed ``edges``.

        Returns their present addresses, uint64[blocks], and where they came from: an :class:`Origin` each.
        """
        packed, origins = np.empty(blocks, np.uint64), np.empty(blocks, np.uint8)
        if blocks:
            done = lease_edges(self._columns, edges, packed, origins)
            assert done == blocks, "a free block cannot be retained"
        return packed, origins

    def release(self, numbers: BlockNumbers) -> int:
        """Drop one reference of each; see :meth:`release_at`."""
        return self.release_at(self._packed[numbers])

    def release_at(self, packed: Packed) -> int:
        """Drop one reference per address; any repetition, any addresses.

        A block with none left becomes historical if indexed, else free. Returns how many addresses are stale:
        of a generation that has passed, or of a block that nobody held.
        """
        freed = np.empty(len(packed), np.int64)
        count, stale = release_addresses(self._columns, packed, freed)
        self._give_back(freed[:count])
        return stale

    # --- the index's and the reservations' marks ---

    def index(self, numbers: BlockNumbers, origin: Origin | NDArray[np.uint8]) -> bool:
        """Mark blocks as indexed, with one origin for all or uint8[n].

        Nothing happens, and False is returned, if one is not referenced, indexed already or named twice.
        """
        one = int(origin) if isinstance(origin, Origin) else 0
        entered = enter_index(self._columns, numbers, one)
        if entered and not isinstance(origin, Origin):
            self._origins[numbers] = origin
        return entered

    def unindex(self, edges: Edges) -> int:
        """Take blocks out of the index; those without references become free. Returns how many left it."""
        blocks = sum([len(edge) for edge in edges])
        freed = np.empty(blocks, np.int64)
        count = leave_index(self._columns, edges, freed)
        self._give_back(freed[:count])
        return blocks

    def restore(self, numbers: BlockNumbers, origins: NDArray[np.uint8], tier: Tier) -> None:
        """Free blocks turn out to hold indexed KV: they are historical now. Costs a pass over the stack."""
        self._free[tier].take_these(numbers)
        self._uses[numbers] = _INDEXED
        self._origins[numbers] = origins
        self._historical[tier] += len(numbers)

    def use_last(self, numbers: BlockNumbers, tier: Tier) -> None:
        """Hand these free blocks out only when no others are left."""
        self._free[tier].use_last(numbers)

    def mark_incoming(self, numbers: BlockNumbers, incoming: bool) -> None:
        """Say that a peer writes these blocks, or that it has ended."""
        self._incoming[numbers] = incoming

    # --- invariants ---

    def check(self) -> None:
        """Assert that every block is in exactly one state and that the free stack is complete."""
        free = np.concatenate([stack.numbers for stack in self._free])
        assert len(np.unique(free)) == len(free), "a block is free twice"
        unused = (self._uses == _FREE) & ~self._retired
        assert np.array_equal(np.sort(free), np.flatnonzero(unused)), "free stack and uses disagree"
        assert not self._uses[self._retired].any(), "a retired block is in use"
        in_use = np.bincount(self._tier_of[~self._retired], minlength=len(Tier))
        assert in_use.tolist() == self.capacity, "the tiers' sizes are wrong"
        for tier in Tier:
            assert len(self.part(self._free[tier].numbers, tier)) == self.free_in(tier), "a tier was mixed up"
            idle = np.flatnonzero(self._uses == _INDEXED)
            assert self.historical_in(tier) == len(self.part(idle, tier)), "historical blocks are miscounted"
        assert int(self._uses.min()) >= 0, "a block has negative uses"
        incoming = self._uses[self._incoming]
        assert bool(np.all(incoming == _REFERENCE)), "an incoming block is indexed or not held exactly once"
        assert np.array_equal(numbers_of(self._packed), np.arange(self.blocks)), (
            "an address has a wrong number"
        )

    def _give_back(self, numbers: BlockNumbers) -> None:
        if self.all_on_device(numbers):
            self._free[Tier.DEVICE].give(numbers)
            return
        for tier in Tier:
            self._free[tier].give(self.part(numbers, tier))

    def _append(self, count: int, tier: Tier) -> BlockNumbers:
        first, self.blocks = self.blocks, self.blocks + count
        assert self.blocks <= MAX_BLOCKS, f"{self.blocks} blocks; at most {MAX_BLOCKS} have numbers"
        self._packed = np.concatenate((self._packed, pack_first(count, tier, first)))
        self._generations = self._packed.view(np.uint32)[LOW_HALF::2]
        self._tier_of = np.concatenate((self._tier_of, np.full(count, tier, np.uint8)))
        self._uses = np.concatenate((self._uses, np.zeros(count, np.int32)))
        self._incoming = np.concatenate((self._incoming, np.zeros(count, np.bool_)))
        self._retired = np.concatenate((self._retired, np.zeros(count, np.bool_)))
        self._origins = np.concatenate((self._origins, np.zeros(count, np.uint8)))
        self._columns = BlockColumns(self._packed, self._uses, self._origins, self._historical)
        return np.arange(first, self.blocks, dtype=np.int64)
