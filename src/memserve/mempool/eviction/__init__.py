"""Which historical KV to give up first: exchangeable policies behind one protocol. Pure.

Time comes in as an argument and nothing is random, so a replay evicts the very same blocks.
"""

from __future__ import annotations

from memserve.core.errors import ConfigError
from memserve.mempool.eviction.classic import (
    GreedyDualSizeFrequency,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    SegmentedLRU,
)
from memserve.mempool.eviction.hit_density import HitDensity
from memserve.mempool.eviction.policy import EvictionPolicy, IdleTail, Victim

_SIMPLE: dict[str, type[EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "slru": SegmentedLRU,
    "lfu": LeastFrequentlyUsed,
    "gdsf": GreedyDualSizeFrequency,
}


def policy_by_name(name: str, pool_blocks: int, block_tokens: int) -> EvictionPolicy:
    """A new policy for a pool of so many blocks and tokens per block. Raises ``ConfigError``."""
    if name == "hit-density":
        return HitDensity(pool_blocks, block_tokens)
    if name not in _SIMPLE:
        accepted = ", ".join(("hit-density", *_SIMPLE))
        raise ConfigError(f"pool.eviction is {name!r}; accepted: {accepted}")
    return _SIMPLE[name]()


__all__ = [
    "EvictionPolicy",
    "GreedyDualSizeFrequency",
    "HitDensity",
    "IdleTail",
    "LeastFrequentlyUsed",
    "LeastRecentlyUsed",
    "SegmentedLRU",
    "Victim",
    "policy_by_name",
]
