"""Leaves in queues by rank: the machinery that eviction policies share. Knows no policy.

A queue is a heap in which a leaf's place is corrected when it comes up, so most uses touch no heap.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from memserve.core.radix import Path
from memserve.core.types import Namespace, Tokens
from memserve.mempool.eviction.policy import IdleTail, Victim
from memserve.mempool.index import IndexEntry, IndexNode, open_children, parent_in_tier
from memserve.mempool.usage import Run, Usage

_SWEEP = 1024
"""Queue entries beyond which outdated ones are looked for."""
_TICK = 1e-6
"""Seconds between uses that the clock cannot tell apart, so that their order is kept."""


class Rank(NamedTuple):
    """Which queue a leaf waits in, and its key there; the lowest key goes first."""

    queue: int
    key: float


class _Plan:
    """What has been chosen so far: how many blocks are left of each victim, in the order of removal."""

    def __init__(self, idle_tail: IdleTail) -> None:
        self._idle_tail = idle_tail
        self._idle: dict[IndexNode, int] = {}
        self._gone_children: dict[IndexNode, int] = {}
        self.left: dict[IndexNode, int] = {}

    def left_of(self, leaf: IndexNode) -> int:
        return self.left.get(leaf, leaf.payload.usage.blocks)

    def idle(self, leaf: IndexNode) -> int:
        """Blocks at the end of what is left of ``leaf`` that nobody holds."""
        if leaf not in self._idle:
            self._idle[leaf] = self._idle_tail(leaf)
        return self._idle[leaf]

    def give_up(self, leaf: IndexNode, blocks: int) -> None:
        self.left[leaf] = self.left_of(leaf) - blocks
        self._idle[leaf] -= blocks

    def give_up_last(self, leaf: IndexNode) -> IndexNode | None:
        """All of ``leaf`` was given up; returns its parent if that is a leaf now."""
        parent = parent_in_tier(leaf)
        if parent is None:
            return None
        self._gone_children[parent] = self._gone_children.get(parent, 0) + 1
        return parent if self.is_leaf(parent) else None

    def is_leaf(self, node: IndexNode) -> bool:
        """Whether nothing continues ``node`` in its tier once the plan so far is carried out."""
        return node.attached and open_children(node) == self._gone_children.get(node, 0)


class QueuedPolicy:
    """An eviction policy that has to rank leaves, and to say which queue is the next to give one up."""

    def __init__(self, queues: int = 1) -> None:
        self._queues: list[list[tuple[float, int, IndexNode]]] = [[] for _ in range(queues)]
        self._places: dict[IndexNode, tuple[Rank, int]] = {}
        """Of each leaf the rank it waits with, and the number of its one valid entry."""
        self._entries = 0
        self._keys: list[float | None] = [None] * queues
        """The key of each queue's front, unless the queue has ``_changed`` or its front was deleted."""
        self._changed: set[int] = set()
        self._sweep_at = _SWEEP
        self._latest = float("-inf")

    # --- what makes a policy ---

    def rank(self, leaf: IndexNode, run: Run) -> Rank:
        """Where a leaf belongs whose last blocks are ``run``. Within a queue, uses may only raise the key."""
        raise NotImplementedError

    def pick(self, keys: list[float | None], now: float) -> int:
        """The queue to evict from, given the lowest key in each that is not empty; there is at least one."""
        return next(queue for queue, key in enumerate(keys) if key is not None)

    def stamp(self, now: float) -> float:
        """What is noted as the time of a use; it never goes back. By default every use gets its own."""
        self._latest = max(now, self._latest + _TICK)
        return self._latest

    # --- what the pool calls ---

    def use(self, path: Path[IndexEntry], now: float) -> None:
        self._mark(path, now, times=1)

    def publish(
        self, namespace: Namespace, tokens: Tokens, path: Path[IndexEntry], blocks: int, now: float
    ) -> Usage:
        self._mark(path, now, times=0)
        return Usage(blocks, [Run(0, 1, self.stamp(now))])

    def add_leaf(self, leaf: IndexNode) -> None:
        self._place(leaf, leaf.payload.usage.blocks)

    def choose(self, need: int, idle_tail: IdleTail, now: float) -> list[Victim] | None:
        plan = _Plan(idle_tail)
        stuck: list[IndexNode] = []
        while need > 0 and (leaf := self._take(plan, now)) is not None:
            left, idle = plan.left_of(leaf), plan.idle(leaf)
            taken = min(idle, left - leaf.payload.usage.run_at(left).start, need)
            need -= taken
            if taken:
                plan.give_up(leaf, taken)
            if taken == idle < left:
                stuck.append(leaf)
            elif taken < left:
                self._place(leaf, left - taken)
            elif (parent := plan.give_up_last(leaf)) is not None:
                self.add_leaf(parent)
        for leaf in stuck if need <= 0 else [*stuck, *plan.left]:
            self.add_leaf(leaf)
        return None if need > 0 else [Victim(node, keep) for node, keep in plan.left.items()]

    # --- inside ---

    def _mark(self, path: Path[IndexEntry], now: float, times: int) -> None:
        if not path.nodes:
            return
        stamp, last = self.stamp(now), path.nodes[-1]
        for node in path.nodes:
            usage = node.payload.usage
            usage.use(path.tail if node is last else usage.blocks, stamp, times)
            if node in self._places:
                # Its queue may be another one now.
                self.add_leaf(node)

    def _place(self, leaf: IndexNode, left: int) -> None:
        """Queue a leaf of which ``left`` blocks are left, if it does not wait in that queue already."""
        rank = self.rank(leaf, leaf.payload.usage.run_at(left))
        place = self._places.get(leaf)
        if place is not None:
            if place[0] == rank:
                return
            self._changed.add(place[0].queue)
            if place[0].queue == rank.queue and place[0].key <= rank.key:
                return
        self._entries += 1
        self._places[leaf] = (rank, self._entries)
        heapq.heappush(self._queues[rank.queue], (rank.key, self._entries, leaf))
        self._changed.add(rank.queue)
        self._sweep_at -= 1
        if self._sweep_at <= 0:
            self._sweep()

    def _take(self, plan: _Plan, now: float) -> IndexNode | None:
        """The leaf to evict from next, taken out of its queue; parents of victims count as leaves."""
        while (queue := self._next_queue(plan, now)) is not None:
            key = self._keys[queue]
            # A leaf that was deleted may have passed for the front until now.
            self._keys[queue] = self._front(queue, plan)
            if self._keys[queue] == key:
                self._changed.add(queue)
                leaf = heapq.heappop(self._queues[queue])[2]
                del self._places[leaf]
                return leaf
        return None

    def _next_queue(self, plan: _Plan, now: float) -> int | None:
        while self._changed:
            queue = self._changed.pop()
            self._keys[queue] = self._front(queue, plan)
        return None if all(key is None for key in self._keys) else self.pick(self._keys, now)

    def _front(self, queue: int, plan: _Plan) -> float | None:
        """The lowest key of a queue, once outdated entries before it are gone."""
        heap = self._queues[queue]
        while heap:
            key, entry, leaf = heap[0]
            if not self._is_valid(leaf, entry):
                heapq.heappop(heap)
                continue
            if not plan.is_leaf(leaf):
                heapq.heappop(heap)
                del self._places[leaf]
                continue
            left = plan.left_of(leaf)
            rank = self.rank(leaf, leaf.payload.usage.run_at(left))
            if rank.queue == queue and rank.key <= key:
                return key
            heapq.heappop(heap)
            del self._places[leaf]
            self._place(leaf, left)
        return None

    def _is_valid(self, leaf: IndexNode, entry: int) -> bool:
        place = self._places.get(leaf)
        return place is not None and place[1] == entry

    def _sweep(self) -> None:
        # Leaves that were dropped otherwise (delete) would stay queued for ever in a pool that never fills.
        self._places = {leaf: place for leaf, place in self._places.items() if leaf.attached}
        for heap in self._queues:
            heap[:] = [x for x in heap if self._is_valid(x[2], x[1])]
            heapq.heapify(heap)
        self._changed.update(range(len(self._queues)))
        self._sweep_at = max(_SWEEP, len(self._places))
