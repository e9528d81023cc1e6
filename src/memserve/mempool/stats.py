"""What a pool has done and what it holds, as values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class AbortCause(enum.StrEnum):
    """Why a transfer to this pool did not publish."""

    EXPIRED = "expired"
    SENDER_LOST = "sender_lost"
    SENDER_ABORTED = "sender_aborted"
    CORRUPT = "corrupt"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class PoolStats:
    """State in blocks, and counters since the start.

    Hits and misses are prompt tokens found and not found by ``match``; evicted in blocks; ``sent`` and
    ``received`` count published transfers, the ``_bytes`` what was copied for them.
    """

    blocks: int
    free: int
    active: int
    historical: int
    incoming: int
    leases: int
    tree_nodes: int
    tree_blocks: int
    hit_tokens: int
    miss_tokens: int
    evicted_blocks: int
    sent: int
    sent_bytes: int
    received: int
    received_bytes: int
    stale: int
    aborts: Mapping[AbortCause, int]

    def counters(self) -> Mapping[str, float]:
        """Everything but the states, flat, for metrics."""
        names = ("hit_tokens", "miss_tokens", "evicted_blocks", "sent", "sent_bytes", "received")
        more = ("received_bytes", "stale", "tree_nodes", "tree_blocks", "leases")
        flat = {f"pool_{name}": float(getattr(self, name)) for name in names + more}
        return flat | {f"pool_aborts_{cause.value}": float(count) for cause, count in self.aborts.items()}


@dataclass(slots=True)
class Counters:
    """The running counts behind :class:`PoolStats`."""

    hit_tokens: int = 0
    miss_tokens: int = 0
    evicted_blocks: int = 0
    sent: int = 0
    sent_bytes: int = 0
    received: int = 0
    received_bytes: int = 0
    stale: int = 0
    aborts: dict[AbortCause, int] = field(default_factory=lambda: dict.fromkeys(AbortCause, 0))
