"""Leaves in queues by rank: the machinery that eviction policies share. Knows no policy.

A queue is a heap in which a leaf's place is corrected when it comes up, so most uses touch no heap.
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush

from memserve.core.radix import Path
from memserve.core.types import Namespace, Tokens
from memserve.mempool.eviction.policy import IdleTail, Victim
from memserve.mempool.index import IndexEntry, IndexNode, open_children, parent_in_tier
from memserve.mempool.usage import Run, Usage

_SWEEP = 1024
"""Queue entries beyond which outdated ones are looked for."""
_TICK = 1e-6
"""Seconds between uses that the clock cannot tell apart, so that their order is kept."""


Rank = tuple[int, float]
"""Which queue a leaf waits in, and its key there; the lowest key goes first."""


class _Plan:
    """What has been chosen so far: how many blocks are left of each victim, in the order of removal."""

    def __init__(self) -> None:
        self._gone_children: dict[IndexNode, int] = {}
        self.left: dict[IndexNode, int] = {}
        self.seen: set[int] = set()
        """Queues whose front is certain; elsewhere a leaf that was deleted or continued may pass for it."""

    def left_of(self, leaf: IndexNode) -> int:
        left = self.left.get(leaf)
        return leaf.payload.usage.blocks if left is None else left

    def give_up_last(self, leaf: IndexNode) -> IndexNode | None:
        """All of ``leaf`` was given up; returns its parent if that is a leaf now."""
        parent = parent_in_tier(leaf)
        if parent is None:
            return None
        self._gone_children[parent] = self._gone_children.get(parent, 0) + 1
        return parent if self.is_leaf(parent) else None

    def is_leaf(self, node: IndexNode) -> bool:
        """Whether nothing continues ``node`` in its tier once the plan so far is carried out."""
        if not node.children:
            return node.attached
        return node.attached and open_children(node) == self._gone_children.get(node, 0)


class QueuedPolicy:
    """An eviction policy that has to rank leaves, and to say which queue is the next to give one up."""

    def __init__(self, queues: int = 1) -> None:
        self._queues: list[list[tuple[float, int, IndexNode]]] = [[] for _ in range(queues)]
        self._places: dict[IndexNode, tuple[int, float, int]] = {}
        """Of each leaf the queue and key it waits with, and the number of its one valid entry."""
        self._entries = 0
        self._fronts: dict[int, tuple[float, float, int]] = {}
        """What the front of each queue that is not empty is worth until ``_worth_until``, its key, the queue;
        not of those queues that have ``_changed`` or whose front was deleted."""
        self._changed: set[int] = set()
        self._worth_until = math.inf
        self._sweep_at = _SWEEP
        self._latest = float("-inf")

    # --- what makes a policy ---

    def rank(self, leaf: IndexNode, run: Run) -> Rank:
        """Where a leaf belongs whose last blocks are ``run``. Within a queue, uses may only raise the key."""
        raise NotImplementedError

    def worth(self, queue: int, key: float, now: float) -> tuple[float, float]:
        """What the front of a queue is worth, given its key, and until when (seconds of ``now``).

        The lowest goes first, among equals the lowest key. By default a queue is worth its number.
        """
        return queue, math.inf

    def revalue(self) -> None:
        """What fronts are worth has changed."""
        self._worth_until = -math.inf

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
        plan = _Plan()
        stuck: list[IndexNode] = []
        if now > self._worth_until:
            self._worth_until = math.inf
            for _, key, queue in list(self._fronts.values()):
                self._set_front(queue, key, now)
        while need > 0 and (leaf := self._take(plan, now)) is not None:
            left, entry = plan.left_of(leaf), leaf.payload
            wanted = min(left - entry.usage.run_at(left).start, need)
            taken = idle_tail(entry.blocks, left, wanted)
            need -= taken
            if taken:
                plan.left[leaf] = left - taken
            if taken < wanted:
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
        queue, key = self.rank(leaf, leaf.payload.usage.run_at(left))
        place = self._places.get(leaf)
        if place is not None:
            waits_in, waits_with, _ = place
            if waits_in == queue and waits_with == key:
                return
            self._note_change(waits_in, waits_with)
            if waits_in == queue and waits_with <= key:
                return
        self._entries += 1
        self._places[leaf] = (queue, key, self._entries)
        heappush(self._queues[queue], (key, self._entries, leaf))
        self._note_change(queue, key)
        self._sweep_at -= 1
        if self._sweep_at <= 0:
            self._sweep()

    def _take(self, plan: _Plan, now: float) -> IndexNode | None:
        """The leaf to evict from next, taken out of its queue; parents of victims count as leaves."""
        while True:
            while self._changed:
                queue = self._changed.pop()
                plan.seen.add(queue)
                self._set_front(queue, self._front(queue, plan), now)
            if not self._fronts:
                return None
            queue = min(self._fronts.values())[2]
            self._changed.add(queue)
            if queue in plan.seen:
                leaf = heappop(self._queues[queue])[2]
                del self._places[leaf]
                return leaf

    def _note_change(self, queue: int, key: float) -> None:
        """A leaf with this key came to a queue or left it."""
        front = self._fronts.get(queue)
        if front is None or key <= front[1]:
            self._changed.add(queue)

    def _set_front(self, queue: int, key: float | None, now: float) -> None:
        if key is None:
            self._fronts.pop(queue, None)
            return
        worth, until = self.worth(queue, key, now)
        self._fronts[queue] = (worth, key, queue)
        if until < self._worth_until:
            self._worth_until = until

    def _front(self, queue: int, plan: _Plan) -> float | None:
        """The lowest key of a queue, once outdated entries before it are gone."""
        heap, places = self._queues[queue], self._places
        while heap:
            key, entry, leaf = heap[0]
            place = places.get(leaf)
            if place is None or place[2] != entry:
                heappop(heap)
                continue
            if not plan.is_leaf(leaf):
                heappop(heap)
                del places[leaf]
                continue
            left = plan.left_of(leaf)
            now_in, now_with = self.rank(leaf, leaf.payload.usage.run_at(left))
            if now_in == queue and now_with <= key:
                return key
            heappop(heap)
            del places[leaf]
            self._place(leaf, left)
        return None

    def _is_valid(self, leaf: IndexNode, entry: int) -> bool:
        place = self._places.get(leaf)
        return place is not None and place[2] == entry

    def _sweep(self) -> None:
        # Leaves that were dropped otherwise (delete) would stay queued for ever in a pool that never fills.
        self._places = {leaf: place for leaf, place in self._places.items() if leaf.attached}
        for heap in self._queues:
            heap[:] = [x for x in heap if self._is_valid(x[2], x[1])]
            heapify(heap)
        self._changed.update(range(len(self._queues)))
        self._sweep_at = max(_SWEEP, len(self._places))
