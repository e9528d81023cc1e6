"""What processes say to each other. Tagged structs; tokens travel as packed int32 (``pack_tokens``).

Two protocols, each a union at the end of this file:
control  server <-> instance (membership, requests, tokens, pool events, statistics)
peer     instance <-> instance (MemPool handshakes and transfers)
"""

from __future__ import annotations

from typing import Literal

import msgspec

from memserve.core.types import (
    FinishReason,
    InstanceId,
    Ledger,
    Namespace,
    RequestId,
    Role,
    SamplingParams,
    StepPrices,
    TokenLogprob,
)


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of everything that travels; the class name is the tag."""


class Ok(Message, frozen=True):
    """An answer without content."""


class Failed(Message, frozen=True):
    """An answer that is an error: ``kind`` is the class name in ``core.errors``."""

    kind: str
    message: str


# --- control: membership ------------------------------------------------------------------------------


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A living instance as others need to know it. ``peer_address`` is where its MemPool listens."""

    instance: InstanceId
    incarnation: int
    role: Role
    peer_address: str


class Join(Message, frozen=True):
    """First message of an instance on its control connection."""

    instance: InstanceId
    incarnation: int
    role: Role
    pid: int


class Leave(Message, frozen=True):
    """The instance has been told to end: no new request for it, and ``Shutdown`` when it has none left."""

    instance: InstanceId


class LoadProgress(Message, frozen=True):
    """What an instance is doing before it is ready, for people: a stage's name and 0..1."""

    instance: InstanceId
    stage: str
    fraction: float


class StartFailed(Message, frozen=True):
    """Last words of an instance that cannot come up: what is wrong and what would help."""

    instance: InstanceId
    message: str


class Ready(Message, frozen=True):
    """The instance can take requests. ``blocks`` of ``block_bytes`` bytes, ``context`` in tokens.

    A step computes up to ``step_tokens`` prompt tokens, and fewer where streams would wait longer than
    ``target_tpot`` seconds for their next token (0: they wait).
    """

    instance: InstanceId
    peer_address: str
    model: str
    context: int
    block_tokens: int
    blocks: int
    block_bytes: int
    layout_fingerprint: str
    isa: str
    step_tokens: int = 512
    target_tpot: float = 0.0


class Members(Message, frozen=True):
    """All living instances; whoever is missing is dead or has left."""

    members: tuple[Member, ...]


class Heartbeat(Message, frozen=True):
    """Sent every interval by a thread of its own; carries the load report."""

    instance: InstanceId
    incarnation: int
    load: LoadReport


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """Requests waiting and running, prompt tokens still to prefill, blocks of the device, those by state.

    ``prices`` is what the engine's steps have cost of late, ``swap`` the seconds per token to bring KV up
    to the device from where it lies below; 0 without lower tiers.
    """

    waiting: int = 0
    running: int = 0
    tokens_to_prefill: int = 0
    free_blocks: int = 0
    active_blocks: int = 0
    historical_blocks: int = 0
    incoming_blocks: int = 0
    blocks: int = 0
    prices: StepPrices | None = None
    swap: float = 0.0


class SetRole(Message, frozen=True):
    """Do this kind of work from now on; answered by ``Ok``. What runs goes on as it was begun."""

    role: Role


class Shutdown(Message, frozen=True):
    """Stop now; requests in flight are cancelled."""


# --- control: requests --------------------------------------------------------------------------------


class Fetch(msgspec.Struct, frozen=True, array_like=True):
    """A peer is sending the first ``tokens`` tokens of a prompt: worth waiting for at most ``seconds``."""

    tokens: int
    seconds: float


class Submit(Message, frozen=True):
    """Run a request. With ``decode_on`` set, prefill here and hand over to that instance."""

    request: RequestId
    namespace: Namespace
    tokens: bytes
    sampling: SamplingParams
    decode_on: InstanceId | None = None
    trace: bool = False
    fetch: Fetch | None = None


class SendPrefix(Message, frozen=True):
    """Send ``to`` what is cached here of ``tokens``, for ``request``; answered by ``PrefixSent``."""

    request: RequestId
    namespace: Namespace
    tokens: bytes
    to: InstanceId


class PrefixSent(Message, frozen=True):
    """``tokens`` tokens of a prefix are at the other instance now, and ``bytes`` bytes went there.

    ``error`` says why it were not more, if it failed. ``seconds`` is what moving the bytes took.
    """

    request: RequestId
    instance: InstanceId
    tokens: int
    bytes: int
    seconds: float
    error: str = ""


class Cancel(Message, frozen=True):
    """End a request. ``reason`` stop publishes what it has computed, cancelled frees it likewise safely."""

    request: RequestId
    reason: FinishReason


class TokenChunk(Message, frozen=True):
    """Sampled tokens. ``offset`` counts from the first sampled token, so chunks can be put in order.

    ``ledger`` comes with the first chunk, ``finish`` with the last.
    """

    request: RequestId
    offset: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    ledger: Ledger | None = None


class RequestError(Message, frozen=True):
    """An accepted request that could not be finished."""

    request: RequestId
    kind: str
    message: str


class RequestClosed(Message, frozen=True):
    """Last message about a request: nothing of it is held any more. ``backflow_bytes`` went D to P."""

    request: RequestId
    instance: InstanceId
    backflow_bytes: int = 0


class Trace(Message, frozen=True):
    """A traced request entered a room of ``docs/data-path.md``. ``at`` is the sender's monotonic clock, s.

    ``ledger`` comes with the room where the prompt is all there.
    """

    request: RequestId
    instance: InstanceId
    room: str
    event: str
    at: float
    ledger: Ledger | None = None


# --- control: pool events -----------------------------------------------------------------------------


TierName = Literal["device", "host", "disk"]


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="stored"):
    """``tokens``, full blocks from the root on, can be found in the pool: on the device, if not ``Moved``."""

    namespace: Namespace
    tokens: bytes


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="removed"):
    """Of what begins with ``tokens`` only the first ``keep`` tokens are still there.

    ``tokens`` goes from the root to the end of the first block that is gone.
    """

    namespace: Namespace
    tokens: bytes
    keep: int


class Moved(msgspec.Struct, frozen=True, array_like=True, tag="moved"):
    """Of the path ``tokens``, what begins with token ``start`` lies in ``tier`` now."""

    namespace: Namespace
    tokens: bytes
    start: int
    tier: TierName


PoolEvent = Stored | Removed | Moved


class PoolEvents(Message, frozen=True):
    """A batch of events; ``seq`` is the number of the first. A gap means: ask for a snapshot."""

    instance: InstanceId
    incarnation: int
    seq: int
    events: tuple[PoolEvent, ...]


class GetSnapshot(Message, frozen=True):
    """Ask for everything that the pool's index holds."""


class Snapshot(Message, frozen=True):
    """The index as ``Stored`` paths (one per leaf); the next event will carry ``next_seq``.

    ``moved`` says what of it lies below the device.
    """

    instance: InstanceId
    incarnation: int
    next_seq: int
    paths: tuple[Stored, ...]
    moved: tuple[Moved, ...] = ()


class ResizePool(Message, frozen=True):
    """Let a tier of the pool have ``memory`` bytes, in whole blocks; answered by ``PoolResized``."""

    tier: TierName
    memory: int


class PoolResized(Message, frozen=True):
    """The tier is to have ``blocks`` blocks; of those that are too many ``draining`` are still in use."""

    blocks: int
    draining: int
    block_bytes: int


class GetStats(Message, frozen=True):
    """Ask for the instance's statistics."""


class Stats(Message, frozen=True):
    """Counters and gauges of an instance; names are those of ``docs/operations.md``."""

    instance: InstanceId
    load: LoadReport
    counters: dict[str, float]


# --- peer: MemPool transfers --------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """Handshake of two pools.

    Processes that say the same ``host`` can map each other's memory; ``fd_address`` serves the descriptors.
    ``backends`` are the ways in which this side can receive blocks. For ``tcp`` it listens at ``tcp_port``,
    and the answer to a Hello names the connection there that belongs to this one: ``stream``.
    """

    instance: InstanceId
    incarnation: int
    layout_fingerprint: str
    layout_text: str
    host: str
    fd_address: str
    backends: tuple[str, ...] = ("shm",)
    tcp_port: int = 0
    stream: bytes = b""


class Reserve(Message, frozen=True):
    """Allocate on the receiver. ``tokens`` is empty for a plain transfer of ``blocks`` blocks.

    With tokens the receiver matches first and allocates only what it lacks. ``seconds`` bounds how long
    the reservation may stand without progress. ``backend`` says by which way the bytes will come, ``mode``
    in which units and in which order. ``dst``: packed addresses of blocks lent to the sender; empty: the
    receiver chooses.
    """

    transfer: str
    namespace: Namespace
    tokens: bytes
    blocks: int
    seconds: float
    backend: str = "shm"
    mode: str = "by_request_aggregated"
    dst: bytes = b""


class Reserved(Message, frozen=True):
    """Of the path, ``held`` blocks are already there; ``dst`` are packed addresses for the others.

    ``ticket`` stands for the transfer in streams of blocks. ``memory`` says how to write by ``nixl``.
    """

    transfer: str
    held: int
    dst: bytes
    ticket: int = 0
    memory: bytes = b""


class Copied(Message, frozen=True):
    """``units`` units from the ``first`` on have been written: they may be verified already."""

    transfer: str
    first: int
    units: int


class Publish(Message, frozen=True):
    """The bytes are in place: verify ``checksums`` (packed uint64, one per unit), then publish.

    ``attachment`` goes to the receiver's engine together with the blocks (empty: nobody takes them).
    """

    transfer: str
    checksums: bytes
    origin: int
    attachment: bytes = b""


class Published(Message, frozen=True):
    """Readable on the receiver now. ``inserted`` counts blocks that were new in its index."""

    transfer: str
    inserted: int


class AbortTransfer(Message, frozen=True):
    """Forget a transfer; its reserved blocks are free again. Repeating it is harmless."""

    transfer: str
    reason: str


class Allocate(Message, frozen=True):
    """Lend the sender of this ``blocks`` blocks of a tier until it has not used them for ``seconds``.

    The same ``loan`` again gives the same blocks.
    """

    loan: str
    blocks: int
    tier: int
    seconds: float


class Allocated(Message, frozen=True):
    """``addrs`` are packed addresses."""

    loan: str
    addrs: bytes


class GiveBack(Message, frozen=True):
    """The sender of this needs these blocks no longer."""

    addrs: bytes


class GivenBack(Message, frozen=True):
    """How many were freed, and how many were not lent to the peer (any more)."""

    freed: int
    stale: int


ControlMessage = (
    Ok
    | Failed
    | Join
    | Leave
    | LoadProgress
    | StartFailed
    | Ready
    | Members
    | Heartbeat
    | SetRole
    | Shutdown
    | Submit
    | SendPrefix
    | PrefixSent
    | Cancel
    | TokenChunk
    | RequestError
    | RequestClosed
    | Trace
    | PoolEvents
    | GetSnapshot
    | Snapshot
    | GetStats
    | Stats
    | ResizePool
    | PoolResized
)
PeerMessage = (
    Ok
    | Failed
    | Hello
    | Reserve
    | Reserved
    | Copied
    | Publish
    | Published
    | AbortTransfer
    | Allocate
    | Allocated
    | GiveBack
    | GivenBack
)
