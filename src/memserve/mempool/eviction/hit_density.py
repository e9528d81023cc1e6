"""The default policy: give up what promises the fewest hits per block and second."""

from __future__ import annotations

from memserve.core.radix import Path
from memserve.core.types import Namespace, Tokens
from memserve.mempool.eviction.density import HitDensities
from memserve.mempool.eviction.history import CHUNK_BLOCKS, MOST_USES, PrefixHistory
from memserve.mempool.eviction.policy import IdleTail, Victim
from memserve.mempool.eviction.queues import QueuedPolicy, Rank
from memserve.mempool.index import IndexEntry, IndexNode
from memserve.mempool.usage import Run, Usage

_FOLLOW_CLASSES = (0, 1, 1, 2, 3, 3, 3, 3, 4)
"""The class of blocks that were used once, by how often the block before them had been."""
_USE_CLASSES = 5
"""Classes of blocks that were used twice, three times, ... or more often."""
_LAST_FOLLOW_CLASS = _FOLLOW_CLASSES[-1]
_CLASSES = _LAST_FOLLOW_CLASS + 1 + _USE_CLASSES
_EVALUATE_EVERY = 50
"""Uses between two evaluations of the densities."""
_FADE = 0.99
"""What is left of a count after each: half of it goes in 3,500 uses."""
_CHUNKS_PER_BLOCK = 0.5
"""Chunks remembered per block of the pool: sixteen times what it can hold."""


class HitDensity(QueuedPolicy):
    """Learns for classes of blocks at what age they are used again, also from what was evicted too early.

    A class is how often blocks were used, and of those used once, how established the session is that they
    belong to. Each class has a queue by last use; the queue whose front has the lowest hit density gives up
    its front. Until something was used again that is plain LRU.
    """

    def __init__(self, pool_blocks: int, block_tokens: int, *, fade: float = _FADE) -> None:
        super().__init__(queues=_CLASSES)
        self._page = block_tokens
        self._history = PrefixHistory(max(1024, int(pool_blocks * _CHUNKS_PER_BLOCK)), block_tokens)
        self._densities = HitDensities(_CLASSES, fade)
        self._evaluate_in = 0

    def rank(self, leaf: IndexNode, run: Run) -> Rank:
        return _class_of(run.uses, run.follows), run.stamp

    def worth(self, queue: int, key: float, now: float) -> tuple[float, float]:
        density, until = self._densities.of(queue, now - key)
        return density, key + until

    def use(self, path: Path[IndexEntry], now: float) -> None:
        self._evaluate_in -= 1
        if self._evaluate_in < 0:
            self._densities.evaluate()
            self.revalue()
            self._evaluate_in = _EVALUATE_EVERY
        last = path.nodes[-1] if path.nodes else None
        for node in path.nodes:
            usage = node.payload.usage
            for run, blocks in usage.lengths(path.tail if node is last else usage.blocks):
                self._learn(run.uses, run.follows, now - run.stamp, blocks)
        super().use(path, now)

    def publish(
        self, namespace: Namespace, tokens: Tokens, path: Path[IndexEntry], blocks: int, now: float
    ) -> Usage:
        known, page = path.blocks, self._page
        follows = min(path.nodes[-1].payload.usage.run_at(path.tail).uses, MOST_USES) if path.nodes else 0
        past = self._history.recall(namespace, tokens[: (known + blocks) * page], follows, now)
        self._mark(path, now, times=0)
        stamp = self.stamp(now)
        runs: list[Run] = []
        start = upto = 0
        # A chunk that begins in what is known says nothing about where the prompt goes on from there.
        known_chunks = -(-known // CHUNK_BLOCKS)
        for chunks, uses, followed, last_use in past:
            upto += chunks
            if upto > known_chunks:
                end = min(upto * CHUNK_BLOCKS - known, blocks)
                self._learn(uses, followed, now - last_use, end - start)
                runs.append(Run(start, uses + 1, stamp, followed))
                start = end
        if start < blocks or not runs:
            runs.append(Run(start, 1, stamp, follows))
            self._densities.enter(_class_of(1, follows), blocks - start)
        return Usage(blocks, runs)

    def choose(self, need: int, idle_tail: IdleTail, now: float) -> list[Victim] | None:
        victims = super().choose(need, idle_tail, now)
        for victim in victims or ():
            usage = victim.node.payload.usage
            self._densities.evicted(now - usage.runs[-1].stamp, usage.blocks - victim.keep)
        return victims

    def _learn(self, uses: int, follows: int, age: float, blocks: int) -> None:
        """``blocks`` blocks were used once more after ``age`` seconds."""
        self._densities.use(_class_of(uses, follows), age, blocks, _class_of(uses + 1, follows))


def _class_of(uses: int, follows: int) -> int:
    if uses > 1:
        return _LAST_FOLLOW_CLASS + (uses - 1 if uses <= _USE_CLASSES else _USE_CLASSES)
    return _FOLLOW_CLASSES[follows] if follows < len(_FOLLOW_CLASSES) else _LAST_FOLLOW_CLASS
