"""The memory behind blocks: memfd segments, mapped shared. Knows bytes and block numbers, nothing else.

A segment has no name in the file system and is gone with the last process that maps it. It is sealed
against resizing, so a peer that maps it can never be hit by a bus error. More memory is another segment; less
is holes in segments, whose pages the system has back.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import ConfigError, LayoutMismatch
from memserve.mempool.address import BlockNumbers
from memserve.mempool.holes import punch_hole
from memserve.mempool.segments import Parts, SegmentMap, runs_of

_MADV_POPULATE_WRITE = 23
_POPULATE_STEP = 2 << 20
"""Bytes per call: short, because the address space is locked meanwhile."""
MOST_SEGMENTS = 250
"""So many descriptors go into one message between processes."""
_NOTHING = np.empty(0, np.int64)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Extent(NamedTuple):
    """``blocks`` blocks, numbered from ``first`` on."""

    first: int
    blocks: int


class Segment:
    """A run of blocks in one mapped memfd; ``memory``: uint8[blocks * block_bytes]."""

    def __init__(self, fd: int, extent: Extent, block_bytes: int) -> None:
        mapped = mmap.mmap(fd, extent.blocks * block_bytes, flags=mmap.MAP_SHARED)
        with contextlib.suppress(OSError):
            # Fewer page faults and TLB misses, where the system has huge pages for shared memory.
            mapped.madvise(mmap.MADV_HUGEPAGE)
        self.extent = extent
        self.memory = np.frombuffer(mapped, np.uint8)
        self.base = self.memory.ctypes.data
        self.has_holes = False

    def populate(self, stop: threading.Event) -> None:
        """Have the kernel supply all pages, in small steps, until done or ``stop`` is set."""
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start in range(0, len(self.memory), _POPULATE_STEP):
            size = min(_POPULATE_STEP, len(self.memory) - start)
            # What was given back must stay so. An old kernel refuses: pages come on first use then.
            if stop.is_set() or self.has_holes or madvise(self.base + start, size, _MADV_POPULATE_WRITE):
                return


class Arena:
    """Blocks of ``block_bytes`` bytes in one or more segments; pages are touched on first use only.

    Unmapping happens when the last user of a segment's memory lets go of it, so a copy under way is never
    left without the ground it stands on.
    """

    def __init__(self, block_bytes: int, pieces: int = 1) -> None:
        assert block_bytes > 0 and block_bytes % pieces == 0, "a block needs bytes, and equal pieces"
        self.block_bytes = block_bytes
        self.pieces = pieces
        """Contiguous pieces per block; pieces of the same kind lie side by side."""
        self.piece_bytes = block_bytes // pieces
        self.fds: list[int] = []
        """A descriptor per segment of own memory; empty when attached."""
        self.reused = 0
        """How many times blocks came into use again, with new pages: registered memory has the old ones."""
        self._segments: list[Segment] = []
        self.map = SegmentMap(_NOTHING, _NOTHING, _NOTHING, block_bytes, pieces)
        """Where blocks lie in this process's memory."""

    @classmethod
    def allocate(cls, block_bytes: int, blocks: int, name: str, pieces: int = 1) -> Arena:
        """Own memory for ``blocks`` blocks; ``name`` shows up in ``/proc/PID/maps``."""
        arena = cls(block_bytes, pieces)
        arena.grow(Extent(0, blocks), name)
        return arena

    @classmethod
    def attach(
        cls, block_bytes: int, fds: Sequence[int], extents: Sequence[Extent], pieces: int = 1
    ) -> Arena:
        """Map a peer's segments for reading and writing. The descriptors stay the caller's.

        Raises ``LayoutMismatch`` when a segment is smaller than the peer said.
        """
        return cls(block_bytes, pieces).extended(fds, extents)

    def extended(self, fds: Sequence[int], extents: Sequence[Extent]) -> Arena:
        """This attached arena with all segments that the peer has by now. Errors: see :meth:`attach`.

        What is mapped already stays so, and those who use this arena may go on doing so.
        """
        arena = Arena(self.block_bytes, self.pieces)
        for segment in self._segments:
            arena._add(segment)
        known = set(self.extents)
        for fd, extent in zip(fds, extents, strict=True):
            size = os.fstat(fd).st_size
            if size < extent.blocks * self.block_bytes:
                raise LayoutMismatch(
                    f"a segment of {extent.blocks} blocks of {self.block_bytes} bytes has only {size} bytes"
                )
            if extent not in known:
                arena._add(Segment(fd, extent, self.block_bytes))
        return arena

    def grow(self, extent: Extent, name: str) -> None:
        """Add a segment for blocks numbered higher than all here. Raises ``ConfigError`` if refused."""
        if len(self._segments) == MOST_SEGMENTS:
            raise ConfigError(f"a pool cannot have more than {MOST_SEGMENTS} segments; grow in larger steps")
        size = extent.blocks * self.block_bytes
        with contextlib.ExitStack() as undo:
            try:
                fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                undo.callback(os.close, fd)
                os.ftruncate(fd, size)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
                self._add(Segment(fd, extent, self.block_bytes))
            except OSError as error:
                raise ConfigError(
                    f"cannot map {size} bytes for the KV pool ({error}); lower pool.memory"
                ) from error
            undo.pop_all()
        self.fds.append(fd)

    def give_back(self, numbers: BlockNumbers) -> None:
        """Let the system have the pages of own blocks that nobody uses; they read as zeros afterwards.

        Whole pages only: neighbours that are not multiples of a page should go together.
        """
        page, numbers = mmap.PAGESIZE, np.sort(numbers)
        for fd, segment in zip(self.fds, self._segments, strict=True):
            blocks, size = segment.extent.blocks, self.piece_bytes
            within = numbers - segment.extent.first
            within = within[(within >= 0) & (within < blocks)]
            segment.has_holes |= len(within) > 0
            for (start, end), piece in itertools.product(_runs(within), range(self.pieces)):
                low = -(-(piece * blocks + start) * size // page) * page
                high = (piece * blocks + end) * size // page * page
                if high > low:
                    punch_hole(fd, low, high - low)

    @property
    def blocks(self) -> int:
        return sum(extent.blocks for extent in self.extents)

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The block numbers of each segment, ascending."""
        return tuple(segment.extent for segment in self._segments)

    def covers(self, numbers: BlockNumbers) -> bool:
        """Whether no number (of a block in the peer's memory) is beyond what is mapped here."""
        last = self._segments[-1].extent
        return not len(numbers) or int(numbers.max()) < last.first + last.blocks

    def pointers(self, numbers: BlockNumbers) -> NDArray[np.uint64]:
        """Addresses in this process of all pieces of blocks int64[n], block by block: uint64[n * pieces]."""
        return self.map.pointers(numbers)

    def block_memory(self, number: int) -> NDArray[np.uint8]:
        """The bytes of one block, in place: uint8[block_bytes], or uint8[pieces, piece_bytes]."""
        at = int(self.map.segments_of(np.array([number]))[0])
        within, memory = number - int(self.map.firsts[at]), self._segments[at].memory
        if self.pieces == 1:
            return memory[within * self.block_bytes : (within + 1) * self.block_bytes]
        return memory.reshape(self.pieces, -1, self.piece_bytes)[:, within]

    def units(self, numbers: BlockNumbers, parts: Parts, unit_bytes: int) -> UnitMemory:
        """The memory of units: parts ``parts`` of blocks ``numbers``, see ``SegmentMap``."""
        where = self.map
        at = where.segments_of(numbers)
        pointers = where.unit_pointers(numbers, parts, unit_bytes)
        return UnitMemory(
            pointers,
            unit_bytes,
            [segment.memory for segment in self._segments],
            at,
            pointers.view(np.int64) - where.bases[at],
            where.touching(numbers, parts, unit_bytes),
        )

    def populate(self, stop: threading.Event, first: int = 0) -> None:
        """Touch memory ahead of its use: first use of a page costs as much as ten copies of it.

        All segments of blocks from number ``first`` on. For a background thread; other threads may use the
        arena meanwhile.
        """
        for segment in [x for x in self._segments if x.extent.first >= first]:
            segment.populate(stop)

    def close(self) -> None:
        """Let go of descriptors and memory."""
        while self.fds:
            os.close(self.fds.pop())
        self._segments = []

    def _add(self, segment: Segment) -> None:
        self._segments.append(segment)
        extents = np.array(self.extents, np.int64).reshape(-1, 2)
        bases = np.array([segment.base for segment in self._segments], np.int64)
        # Replaced as a whole, for other threads.
        self.map = SegmentMap(extents[:, 0], extents[:, 1], bases, self.block_bytes, self.pieces)


@dataclass(frozen=True, slots=True, eq=False)
class UnitMemory:
    """The memory of a sequence of units, in place; ``pointers``: uint64[n]. Keeps it mapped."""

    pointers: NDArray[np.uint64]
    unit_bytes: int
    _segments: list[NDArray[np.uint8]]
    _at: NDArray[np.int64]
    _begins: NDArray[np.int64]
    _touching: NDArray[np.bool_]

    def views(self, first: int, units: int) -> list[memoryview]:
        """The bytes of ``units`` units (at least one) from ``first`` on; neighbours come as one."""
        starts = [first]
        if units > 1:
            starts += (np.flatnonzero(~self._touching[first : first + units - 1]) + first + 1).tolist()
        found = []
        for start, end in itertools.pairwise([*starts, first + units]):
            begin, size = int(self._begins[start]), (end - start) * self.unit_bytes
            found.append(self._segments[self._at[start]][begin : begin + size].data)
        return found


def _runs(numbers: BlockNumbers) -> Iterator[tuple[int, int]]:
    """Ascending ``numbers`` as runs of neighbours: first, and last plus one."""
    if len(numbers):
        starts, counts = runs_of(np.diff(numbers) == 1)
        firsts = numbers[starts]
        yield from zip(firsts.tolist(), (firsts + counts).tolist(), strict=True)
