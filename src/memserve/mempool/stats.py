"""What a pool has done and what it holds, as values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from memserve.core.types import InstanceId
from memserve.mempool.blocks import BlockCounts
from memserve.mempool.modes import TransferMode
from memserve.mempool.results import Transferred


class EvictionCause(enum.StrEnum):
    """For what cached KV was given up."""

    ALLOCATION = "allocation"
    SWAP = "swap"
    RESIZE = "resize"


class AbortCause(enum.StrEnum):
    """Why a transfer to this pool did not publish."""

    EXPIRED = "expired"
    SENDER_LOST = "sender_lost"
    SENDER_ABORTED = "sender_aborted"
    CORRUPT = "corrupt"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class LinkTraffic:
    """What has gone to ``peer`` over ``backend`` in one mode; ``calls`` counts contiguous pieces."""

    peer: InstanceId
    backend: str
    mode: TransferMode
    transfers: int
    bytes: int
    calls: int


@dataclass(frozen=True, slots=True)
class PoolStats:
    """State in blocks, and counters since the start.

    The first six are the device's, ``host`` and ``disk`` those of the tiers below it. ``draining`` blocks are
    held and to be retired: they count by their state, but not among ``blocks``. Hits and misses are
    prompt tokens found and not found by ``match``, with what lay in lower tiers counted once more by tier.
    Evicted (dropped for good), swapped and corrupt are in blocks; ``sent`` and ``received`` count published
    transfers, the ``_bytes`` what was copied for them, ``spared_bytes`` what the receivers had,
    ``traffic`` the sent ones by link and mode. ``lent`` blocks are active ones that peers have allocated
    here.
    """

    blocks: int
    draining: int
    free: int
    active: int
    historical: int
    incoming: int
    host: BlockCounts
    disk: BlockCounts
    pinned: int
    leases: int
    tree_nodes: int
    tree_blocks: int
    hit_tokens: int
    miss_tokens: int
    host_hit_tokens: int
    disk_hit_tokens: int
    evicted_blocks: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    corrupt_blocks: int
    sent: int
    sent_bytes: int
    spared_bytes: int
    received: int
    received_bytes: int
    stale: int
    aborts: Mapping[AbortCause, int]
    evictions: Mapping[EvictionCause, int]
    lent: int = 0
    traffic: tuple[LinkTraffic, ...] = ()

    def counters(self) -> Mapping[str, float]:
        """Everything but the states, flat, for metrics."""
        names = (
            "hit_tokens",
            "miss_tokens",
            "evicted_blocks",
            "sent",
            "sent_bytes",
            "spared_bytes",
            "received",
        )
        more = ("received_bytes", "stale", "tree_nodes", "tree_blocks", "leases", "pinned", "corrupt_blocks")
        lower = ("host_hit_tokens", "disk_hit_tokens", "swapped_out_blocks", "swapped_in_blocks", "draining")
        flat = {f"pool_{name}": float(getattr(self, name)) for name in (*names, *more, *lower)}
        flat["pool_lent"] = float(self.lent)
        for link in self.traffic:
            for name in ("transfers", "bytes", "calls"):
                key = f"pool_sent_{name}_{link.backend}_{link.mode}"
                flat[key] = flat.get(key, 0.0) + float(getattr(link, name))
        for tier, counts in (("host", self.host), ("disk", self.disk)):
            flat[f"pool_{tier}_free"] = float(counts.free)
            flat[f"pool_{tier}_historical"] = float(counts.historical)
        flat |= {f"pool_evicted_by_{cause.value}": float(count) for cause, count in self.evictions.items()}
        return flat | {f"pool_aborts_{cause.value}": float(count) for cause, count in self.aborts.items()}


class Traffic:
    """The running counts behind :class:`LinkTraffic`."""

    def __init__(self) -> None:
        self._links: dict[tuple[InstanceId, str, TransferMode], LinkTraffic] = {}

    def count(self, peer: InstanceId, done: Transferred) -> None:
        """A transfer to ``peer`` was published."""
        link = (peer, done.backend, done.mode)
        was = self._links.get(link, LinkTraffic(*link, transfers=0, bytes=0, calls=0))
        self._links[link] = LinkTraffic(
            *link, was.transfers + 1, was.bytes + done.bytes, was.calls + done.calls
        )

    def links(self) -> tuple[LinkTraffic, ...]:
        return tuple(self._links.values())


@dataclass(slots=True)
class Counters:
    """The running counts behind :class:`PoolStats`."""

    hit_tokens: int = 0
    miss_tokens: int = 0
    host_hit_tokens: int = 0
    disk_hit_tokens: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    corrupt_blocks: int = 0
    sent: int = 0
    sent_bytes: int = 0
    spared_bytes: int = 0
    received: int = 0
    received_bytes: int = 0
    stale: int = 0
    aborts: dict[AbortCause, int] = field(default_factory=lambda: dict.fromkeys(AbortCause, 0))
    evictions: dict[EvictionCause, int] = field(default_factory=lambda: dict.fromkeys(EvictionCause, 0))
    """Blocks."""
