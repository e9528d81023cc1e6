"""The memory behind blocks: memfd segments, mapped shared. Knows bytes and block numbers, nothing else.

A segment has no name in the file system and is gone with the last process that maps it. It is sealed
against resizing, so a peer that maps it can never be hit by a bus error. More memory is another segment.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import ConfigError, LayoutMismatch
from memserve.mempool.address import BlockNumbers
from memserve.mempool.segments import Parts, SegmentMap, runs_of

_MADV_POPULATE_WRITE = 23
_POPULATE_STEP = 2 << 20
"""Bytes per call: short, because the address space is locked meanwhile."""
_NOTHING = np.empty(0, np.int64)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment:
    """A run of blocks in one mapped memfd; ``memory``: uint8[blocks * block_bytes]."""

    def __init__(self, fd: int, blocks: int, block_bytes: int) -> None:
        mapped = mmap.mmap(fd, blocks * block_bytes, flags=mmap.MAP_SHARED)
        with contextlib.suppress(OSError):
            # Fewer page faults and TLB misses, where the system has huge pages for shared memory.
            mapped.madvise(mmap.MADV_HUGEPAGE)
        self.blocks = blocks
        self.memory = np.frombuffer(mapped, np.uint8)
        self.base = self.memory.ctypes.data

    def populate(self, stop: threading.Event) -> None:
        """Have the kernel supply all pages, in small steps, until done or ``stop`` is set."""
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start in range(0, len(self.memory), _POPULATE_STEP):
            size = min(_POPULATE_STEP, len(self.memory) - start)
            if stop.is_set() or madvise(self.base + start, size, _MADV_POPULATE_WRITE):
                # An old kernel refuses: pages come on first use then, as they do without this.
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
        self._segments: list[Segment] = []
        self.map = SegmentMap(_NOTHING, _NOTHING, _NOTHING, block_bytes, pieces)
        """Where blocks lie in this process's memory."""

    @classmethod
    def allocate(cls, block_bytes: int, blocks: int, name: str, pieces: int = 1) -> Arena:
        """Own memory for ``blocks`` blocks; ``name`` shows up in ``/proc/PID/maps``."""
        arena = cls(block_bytes, pieces)
        arena.grow(blocks, name)
        return arena

    @classmethod
    def attach(cls, block_bytes: int, fds: Sequence[int], blocks: Sequence[int], pieces: int = 1) -> Arena:
        """Map a peer's segments for reading and writing. The descriptors stay the caller's.

        Raises ``LayoutMismatch`` when a segment is smaller than the peer said.
        """
        arena = cls(block_bytes, pieces)
        for fd, count in zip(fds, blocks, strict=True):
            size = os.fstat(fd).st_size
            if size < count * block_bytes:
                raise LayoutMismatch(
                    f"a segment of {count} blocks of {block_bytes} bytes has only {size} bytes"
                )
            arena._add(Segment(fd, count, block_bytes))
        return arena

    def grow(self, blocks: int, name: str) -> None:
        """Add a segment of ``blocks`` blocks. Raises ``ConfigError`` when the system refuses."""
        size = blocks * self.block_bytes
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            self._add(Segment(fd, blocks, self.block_bytes))
        except OSError as error:
            os.close(fd)
            raise ConfigError(
                f"cannot map {size} bytes for the KV pool ({error}); lower pool.memory"
            ) from error
        self.fds.append(fd)

    @property
    def blocks(self) -> int:
        return sum(segment.blocks for segment in self._segments)

    @property
    def segment_blocks(self) -> tuple[int, ...]:
        """Blocks of each segment, in the order of block numbers."""
        return tuple(segment.blocks for segment in self._segments)

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

    def unit_memory(self, numbers: BlockNumbers, parts: Parts, unit_bytes: int) -> list[memoryview]:
        """The bytes of units (see ``SegmentMap``) in their order, in place; neighbours come as one."""
        if not len(numbers):
            return []
        starts, counts = runs_of(self.map.touching(numbers, parts, unit_bytes))
        firsts = numbers[starts]
        at = self.map.segments_of(firsts)
        pointers = self.map.unit_pointers(firsts, parts[starts], unit_bytes).view(np.int64)
        begins, sizes = pointers - self.map.bases[at], counts * unit_bytes
        return [
            self._segments[segment].memory[begin : begin + size].data
            for segment, begin, size in zip(at.tolist(), begins.tolist(), sizes.tolist(), strict=True)
        ]

    def populate(self, stop: threading.Event) -> None:
        """Touch all memory ahead of its use: first use of a page costs as much as ten copies of it.

        For a background thread; other threads may use the arena meanwhile.
        """
        for segment in list(self._segments):
            segment.populate(stop)

    def close(self) -> None:
        """Let go of descriptors and memory."""
        while self.fds:
            os.close(self.fds.pop())
        self._segments = []

    def _add(self, segment: Segment) -> None:
        self._segments.append(segment)
        counts = np.array(self.segment_blocks, np.int64)
        bases = np.array([segment.base for segment in self._segments], np.int64)
        self.map = SegmentMap(np.cumsum(counts) - counts, counts, bases, self.block_bytes, self.pieces)
