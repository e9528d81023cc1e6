"""What the pool asks of an eviction policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from memserve.core.radix import Path
from memserve.core.types import Namespace, Tokens
from memserve.mempool.index import IndexEntry, IndexNode
from memserve.mempool.usage import Usage

IdleTail = Callable[[NDArray[np.int32], int, int], int]
"""Of the first so many blocks (second argument) of an edge, how many at the end are held by nobody.

At most as many as the third argument says are looked at.
"""


class Victim(NamedTuple):
    """Give up all but the first ``keep`` blocks of a leaf (0: the leaf itself)."""

    node: IndexNode
    keep: int


class EvictionPolicy(Protocol):
    """Learns what is used, and names victims. ``now`` is the pool's clock in seconds.

    It sees leaves of one tier only, because a prefix is useless to nobody as long as something continues
    it. A leaf is trimmed from its end by exactly what is needed, and never where a block is referenced.
    """

    def use(self, path: Path[IndexEntry], now: float) -> None:
        """Somebody asked for the blocks of ``path`` and found them."""
        ...

    def publish(
        self, namespace: Namespace, tokens: Tokens, path: Path[IndexEntry], blocks: int, now: float
    ) -> Usage:
        """``tokens`` (int32[n]) are being published: ``path``, which is known, and ``blocks`` blocks beyond.

        Returns the past of those; what is known is as fresh as after a use, which this is not.
        """
        ...

    def add_leaf(self, leaf: IndexNode) -> None:
        """This node is a leaf from now on, or has changed as one, until it is dropped."""
        ...

    def choose(self, need: int, idle_tail: IdleTail, now: float) -> list[Victim] | None:
        """Victims that free exactly ``need`` blocks, in the order of their removal; None if there is less.

        Every node named is a leaf when its turn comes. The caller removes all of them; the leaves that this
        leaves behind are known already.
        """
        ...
