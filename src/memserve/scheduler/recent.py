"""Prefixes by when they were last used: a prompt tree without events, as in the paper (section 6).

Knows only what it is told at each use, and forgets it a time to live later, whatever the pools do.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.scheduler.holdings import Holdings, Numbers, merge_tiers
from memserve.scheduler.tree import GlobalPromptTree

_SLICES = 2
"""Trees per time to live: more forget more exactly, and each makes a match dearer."""


class _Slice(NamedTuple):
    """What was used from ``begin`` s until the next slice begins."""

    begin: float
    tree: GlobalPromptTree


class RecentPrompts:
    """One tree per slice of time; a whole one is dropped at once, so no entry needs a time of its own.

    What was used is known for ``ttl`` to ``1.5 * ttl`` seconds. ``memory`` in bytes for all slices together.
    """

    def __init__(self, block_tokens: int, numbers: Numbers, ttl: float, *, memory: int | None = None) -> None:
        self._block_tokens = block_tokens
        self._numbers = numbers
        self._span = ttl / _SLICES
        self._ttl = ttl
        self._share = None if memory is None else memory // (_SLICES + 1)
        self._slices: deque[_Slice] = deque()

    @property
    def nodes(self) -> int:
        """Edges in all slices."""
        return sum(one.tree.nodes for one in self._slices)

    @property
    def memory(self) -> int:
        """Bytes taken, about."""
        return sum(one.tree.memory for one in self._slices)

    def held_tokens(self, instance: InstanceId) -> int:
        """Tokens of all prefixes used of late, those of several slices counted in each."""
        return sum(one.tree.held_tokens(instance) for one in self._slices)

    def use(self, instance: InstanceId, namespace: Namespace, tokens: Tokens, now: float) -> None:
        """``instance`` has computed or read ``tokens`` (contiguous int32[n])."""
        self.advance(now)
        if not self._slices or now - self._slices[-1].begin >= self._span:
            tree = GlobalPromptTree(self._block_tokens, self._numbers, memory=self._share)
            self._slices.append(_Slice(now, tree))
        self._slices[-1].tree.store(instance, namespace, tokens)

    def advance(self, now: float) -> None:
        """Forget what has not been used for the time to live."""
        while self._slices and now - self._slices[0].begin >= self._span + self._ttl:
            self._slices.popleft()

    def match(self, namespace: Namespace, tokens: Tokens) -> Holdings:
        """Who is believed to hold how much of ``tokens`` (contiguous int32[n])."""
        tiers = [tier for one in self._slices for tier in one.tree.match(namespace, tokens).tiers]
        return Holdings(merge_tiers(tiers))

    def drop_instance(self, instance: InstanceId) -> None:
        """Forget all of it, before its number becomes another's."""
        for one in self._slices:
            one.tree.drop_instance(instance)

    def check(self) -> None:
        """Raise ``AssertionError`` if a slice contradicts itself."""
        for one in self._slices:
            one.tree.check()
