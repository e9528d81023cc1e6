"""What the HTTP server needs from the cluster behind it, and the words for that. Knows no HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from memserve.core.messages import TierName, Trace
from memserve.core.types import (
    FinishReason,
    Ledger,
    RequestId,
    Role,
    SamplingParams,
    StepPrices,
    TokenLogprob,
    Tokens,
)
from memserve.scheduler.decision import Decision
from memserve.scheduler.history import Explanation

DEFAULT_TENANT = "default"
"""Whose requests are that name nobody."""


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One prompt to continue once. ``tokens``: int32[n], n >= 1, inside vocabulary and context.

    ``session`` keeps a conversation together for policies that care; ``salt`` separates tenants' KV;
    ``tenant`` is on whose account it runs; of two of its requests that wait, the one with the lower
    ``priority`` goes first; ``slo_ttft``: seconds within which its first token is of use, None: any time.
    ``trace`` asks the instances to report the rooms that the request passes.
    """

    request: RequestId
    tokens: Tokens
    sampling: SamplingParams
    session: str | None = None
    salt: str = ""
    trace: bool = False
    tenant: str = DEFAULT_TENANT
    priority: int = 0
    slo_ttft: float | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """Sampled tokens in order. ``ledger`` comes with the first chunk, ``finish`` with the last.

    A stop token that ended the request is the last of ``tokens``. ``logprobs`` has one entry per token
    when they were asked for, else none.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    ledger: Ledger | None = None


class LostInstance(msgspec.Struct, frozen=True):
    """An instance that died. ``at`` is Unix time in seconds."""

    instance: str
    reason: str
    at: float


class StateCount(msgspec.Struct, frozen=True):
    """How many instances are in one state, for example ``ready``."""

    state: str
    count: int


HealthStatus = Literal["ok", "degraded", "unavailable"]


class Health(msgspec.Struct, frozen=True):
    """Whether requests can be served: all is well, with fewer instances than configured, or not at all."""

    status: HealthStatus
    message: str
    instances: tuple[StateCount, ...] = ()
    lost: tuple[LostInstance, ...] = ()


class Counter(msgspec.Struct, frozen=True):
    """A named figure of an instance; the names are listed in ``docs/operations.md``."""

    name: str
    value: float


class InstanceView(msgspec.Struct, frozen=True):
    """One instance for people. ``blocks_*`` count KV blocks, ``waiting`` and ``running`` requests.

    ``prices``: what its steps have cost of late, None while nothing is known.
    """

    instance: str
    role: str
    state: str
    incarnation: int
    pid: int
    isa: str = ""
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_active: int = 0
    blocks_historical: int = 0
    blocks_incoming: int = 0
    waiting: int = 0
    running: int = 0
    tokens_to_prefill: int = 0
    counters: tuple[Counter, ...] = ()
    prices: StepPrices | None = None


class TierSize(msgspec.Struct, frozen=True):
    """What a tier of an instance's pool is to have; ``draining`` blocks are too many and still in use."""

    tier: str
    blocks: int
    memory: int
    draining: int


class TreeView(msgspec.Struct, frozen=True):
    """A global prompt tree; ``tokens`` held by its instances, summed; ``memory`` in bytes, about.

    The others count tokens of prompts that were answered: those that were believed to be cached where a
    request went, of these the ones that only were to come and the ones that were not found, and those that
    were found and not believed.
    """

    role: str
    nodes: int
    tokens: int
    source: str = "events"
    memory: int = 0
    believed_tokens: int = 0
    promised_tokens: int = 0
    stale_tokens: int = 0
    missed_tokens: int = 0


class RegretView(msgspec.Struct, frozen=True):
    """How a policy's decisions turned out: see ``scheduler.hindsight.RegretSum``; errors are relative."""

    policy: str
    decisions: int
    others: int
    regret: float
    totals: int
    regret_total: float
    error_p50: float
    error_p90: float


class TenantView(msgspec.Struct, frozen=True):
    """A tenant's requests in the line: ``waiting`` now, of ``tokens`` of prompts and expected answers.

    Since the server's start ``waited`` have gone through it, after ``waited_seconds`` together.
    """

    tenant: str
    weight: float
    waiting: int
    tokens: int
    waited: int
    waited_seconds: float


class LineView(msgspec.Struct, frozen=True):
    """The line in front of the instances; ``refusals`` by reason, since the server's start."""

    tenants: tuple[TenantView, ...] = ()
    refusals: tuple[Counter, ...] = ()


class ClusterView(msgspec.Struct, frozen=True):
    """The cluster at one moment. Units: tokens for ``block_tokens``, bytes for ``block_bytes``.

    Since the server's start: ``losses`` of each instance, and ``failovers``, requests that went on elsewhere.
    """

    model: str
    policy: str
    phases: str
    block_tokens: int
    block_bytes: int
    instances: tuple[InstanceView, ...] = ()
    trees: tuple[TreeView, ...] = ()
    regrets: tuple[RegretView, ...] = ()
    losses: tuple[Counter, ...] = ()
    failovers: int = 0
    line: LineView = LineView()


class Backend(Protocol):
    """Runs requests somewhere. All methods are called on one event loop."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Generated, None]:
        """Run a request; iterate to start it, to its end or until it is no longer wanted.

        Closing the generator, or cancelling the task that iterates it, cancels the request everywhere,
        unless :meth:`stop` was called before. Raises ``NoInstance`` or ``Overloaded`` before the first
        chunk, ``RequestFailed`` or ``PeerLost`` at any time.
        """
        ...

    def stop(self, request: RequestId) -> None:
        """End a request as finished, because a stop string was found: its KV is published, not dropped.

        The caller closes the generator next, and reads no more chunks. Unknown or ended requests are fine.
        """
        ...

    def health(self) -> Health:
        """What ``/health`` says; must not wait."""
        ...

    async def cluster(self) -> ClusterView:
        """Fresh figures of all instances that answer in time."""
        ...

    async def resize(self, instance: str, tier: TierName, memory: int) -> TierSize:
        """Let a tier of an instance's pool have ``memory`` bytes, rounded down to whole blocks.

        Raises ``InvalidRequest`` (with code ``not_found`` for an unknown instance) or ``PeerLost``.
        """
        ...

    async def set_role(self, instance: str, role: Role) -> Role:
        """Let an instance do other work, under load, and return what it did before.

        Raises ``InvalidRequest`` (code ``not_found`` for an unknown instance, ``conflict`` where the cluster
        could not serve then) or ``PeerLost``.
        """
        ...

    def decisions(self, request: RequestId) -> tuple[Decision, ...]:
        """Where the request was sent, one decision per attempt; empty when not known."""
        ...

    def why(self, request: RequestId) -> tuple[Explanation, ...]:
        """The same with reasons and with what became of them; also for the name of one attempt."""
        ...

    def trace(self, request: RequestId) -> tuple[Trace, ...]:
        """The rooms that a traced request has passed, in order of time; empty when not known."""
        ...
