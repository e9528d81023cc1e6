"""Which historical KV to give up first. Pure: knows the leaves of the index and when they were used.

A policy sees leaves only, because a prefix is useless to nobody as long as something continues it; a leaf
is trimmed from its end by exactly what is needed, and never where a block is referenced.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from memserve.mempool.index import IndexNode

_SWEEP = 1024
"""Queue entries beyond which dropped leaves are looked for."""

IdleTail = Callable[[IndexNode], int]
"""How many blocks at the end of a node's edge are held by nobody."""


@dataclass(frozen=True, slots=True)
class Victim:
    """Give up all but the first ``keep`` blocks of a leaf (0: the leaf itself)."""

    node: IndexNode
    keep: int


class EvictionPolicy(Protocol):
    """Learns what is used, and names victims. Nodes are compared by identity."""

    def touch(self, nodes: Iterable[IndexNode]) -> None:
        """These nodes were matched or inserted just now, together."""
        ...

    def add_leaf(self, leaf: IndexNode) -> None:
        """This node is a leaf from now on, until it is dropped."""
        ...

    def choose(self, need: int, idle_tail: IdleTail) -> list[Victim] | None:
        """Victims that free exactly ``need`` blocks, in the order of their removal; None if there is less.

        Every node named is a leaf when its turn comes. The caller removes all of them.
        """
        ...


class LeastRecentlyUsed:
    """The base policy: the leaf that was not used for longest goes first.

    Its queue is a heap in which a leaf's place is corrected only when it comes up, so a touch is O(1).
    """

    def __init__(self) -> None:
        self._uses = itertools.count(1)
        self._entries = itertools.count()
        self._queue: list[tuple[int, int, IndexNode]] = []
        self._queued: set[IndexNode] = set()
        self._sweep_at = _SWEEP

    def touch(self, nodes: Iterable[IndexNode]) -> None:
        now = next(self._uses)
        for node in nodes:
            node.payload.last_use = now

    def add_leaf(self, leaf: IndexNode) -> None:
        if leaf not in self._queued:
            self._queued.add(leaf)
            heapq.heappush(self._queue, (leaf.payload.last_use, next(self._entries), leaf))
        if len(self._queue) > self._sweep_at:
            self._sweep()

    def choose(self, need: int, idle_tail: IdleTail) -> list[Victim] | None:
        victims: list[Victim] = []
        stay: list[IndexNode] = []
        gone_children: dict[IndexNode, int] = {}
        while need > 0 and (leaf := self._pop(gone_children)) is not None:
            size, idle = len(leaf.payload.blocks), idle_tail(leaf)
            taken = min(idle, need)
            if taken:
                victims.append(Victim(leaf, size - taken))
                need -= taken
            if taken < size:
                stay.append(leaf)
            elif leaf.parent is not None:
                gone_children[leaf.parent] = gone_children.get(leaf.parent, 0) + 1
                if gone_children[leaf.parent] == len(leaf.parent.children):
                    self.add_leaf(leaf.parent)
        for leaf in stay:
            self.add_leaf(leaf)
        if need > 0:
            for victim in victims:
                self.add_leaf(victim.node)
            return None
        return victims

    def _sweep(self) -> None:
        # Leaves that were dropped otherwise (delete) would stay queued for ever in a pool that never fills.
        self._queue = [entry for entry in self._queue if entry[2].attached]
        heapq.heapify(self._queue)
        self._queued = {entry[2] for entry in self._queue}
        self._sweep_at = max(_SWEEP, 2 * len(self._queue))

    def _pop(self, gone_children: dict[IndexNode, int]) -> IndexNode | None:
        """The least recently used leaf, taken out of the queue; parents of victims count as leaves."""
        while self._queue:
            queued_use, _, leaf = self._queue[0]
            last_use = leaf.payload.last_use
            if leaf.attached and last_use != queued_use:
                heapq.heapreplace(self._queue, (last_use, next(self._entries), leaf))
                continue
            heapq.heappop(self._queue)
            self._queued.discard(leaf)
            if leaf.attached and len(leaf.children) == gone_children.get(leaf, 0):
                return leaf
        return None
