"""The memory behind blocks: memfd segments, mapped shared. Knows bytes and block numbers, nothing else.

A segment has no name in the file system and is gone with the last process that maps it. It is sealed
against resizing, so a peer that maps it can never be hit by a bus error. More memory is another segment; less
is holes in segments, whose pages the system has back.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import ConfigError, LayoutMismatch
from memserve.mempool.address import BlockNumbers
from memserve.mempool.holes import punch_hole

_MADV_POPULATE_WRITE = 23
_POPULATE_STEP = 2 << 20
"""Bytes per call: short, because the address space is locked meanwhile."""
MOST_SEGMENTS = 250
"""So many descriptors go into one message between processes."""
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

    def __init__(self, block_bytes: int) -> None:
        assert block_bytes > 0, "a block needs bytes"
        self.block_bytes = block_bytes
        self.fds: list[int] = []
        """A descriptor per segment of own memory; empty when attached."""
        self._segments: list[Segment] = []
        self._places = (np.empty(0, np.int64), np.empty(0, np.int64))
        """First block number and memory address of each segment; replaced as a whole, for other threads."""

    @classmethod
    def allocate(cls, block_bytes: int, blocks: int, name: str) -> Arena:
        """Own memory for ``blocks`` blocks; ``name`` shows up in ``/proc/PID/maps``."""
        arena = cls(block_bytes)
        arena.grow(Extent(0, blocks), name)
        return arena

    @classmethod
    def attach(cls, block_bytes: int, fds: Sequence[int], extents: Sequence[Extent]) -> Arena:
        """Map a peer's segments for reading and writing. The descriptors stay the caller's.

        Raises ``LayoutMismatch`` when a segment is smaller than the peer said.
        """
        return cls(block_bytes).extended(fds, extents)

    def extended(self, fds: Sequence[int], extents: Sequence[Extent]) -> Arena:
        """This attached arena with all segments that the peer has by now. Errors: see :meth:`attach`.

        What is mapped already stays so, and those who use this arena may go on doing so.
        """
        arena = Arena(self.block_bytes)
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
        page = mmap.PAGESIZE
        for fd, segment in zip(self.fds, self._segments, strict=True):
            within = np.sort(numbers) - segment.extent.first
            for start, end in _runs(within[(within >= 0) & (within < segment.extent.blocks)]):
                segment.has_holes = True
                low = -(-start * self.block_bytes // page) * page
                high = end * self.block_bytes // page * page
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
        """Memory addresses in this process of blocks (int64[n], valid numbers): uint64[n]."""
        firsts, bases = self._places
        if len(firsts) == 1:
            within, base = numbers, bases[0]
        else:
            at = np.searchsorted(firsts, numbers, side="right") - 1
            within, base = numbers - firsts[at], bases[at]
        pointers: NDArray[np.int64] = within * self.block_bytes + base
        return pointers.view(np.uint64)

    def block_memory(self, number: int) -> NDArray[np.uint8]:
        """The bytes of one block, in place: uint8[block_bytes]."""
        segment = self._segments[int(np.searchsorted(self._places[0], number, side="right")) - 1]
        start = (number - segment.extent.first) * self.block_bytes
        return segment.memory[start : start + self.block_bytes]

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
        firsts = np.array([extent.first for extent in self.extents], np.int64)
        self._places = firsts, np.array([segment.base for segment in self._segments], np.int64)


def _runs(numbers: BlockNumbers) -> Iterator[tuple[int, int]]:
    """Ascending ``numbers`` as runs of neighbours: first, and last plus one."""
    ends = np.flatnonzero(np.diff(numbers, append=-1) != 1)
    start = 0
    for end in ends.tolist():
        yield int(numbers[start]), int(numbers[end]) + 1
        start = end + 1
