"""MemPool: one elastic memory pool for the KV cache of an instance, and transfers between pools."""

from memserve.mempool.address import Addresses, Origin, Tier
from memserve.mempool.disk import DiskTier
from memserve.mempool.eviction import EvictionPolicy, HitDensity, LeastRecentlyUsed, policy_by_name
from memserve.mempool.layer_gate import LayerGate
from memserve.mempool.layout import Arrangement, KVLayout
from memserve.mempool.match import Match
from memserve.mempool.modes import TransferMode
from memserve.mempool.pool import MemPool
from memserve.mempool.results import Freed, Inserted, Resized, Transferred
from memserve.mempool.stats import AbortCause, EvictionCause, LinkTraffic, PoolStats
from memserve.mempool.transfer.endpoint import TransferEndpoint
from memserve.mempool.transport import Transport

__all__ = [
    "AbortCause",
    "Addresses",
    "Arrangement",
    "DiskTier",
    "EvictionCause",
    "EvictionPolicy",
    "Freed",
    "HitDensity",
    "Inserted",
    "KVLayout",
    "LayerGate",
    "LeastRecentlyUsed",
    "LinkTraffic",
    "Match",
    "MemPool",
    "Origin",
    "PoolStats",
    "Resized",
    "Tier",
    "TransferEndpoint",
    "TransferMode",
    "Transferred",
    "Transport",
    "policy_by_name",
]
