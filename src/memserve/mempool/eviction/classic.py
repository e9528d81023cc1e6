"""Well-known policies: LRU, segmented LRU, LFU and GDSF. The yardsticks for the default, and choices too."""

from __future__ import annotations

from memserve.mempool.eviction.policy import IdleTail, Victim
from memserve.mempool.eviction.queues import QueuedPolicy, Rank
from memserve.mempool.index import IndexNode
from memserve.mempool.usage import Run

_FREQUENCIES = 32
"""Uses beyond this number are not told apart."""


class LeastRecentlyUsed(QueuedPolicy):
    """What was not used for longest goes first."""

    def rank(self, leaf: IndexNode, run: Run) -> Rank:
        return 0, run.stamp


class SegmentedLRU(QueuedPolicy):
    """What was published and never used goes first; within the used and the unused, by recency."""

    def __init__(self) -> None:
        super().__init__(queues=2)

    def rank(self, leaf: IndexNode, run: Run) -> Rank:
        return 0 if run.uses < 2 else 1, run.stamp


class LeastFrequentlyUsed(QueuedPolicy):
    """What was used least often goes first; among equals, by recency."""

    def __init__(self) -> None:
        super().__init__(queues=_FREQUENCIES)

    def rank(self, leaf: IndexNode, run: Run) -> Rank:
        return min(run.uses, _FREQUENCIES) - 1, run.stamp


class GreedyDualSizeFrequency(QueuedPolicy):
    """GDSF (Cherkasova 1998): uses times cost per block, plus the rank of the last victim at the last use.

    The cost of a block is that of computing it again, which grows with what it must attend to.
    """

    def __init__(self, depth_cost: float = 0.02 / 32) -> None:
        super().__init__()
        self._depth_cost = depth_cost
        self._inflation = 0.0

    def stamp(self, now: float) -> float:
        return self._inflation

    def rank(self, leaf: IndexNode, run: Run) -> Rank:
        depth = run.start
        above = leaf.parent
        while above is not None:
            depth += above.payload.usage.blocks
            above = above.parent
        return 0, run.stamp + run.uses * (1 + self._depth_cost * depth)

    def choose(self, need: int, idle_tail: IdleTail, now: float) -> list[Victim] | None:
        victims = super().choose(need, idle_tail, now)
        for victim in victims or ():
            first = victim.node.payload.usage.run_at(victim.keep + 1)
            self._inflation = max(self._inflation, self.rank(victim.node, first)[1])
        return victims
