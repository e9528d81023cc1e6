"""What the global scheduler knows: instances, their load, who holds which prefix. Decides nothing.

Changes only through its methods, one per kind of news, so that a log of calls rebuilds the same state.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from memserve.core.errors import LayoutMismatch
from memserve.core.messages import Heartbeat, LoadReport, Member, PoolEvents, Ready, Snapshot
from memserve.core.types import (
    InstanceId,
    Namespace,
    RequestId,
    Role,
    StepPrices,
    Tokens,
)
from memserve.scheduler.accuracy import TreeAccuracy
from memserve.scheduler.costs import Wire
from memserve.scheduler.feeds import EventOutcome, Feed
from memserve.scheduler.fleet import FLOOR_TOKENS, Flags, Fleet, Slots, stretch_of
from memserve.scheduler.holdings import Holdings
from memserve.scheduler.line import PrefillLine
from memserve.scheduler.predictions import Correction, Forecast, Predictions
from memserve.scheduler.prompt_trees import PromptTrees, TreeOptions


class Admission(enum.Enum):
    """Whether an instance gets new requests: yes, only if no other can, or no."""

    OPEN = "open"
    LAST_RESORT = "last resort"
    CLOSED = "closed"


class Leg(enum.Enum):
    """The two parts of a request's way, each with a place of its own or both at one colocated instance.

    ``START``: where a request may begin when costs are weighed. A decode instance may then prefill what
    little is missing there, and keep the request.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    START = "start"


class Work(NamedTuple):
    """Load of an instance: prompt tokens to prefill, tokens of context to decode over, requests.

    ``streams`` are those of the requests whose first token is out.
    """

    prefill_tokens: int = 0
    context_tokens: int = 0
    requests: int = 0
    streams: int = 0

    def plus(self, other: Work) -> Work:
        return Work(self[0] + other[0], self[1] + other[1], self[2] + other[2], self[3] + other[3])

    def minus(self, other: Work) -> Work:
        return Work(self[0] - other[0], self[1] - other[1], self[2] - other[2], self[3] - other[3])

    def at_least(self, other: Work) -> Work:
        return Work(
            max(self[0], other[0]), max(self[1], other[1]), max(self[2], other[2]), max(self[3], other[3])
        )


_NO_REPORT = LoadReport()
_NO_WORK = Work()
_STREAM = Work(streams=1)
_PRIOR = StepPrices()


class Foreign(NamedTuple):
    """Work that this scheduler has not booked, of other shards or from before its start, at ``at`` s:
    ``seconds`` of prefill, and ``streams`` that are decoded.
    """

    at: float = 0.0
    seconds: float = 0.0
    streams: float = 0.0


_NO_FOREIGN = Foreign()


@dataclass(slots=True, eq=False)
class InstanceState:
    """One living instance; ``capacity`` in tokens.

    ``load`` is what is booked and not finished, but never less than what the last report said, plus and
    minus what was booked and finished since. The report adds what this scheduler did not book (before a
    restart of its own) and contexts that grew while decoding. The ``order`` pairs, kept beside it because
    policies compare them for every instance, rank places: tokens ahead, then requests. ``slot`` is its row
    in the fleet, ``line`` the forecast of its prefills, ``correction`` what that leaves out, ``swap`` the
    seconds per token to bring KV up to the device.
    """

    instance: InstanceId
    incarnation: int
    role: Role
    block_tokens: int
    capacity: int
    slot: int
    step_tokens: int
    target_tpot: float
    prices: StepPrices = _PRIOR
    swap: float = 0.0
    line: PrefillLine = field(default_factory=PrefillLine)
    correction: Correction = field(default_factory=Correction)
    admission: Admission = Admission.OPEN
    foreign: Foreign = _NO_FOREIGN
    report: LoadReport = _NO_REPORT
    booked: Work = _NO_WORK
    load: Work = _NO_WORK
    prefill_order: tuple[int, int] = (0, 0)
    decode_order: tuple[int, int] = (0, 0)

    def book(self, work: Work) -> None:
        self.booked = self.booked.plus(work)
        self._set_load(self.load.plus(work))

    def unbook(self, work: Work) -> None:
        self.booked = self.booked.minus(work)
        self._set_load(self.load.minus(work))

    def step_ahead(self, line: float) -> float:
        """Seconds of the steps that a request comes into the middle of, with ``line`` seconds to prefill."""
        prices, load = self.prices, self.load
        decoding = prices.decode_step(load.streams, load.context_tokens) if load.streams else 0.0
        part = self.step_tokens * prices.token
        if load.streams and self.target_tpot > 0:
            part = min(part, max(FLOOR_TOKENS * prices.token, self.target_tpot - decoding))
        return decoding + min(part, line)

    @property
    def free_at(self) -> float:
        """When all that is to be prefilled here will be."""
        return max(self.line.free_at, self.foreign.at) + self.foreign.seconds

    def take_report(self, report: LoadReport, now: float) -> None:
        """Replace the last load report."""
        self.report = report
        self.foreign = self._foreign_of(report, now)
        if report.prices is not None:
            self.prices = report.prices
        self.swap = report.swap
        if report.blocks:
            self.capacity = report.blocks * self.block_tokens
        context = (report.active_blocks + report.incoming_blocks) * self.block_tokens
        reported = Work(report.tokens_to_prefill, context, report.waiting + report.running, 0)
        self._set_load(self.booked.at_least(reported))

    def _foreign_of(self, report: LoadReport, now: float) -> Foreign:
        requests = report.waiting + report.running
        if requests <= self.booked.requests:
            return Foreign(now)
        share = 1 - self.booked.requests / requests
        prices = report.prices or self.prices
        return Foreign(now, share * report.tokens_to_prefill * prices.token, share * report.running)

    def _set_load(self, load: Work) -> None:
        self.load = load
        self.prefill_order = (load.prefill_tokens, load.requests)
        self.decode_order = (load.context_tokens, load.requests)


@dataclass(frozen=True, slots=True)
class Places:
    """The instances that may take one leg of a request now, ordered by id.

    In the same order their ``slots`` in the fleet, whether their role ``decodes``, nothing else, or not
    (``hands_over``). ``mask`` has the bits of the slots.
    """

    leg: Leg
    instances: tuple[InstanceState, ...]
    by_id: dict[InstanceId, InstanceState]
    slots: Slots
    decodes: Flags
    only_decodes: Flags
    hands_over: Flags
    mask: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one leg of a request adds to the load of its place; ``seconds`` of prefill."""

    instance: InstanceId
    work: Work
    seconds: float = 0.0


class SchedulerState:
    """Instances, load and the global prompt trees. ``turn`` counts the bookings ever made."""

    def __init__(self, block_tokens: int = 16, trees: TreeOptions | None = None) -> None:
        self.block_tokens = block_tokens
        self.turn = 0
        self._instances: dict[InstanceId, InstanceState] = {}
        self._feeds: dict[InstanceId, Feed] = {}
        self.tree = PromptTrees(block_tokens, trees or TreeOptions())
        """Who holds what; change it through this object's methods only."""
        self.accuracy = TreeAccuracy()
        """How true that was."""
        self.fleet = Fleet()
        """The instances as columns; read only."""
        self.predictions = Predictions()
        self.wire = Wire()
        """How KV travels between instances."""
        self._bookings: dict[RequestId, list[tuple[InstanceState, Work]]] = {}
        self._places = {leg: self._find_places(leg) for leg in Leg}

    # --- reading ---

    def instances(self) -> tuple[InstanceState, ...]:
        """All known instances, ordered by id."""
        return tuple(state for _, state in sorted(self._instances.items()))

    def knows(self, place: InstanceState) -> bool:
        """Whether it lives, in the same incarnation."""
        return self._instances.get(place.instance) is place

    def places(self, leg: Leg) -> Places:
        """Who may take this leg. Empty when nobody can.

        Decode goes to decode-only instances, to colocated ones when there is none. Instances that are
        open for requests go before those of last resort.
        """
        return self._places[leg]

    def match(self, namespace: Namespace, tokens: Tokens) -> Holdings:
        """What instances hold of ``tokens`` (contiguous int32[n]), and what they will."""
        return self.tree.match(namespace, tokens)

    # --- membership ---

    def add_instance(self, member: Member, ready: Ready) -> None:
        """Take a new incarnation in, empty; an earlier one is forgotten first.

        Raises ``LayoutMismatch`` if its pool has blocks of another size.
        """
        if ready.block_tokens != self.block_tokens:
            raise LayoutMismatch(
                f"{member.instance} has blocks of {ready.block_tokens} tokens, the cluster of "
                f"{self.block_tokens}; start it with pool.block_tokens = {self.block_tokens}"
            )
        self.drop_instance(member.instance)
        capacity = ready.blocks * ready.block_tokens
        state = InstanceState(
            member.instance,
            member.incarnation,
            member.role,
            ready.block_tokens,
            capacity,
            self.tree.enlist(member.instance),
            ready.step_tokens,
            ready.target_tpot,
        )
        self._instances[member.instance] = state
        self.wire = replace(self.wire, bytes_per_token=ready.block_bytes / ready.block_tokens)
        self.fleet.reserve(state.slot)
        self._update_fleet(state)
        self._feeds[member.instance] = Feed(member.instance, self.tree)
        self._refresh_places()

    def drop_instance(self, instance: InstanceId) -> None:
        """Forget an instance and all it held. Its requests stay booked elsewhere until unbooked."""
        state = self._instances.pop(instance, None)
        if state is None:
            return
        del self._feeds[instance]
        self.tree.drop_instance(instance)
        self.fleet.clear(state.slot)
        self._refresh_places()

    def set_admission(self, instance: InstanceId, admission: Admission) -> None:
        """Open or close an instance for new requests; unknown names are ignored."""
        state = self._instances.get(instance)
        if state is not None:
            state.admission = admission
            self._refresh_places()

    def set_role(self, instance: InstanceId, role: Role) -> None:
        """The instance does other work from now on and holds what it held; unknown names are ignored.

        How far its events have been applied, what is booked on it and its admission stay as they are.
        """
        state = self._instances.get(instance)
        if state is not None and state.role is not role:
            state.role = role
            self._refresh_places()

    def apply_load(self, heartbeat: Heartbeat, now: float = 0.0) -> None:
        """Take a load report in; one of another incarnation is ignored."""
        state = self._instances.get(heartbeat.instance)
        if state is not None and state.incarnation == heartbeat.incarnation:
            state.take_report(heartbeat.load, now)
            self._update_fleet(state)

    # --- what pools hold ---

    def promise(
        self, request: RequestId, instance: InstanceId, namespace: Namespace, tokens: Tokens, now: float
    ) -> None:
        """A booked request is sent to ``instance``, whose pool will hold its prompt: until it is unbooked."""
        if instance in self._instances:
            self.tree.promise(request, instance, namespace, tokens, now)

    def learn_answer(
        self, places: Iterable[InstanceId], namespace: Namespace, tokens: Tokens, now: float
    ) -> None:
        """``places`` keep ``tokens``, prompt and answer: of interest where pools do not tell."""
        for instance in places:
            if instance in self._instances:
                self.tree.used(instance, namespace, tokens, now)

    def apply_events(self, batch: PoolEvents) -> EventOutcome:
        """Apply a batch of pool events, which number from 0 in each incarnation: see ``Feed.apply``.

        Where trees do not go by events, nothing ever is.
        """
        state = self._instances.get(batch.instance)
        if state is None or state.incarnation != batch.incarnation:
            return EventOutcome.STALE_INCARNATION
        return self._feeds[batch.instance].apply(batch)

    def apply_snapshot(self, snapshot: Snapshot) -> EventOutcome:
        """Replace all that is known of the instance's pool: see ``Feed.replace``."""
        state = self._instances.get(snapshot.instance)
        if state is None or state.incarnation != snapshot.incarnation:
            return EventOutcome.STALE_INCARNATION
        return self._feeds[snapshot.instance].replace(snapshot)

    # --- foresight ---

    def learn_first_token(
        self, instance: InstanceId, forecast: Forecast, predicted: float, actual: float
    ) -> None:
        """A first token that was ``predicted`` from ``forecast`` came after ``actual`` seconds."""
        self.predictions.learn(predicted, actual)
        state = self._instances.get(instance)
        if state is not None and actual > 0:
            state.correction.learn(forecast, actual)

    # --- bookings ---

    def book(self, request: RequestId, prefill: Share, decode: Share, now: float = 0.0) -> None:
        """Add a request's work to its places until it is unbooked; booking again replaces."""
        self.unbook(request, now)
        self.turn += 1
        booked = [(self._instances[share.instance], share.work) for share in (prefill, decode)]
        booked[0][0].line.join(request, now, prefill.seconds)
        for state, work in booked:
            state.book(work)
            self._update_fleet(state)
        self._bookings[request] = booked

    def finish_prefill(self, request: RequestId, now: float = 0.0) -> None:
        """The first token is out: the prefill share is done. Repeats and unknown requests are ignored."""
        booked = self._bookings.get(request, [])
        if len(booked) < 2:
            return
        self.tree.prefilled(request, now)
        self._unbook(request, *booked.pop(0), now)
        state, work = booked[0]
        booked[0] = (state, work.plus(_STREAM))
        state.book(_STREAM)
        self._update_fleet(state)

    def unbook(self, request: RequestId, now: float = 0.0) -> None:
        """The request ended, however. Unknown requests are ignored."""
        self.tree.ended(request)
        for state, work in self._bookings.pop(request, []):
            self._unbook(request, state, work, now)

    def is_booked(self, instance: InstanceId) -> bool:
        """Whether work is booked on an instance; unknown ones have none."""
        state = self._instances.get(instance)
        return state is not None and any(state.booked)

    def check(self) -> None:
        """Raise ``AssertionError`` if trees or bookings contradict the instances. Costs a full pass."""
        booked = {state.instance: _NO_WORK for state in self._instances.values()}
        for state, work in (pair for booking in self._bookings.values() for pair in booking):
            if self._instances.get(state.instance) is state:
                booked[state.instance] = booked[state.instance].plus(work)
        for name, state in self._instances.items():
            assert state.booked == booked[name], f"{name}: {state.booked} should be {booked[name]}"
        self.tree.check()

    # --- inside ---

    def _unbook(self, request: RequestId, state: InstanceState, work: Work, now: float) -> None:
        state.line.leave(request, now)
        state.unbook(work)
        self._update_fleet(state)

    def _update_fleet(self, state: InstanceState) -> None:
        if self._instances.get(state.instance) is not state:
            return
        fleet, slot, load, prices = self.fleet, state.slot, state.load, state.prices
        fleet.set_prices(slot, prices, state.step_tokens)
        columns = fleet.columns
        streams = load.streams + state.foreign.streams
        columns.free_at[slot] = state.free_at
        columns.streams[slot] = streams
        columns.context[slot] = load.context_tokens
        columns.room[slot] = state.capacity - load.context_tokens
        columns.swap[slot] = state.swap
        columns.stretch[slot] = stretch_of(
            prices, state.step_tokens, state.target_tpot, streams, load.context_tokens
        )

    def _refresh_places(self) -> None:
        self._places = {leg: self._find_places(leg) for leg in Leg}

    def _find_places(self, leg: Leg) -> Places:
        instances = self.instances()
        for admission in (Admission.OPEN, Admission.LAST_RESORT):
            for roles in _ROLES[leg]:
                found = tuple(i for i in instances if i.admission is admission and i.role in roles)
                if found:
                    return _places(leg, found)
        return _places(leg, ())


def _places(leg: Leg, instances: tuple[InstanceState, ...]) -> Places:
    slots = np.array([state.slot for state in instances], np.intp)
    decodes = np.array([state.role.decodes for state in instances], np.bool_)
    only = np.array([not state.role.prefills for state in instances], np.bool_)
    by_id = {state.instance: state for state in instances}
    mask = sum(1 << state.slot for state in instances)
    return Places(leg, instances, by_id, slots, decodes, only, ~decodes, mask)


_ROLES: dict[Leg, tuple[tuple[Role, ...], ...]] = {
    Leg.PREFILL: ((Role.PREFILL, Role.COLOCATED),),
    Leg.DECODE: ((Role.DECODE,), (Role.COLOCATED,)),
    Leg.START: ((Role.PREFILL, Role.COLOCATED, Role.DECODE),),
}
