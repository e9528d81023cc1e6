"""A small cluster for scheduler tests: instances p*, d*, c* whose pools say what they are told to say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memserve.core.messages import (
    Heartbeat,
    LoadReport,
    Member,
    Moved,
    PoolEvent,
    PoolEvents,
    Ready,
    Removed,
    Snapshot,
    Stored,
    TierName,
)
from memserve.core.types import (
    InstanceId,
    Namespace,
    RequestId,
    Role,
    StepPrices,
    Tokens,
    as_tokens,
    pack_tokens,
)
from memserve.scheduler.decision import RouteRequest
from memserve.scheduler.feeds import EventOutcome
from memserve.scheduler.places import Leg, Work
from memserve.scheduler.state import SchedulerState, Share

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "c": Role.COLOCATED}
SPACE = Namespace("model")


class Cluster:
    """Builds messages and applies them to ``state``. Paths are (start, blocks): consecutive tokens."""

    def __init__(self) -> None:
        self.state = SchedulerState()

    def tokens(self, start: int, blocks: int) -> Tokens:
        return as_tokens(range(start, start + 16 * blocks))

    def member(self, name: str, incarnation: int = 1) -> Member:
        return Member(InstanceId(name), incarnation, ROLES[name[0]], f"@{name}")

    def ready(self, name: str, block_tokens: int = 16) -> Ready:
        return Ready(
            instance=InstanceId(name),
            peer_address=f"@{name}",
            model="model",
            context=8192,
            block_tokens=block_tokens,
            blocks=1024,
            block_bytes=1,
            layout_fingerprint="",
            isa="",
        )

    def add(self, *names: str, incarnation: int = 1) -> None:
        for name in names:
            self.state.add_instance(self.member(name, incarnation), self.ready(name))

    def stored(self, start: int, blocks: int) -> Stored:
        return Stored(SPACE, pack_tokens(self.tokens(start, blocks)))

    def removed(self, start: int, blocks: int, keep: int) -> Removed:
        return Removed(SPACE, pack_tokens(self.tokens(start, blocks)), keep * 16)

    def moved(self, start: int, blocks: int, keep: int, tier: TierName = "host") -> Moved:
        """Of the path, all but the first ``keep`` blocks."""
        return Moved(SPACE, pack_tokens(self.tokens(start, blocks)), keep * 16, tier)

    def events(self, name: str, seq: int, *events: PoolEvent, incarnation: int = 1) -> PoolEvents:
        return PoolEvents(InstanceId(name), incarnation, seq, events)

    def apply(self, name: str, seq: int, *events: PoolEvent, incarnation: int = 1) -> EventOutcome:
        return self.state.apply_events(self.events(name, seq, *events, incarnation=incarnation))

    def snapshot(
        self, name: str, next_seq: int, *paths: Stored, moved: tuple[Moved, ...] = (), incarnation: int = 1
    ) -> EventOutcome:
        return self.state.apply_snapshot(Snapshot(InstanceId(name), incarnation, next_seq, paths, moved))

    def set_wire(self, **fields: float) -> None:
        self.state.wire = replace(self.state.wire, **fields)

    def heartbeat(self, name: str, incarnation: int = 1, **load: float | StepPrices) -> Heartbeat:
        return Heartbeat(InstanceId(name), incarnation, LoadReport(**load))

    def report(self, name: str, incarnation: int = 1, **load: float | StepPrices) -> None:
        self.state.apply_load(self.heartbeat(name, incarnation, **load))

    def request(self, name: str, start: int = 0, blocks: int = 4, session: str | None = None) -> RouteRequest:
        return RouteRequest(RequestId(name), SPACE, self.tokens(start, blocks), session)

    def book(self, name: str, prefill: str, decode: str, tokens: int) -> None:
        """Load ``prefill`` with tokens to compute and ``decode`` with as much context."""
        first = Share(InstanceId(prefill), Work(prefill_tokens=tokens, requests=int(prefill != decode)))
        second = Share(InstanceId(decode), Work(context_tokens=tokens, requests=1))
        self.state.book(RequestId(name), first, second)

    def held(self, leg: Leg, start: int, blocks: int) -> dict[InstanceId, int]:
        """Blocks of the path that each instance is believed to hold."""
        holdings = self.state.match(SPACE, self.tokens(start, blocks))
        places = self.state.places(leg).by_id
        held = holdings.by_instance().items()
        return {name: tokens // 16 for name, tokens in held if name in places}

    def on_device(self, start: int, blocks: int) -> dict[InstanceId, int]:
        """Blocks of the path that each of its holders is believed to have on its device."""
        holdings = self.state.match(SPACE, self.tokens(start, blocks)).expected()
        return {name: holdings.on_device(name) // 16 for name in holdings.by_instance()}

    def load(self, name: str) -> Work:
        return next(state.load for state in self.state.instances() if state.instance == name)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()
