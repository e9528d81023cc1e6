"""The bodies of the operations endpoints, and how they are made from the backend's words. Types and pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import asdict

from memserve.core.messages import Trace
from memserve.core.types import Ledger
from memserve.server.backend import (
    ClusterView,
    Health,
    InstanceView,
    LineView,
    LostInstance,
    TierSize,
    TreeView,
)


class HealthBody(msgspec.Struct, frozen=True):
    """Body of ``GET /health``; ``instances`` counts them by state."""

    status: str
    message: str
    instances: dict[str, int]
    lost: tuple[LostInstance, ...]


class InstanceBlocks(msgspec.Struct, frozen=True):
    total: int
    free: int
    active: int
    historical: int
    incoming: int


class InstanceBody(msgspec.Struct, frozen=True):
    """One instance in ``GET /v1/cluster``; ``prices`` in seconds, as in ``StepPrices``."""

    instance: str
    role: str
    state: str
    incarnation: int
    pid: int
    isa: str
    blocks: InstanceBlocks
    waiting: int
    running: int
    tokens_to_prefill: int
    counters: dict[str, float]
    prices: dict[str, float] | None = None


class ClusterBody(msgspec.Struct, frozen=True):
    """Body of ``GET /v1/cluster``."""

    model: str
    policy: str
    phases: str
    block_tokens: int
    block_bytes: int
    instances: tuple[InstanceBody, ...]
    trees: tuple[TreeView, ...]
    line: LineView = LineView()


class MemoryBody(msgspec.Struct, frozen=True):
    """Body of ``PUT /v1/cluster/{instance}/memory``: bytes of the tiers to resize."""

    device: int | None = None
    host: int | None = None
    disk: int | None = None


class MemoryAnswer(msgspec.Struct, frozen=True):
    """Its answer: what the tiers named are to have from now on."""

    instance: str
    tiers: tuple[TierSize, ...]


class RoleBody(msgspec.Struct, frozen=True):
    """Body of ``PUT /v1/cluster/{instance}/role``: ``prefill``, ``decode`` or ``colocated``."""

    role: str


class RoleAnswer(msgspec.Struct, frozen=True):
    """Its answer: what the instance does from now on, and what it did before."""

    instance: str
    role: str
    before: str


class TraceEntry(msgspec.Struct, frozen=True):
    """A room that a request entered; ``at`` is a monotonic clock shared by this machine, s.

    ``ledger`` where the prompt was computed: the same as in the answer's usage.
    """

    instance: str
    room: str
    event: str
    at: float
    ledger: Ledger | UnsetType = UNSET


class TraceBody(msgspec.Struct, frozen=True):
    """Body of ``GET /v1/traces/{id}``."""

    request: str
    entries: tuple[TraceEntry, ...]


def trace_body(request: str, traces: Sequence[Trace]) -> TraceBody:
    """A trace as clients see it."""
    entries = (TraceEntry(x.instance, x.room, x.event, x.at, x.ledger or UNSET) for x in traces)
    return TraceBody(request, tuple(entries))


def health_body(health: Health) -> HealthBody:
    """Health as clients see it."""
    counts = {entry.state: entry.count for entry in health.instances}
    return HealthBody(health.status, health.message, counts, health.lost)


def cluster_body(view: ClusterView) -> ClusterBody:
    """The cluster as clients see it."""
    return ClusterBody(
        view.model,
        view.policy,
        view.phases,
        view.block_tokens,
        view.block_bytes,
        tuple(_instance_body(one) for one in view.instances),
        view.trees,
        view.line,
    )


def _instance_body(one: InstanceView) -> InstanceBody:
    blocks = InstanceBlocks(
        one.blocks_total, one.blocks_free, one.blocks_active, one.blocks_historical, one.blocks_incoming
    )
    return InstanceBody(
        one.instance,
        one.role,
        one.state,
        one.incarnation,
        one.pid,
        one.isa,
        blocks,
        one.waiting,
        one.running,
        one.tokens_to_prefill,
        {counter.name: counter.value for counter in one.counters},
        None if one.prices is None else asdict(one.prices),
    )
