"""The decision log: all that a scheduler is told, when, and what it decides; enough to decide it all again.

One JSON object per line, the first one says how the scheduler was made. Tokens are packed int32 in base64.
Knows no file: lines go to a sink.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from memserve.core.clock import Clock
from memserve.core.errors import NoInstance
from memserve.core.messages import Heartbeat, Member, PoolEvents, Ready, Snapshot
from memserve.core.types import InstanceId, Namespace, RequestId, Tokens, pack_tokens
from memserve.scheduler.costs import Wire
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.policies import Policy
from memserve.scheduler.prompt_trees import TreeOptions
from memserve.scheduler.service import GlobalScheduler

VERSION = 1
Sink = Callable[[bytes], object]
"""Takes a line, its end included; what it returns does not matter."""


class Entry(msgspec.Struct, frozen=True, tag=True, tag_field="what"):
    """A line of the log; ``at`` in the scheduler's clock, s."""

    at: float


class Opened(Entry, frozen=True, tag="opened"):
    """The first line. ``history``: decisions that were remembered."""

    version: int
    policy: str
    block_tokens: int
    history: int
    trees: TreeOptions


class Routed(Entry, frozen=True, tag="routed"):
    """A request came; ``decision`` is None where ``error`` says why nobody could take it."""

    request: RequestId
    namespace: Namespace
    tokens: bytes
    session: str | None
    max_tokens: int
    decision: Decision | None
    error: str = ""
    behind: int = 0


class Foreseen(Entry, frozen=True, tag="foreseen"):
    """It was asked how soon a request would be answered: that counts as use of what it found."""

    request: RequestId
    namespace: Namespace
    tokens: bytes
    session: str | None
    max_tokens: int
    behind: int = 0


class FirstToken(Entry, frozen=True, tag="first-token"):
    request: RequestId
    cached: int | None


class Finished(Entry, frozen=True, tag="finished"):
    request: RequestId


class Answered(Entry, frozen=True, tag="answered"):
    tokens: int


class AnswerLearnt(Entry, frozen=True, tag="answer-learnt"):
    request: RequestId
    namespace: Namespace
    tokens: bytes


class BecameReady(Entry, frozen=True, tag="ready"):
    member: Member
    ready: Ready


class Suspected(Entry, frozen=True, tag="suspected"):
    instance: InstanceId


class Recovered(Entry, frozen=True, tag="recovered"):
    instance: InstanceId


class Draining(Entry, frozen=True, tag="draining"):
    instance: InstanceId


class Lost(Entry, frozen=True, tag="lost"):
    instance: InstanceId


class RoleChanged(Entry, frozen=True, tag="role"):
    member: Member


class Beat(Entry, frozen=True, tag="heartbeat"):
    heartbeat: Heartbeat


class Transferred(Entry, frozen=True, tag="transferred"):
    bytes: int
    seconds: float


class Linked(Entry, frozen=True, tag="link"):
    wire: Wire


class Stored(Entry, frozen=True, tag="pool-events"):
    events: PoolEvents


class Listed(Entry, frozen=True, tag="snapshot"):
    snapshot: Snapshot


class Closed(Entry, frozen=True, tag="closed"):
    """The last line, where the log did not end with its scheduler."""

    reason: str


News = (
    Routed
    | Foreseen
    | FirstToken
    | Finished
    | Answered
    | AnswerLearnt
    | BecameReady
    | Suspected
    | Recovered
    | Draining
    | Lost
    | RoleChanged
    | Beat
    | Transferred
    | Linked
    | Stored
    | Listed
    | Closed
)


class _Held:
    """A clock that stands still during a call, so that the call has one time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._now = clock.now()

    def now(self) -> float:
        return self._now

    def look(self) -> float:
        """Take the time for the next call."""
        self._now = self._clock.now()
        return self._now


class RecordingScheduler(GlobalScheduler):
    """A scheduler that writes down what it is told, in order, and what it decides."""

    def __init__(
        self,
        policy: Policy,
        clock: Clock,
        sink: Sink,
        *,
        history: int = 1024,
        block_tokens: int = 16,
        explains: bool = True,
        trees: TreeOptions | None = None,
    ) -> None:
        self._held = _Held(clock)
        super().__init__(
            policy, self._held, history=history, block_tokens=block_tokens, explains=explains, trees=trees
        )
        self._sink = sink
        self._encoder = msgspec.json.Encoder()
        self._write(
            Opened(self._held.now(), VERSION, policy.name, block_tokens, history, trees or TreeOptions())
        )

    def route(self, request: RouteRequest) -> Decision:
        at, decision, problem = self._held.look(), None, ""
        try:
            decision = super().route(request)
            return decision
        except NoInstance as error:
            problem = str(error)
            raise
        finally:
            tokens = pack_tokens(request.tokens)
            self._write(
                Routed(
                    at,
                    request.request,
                    request.namespace,
                    tokens,
                    request.session,
                    request.max_tokens,
                    decision,
                    problem,
                    request.behind,
                )
            )

    def foresee(self, request: RouteRequest) -> Decision:
        tokens = pack_tokens(request.tokens)
        self._write(
            Foreseen(
                self._held.look(),
                request.request,
                request.namespace,
                tokens,
                request.session,
                request.max_tokens,
                request.behind,
            )
        )
        return super().foresee(request)

    def first_token(self, request: RequestId, cached: int | None = None) -> None:
        self._write(FirstToken(self._held.look(), request, cached))
        super().first_token(request, cached)

    def answered(self, tokens: int) -> None:
        self._write(Answered(self._held.look(), tokens))
        super().answered(tokens)

    def finish(self, request: RequestId) -> None:
        self._write(Finished(self._held.look(), request))
        super().finish(request)

    def learn_answer(self, request: RequestId, namespace: Namespace, tokens: Tokens) -> None:
        self._write(AnswerLearnt(self._held.look(), request, namespace, pack_tokens(tokens)))
        super().learn_answer(request, namespace, tokens)

    def member_ready(self, member: Member, ready: Ready) -> None:
        self._write(BecameReady(self._held.look(), member, ready))
        super().member_ready(member, ready)

    def member_suspected(self, instance: InstanceId) -> None:
        self._write(Suspected(self._held.look(), instance))
        super().member_suspected(instance)

    def member_recovered(self, instance: InstanceId) -> None:
        self._write(Recovered(self._held.look(), instance))
        super().member_recovered(instance)

    def member_draining(self, instance: InstanceId) -> None:
        self._write(Draining(self._held.look(), instance))
        super().member_draining(instance)

    def member_role_changed(self, member: Member) -> None:
        self._write(RoleChanged(self._held.look(), member))
        super().member_role_changed(member)

    def member_lost(self, instance: InstanceId) -> None:
        self._write(Lost(self._held.look(), instance))
        super().member_lost(instance)

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._write(Beat(self._held.look(), heartbeat))
        super().on_heartbeat(heartbeat)

    def on_transfer(self, moved: int, seconds: float) -> None:
        self._write(Transferred(self._held.look(), moved, seconds))
        super().on_transfer(moved, seconds)

    def set_link(self, wire: Wire) -> None:
        self._write(Linked(self._held.look(), wire))
        super().set_link(wire)

    def on_pool_events(self, events: PoolEvents) -> bool:
        self._write(Stored(self._held.look(), events))
        return super().on_pool_events(events)

    def on_snapshot(self, snapshot: Snapshot) -> bool:
        self._write(Listed(self._held.look(), snapshot))
        return super().on_snapshot(snapshot)

    def _write(self, entry: Entry) -> None:
        self._sink(self._encoder.encode(entry) + b"\n")
