"""Who holds an edge of the global prompt tree, as bitmasks of instance numbers. Units: blocks."""

from __future__ import annotations


class Holders:
    """Payload of one edge.

    ``full`` has the bits of the instances that hold the whole edge; ``ends`` maps a number of blocks,
    less than the edge has, to those whose holding ends after it. An instance is in at most one of them.
    Everything an instance holds is prefix-closed, so below an edge only bits of its ``full`` occur.
    """

    __slots__ = ("ends", "full")

    def __init__(self, full: int = 0) -> None:
        self.full = full
        self.ends: dict[int, int] = {}

    def split(self, at: int) -> Holders:
        """Part of the radix tree's payload contract: keep the blocks before ``at``, return the rest."""
        lower = Holders(self.full)
        upper_ends: dict[int, int] = {}
        for depth, mask in self.ends.items():
            if depth < at:
                upper_ends[depth] = mask
                continue
            self.full |= mask
            if depth > at:
                lower.ends[depth - at] = mask
        self.ends = upper_ends
        return lower

    def shorten(self, at: int) -> None:
        """Part of the radix tree's payload contract: keep only the blocks before ``at``."""
        self.split(at)

    def append(self, at: int, tail: Holders) -> None:
        """Part of the radix tree's payload contract: the edge of ``at`` blocks grows by ``tail``'s."""
        stayed = self.full & ~tail.mask
        self.full = tail.full
        for depth, mask in tail.ends.items():
            self.ends[at + depth] = mask
        if stayed:
            self.ends[at] = stayed

    @property
    def mask(self) -> int:
        """Everyone who holds at least one block of the edge."""
        found = self.full
        for mask in self.ends.values():
            found |= mask
        return found

    def longest(self, size: int) -> int:
        """Blocks of this edge of ``size`` blocks that anybody holds."""
        return size if self.full else max(self.ends, default=0)

    def depth(self, bit: int, size: int) -> int:
        """Blocks of this edge of ``size`` blocks that the instance with ``bit`` holds."""
        if self.full & bit:
            return size
        for depth, mask in self.ends.items():
            if mask & bit:
                return depth
        return 0

    def set_depth(self, bit: int, depth: int, size: int) -> None:
        """Say that the instance holds the first ``depth`` of the edge's ``size`` blocks, no more, no less."""
        self.full &= ~bit
        for known, mask in self.ends.items():
            if mask & bit:
                if mask == bit:
                    del self.ends[known]
                else:
                    self.ends[known] = mask & ~bit
                break
        if depth == size:
            self.full |= bit
        elif depth:
            self.ends[depth] = self.ends.get(depth, 0) | bit
