"""What the global scheduler knows: instances, their load, who holds which prefix. Decides nothing.

Changes only through its methods, one per kind of news, so that a log of calls rebuilds the same state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from memserve.core.errors import LayoutMismatch
from memserve.core.messages import Heartbeat, Member, PoolEvents, Ready, Snapshot
from memserve.core.types import InstanceId, Namespace, RequestId, Role, Tokens
from memserve.scheduler.accuracy import TreeAccuracy
from memserve.scheduler.costs import Wire
from memserve.scheduler.feeds import EventOutcome, Feed
from memserve.scheduler.fleet import Fleet, stretch_of
from memserve.scheduler.holdings import Holdings
from memserve.scheduler.places import Admission, InstanceState, Leg, Places, Work, places_of
from memserve.scheduler.predictions import Forecast, Predictions
from memserve.scheduler.prompt_trees import PromptTrees, TreeOptions

_NO_WORK = Work()
_STREAM = Work(streams=1)


class Share(NamedTuple):
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
        self._places: dict[Leg, Places] = {}

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
        found = self._places.get(leg)
        if found is None:
            found = self._places[leg] = self._find_places(leg)
        return found

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
        self.fleet.set_prices(state.slot, state.prices, state.step_tokens)
        self._update_fleet(state)
        self._feeds[member.instance] = Feed(member.instance, self.tree)
        self._places.clear()

    def drop_instance(self, instance: InstanceId) -> None:
        """Forget an instance and all it held. Its requests stay booked elsewhere until unbooked."""
        state = self._instances.pop(instance, None)
        if state is None:
            return
        del self._feeds[instance]
        self.tree.drop_instance(instance)
        self.fleet.clear(state.slot)
        self._places.clear()

    def set_admission(self, instance: InstanceId, admission: Admission) -> None:
        """Open or close an instance for new requests; unknown names are ignored."""
        state = self._instances.get(instance)
        if state is not None:
            state.admission = admission
            self._places.clear()

    def set_role(self, instance: InstanceId, role: Role) -> None:
        """The instance does other work from now on and holds what it held; unknown names are ignored.

        How far its events have been applied, what is booked on it and its admission stay as they are.
        """
        state = self._instances.get(instance)
        if state is not None and state.role is not role:
            state.role = role
            state.look()
            self._places.clear()

    def apply_load(self, heartbeat: Heartbeat, now: float = 0.0) -> None:
        """Take a load report in; one of another incarnation is ignored."""
        state = self._instances.get(heartbeat.instance)
        if state is None or state.incarnation != heartbeat.incarnation or state.knows(heartbeat.load):
            return
        state.take_report(heartbeat.load, now)
        self.fleet.set_prices(state.slot, state.prices, state.step_tokens, state.swap)
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
        self._bookings[request] = booked
        self._update_fleet(booked[0][0])
        if booked[1][0] is not booked[0][0]:
            self._update_fleet(booked[1][0])

    def finish_prefill(self, request: RequestId, now: float = 0.0) -> None:
        """The first token is out: the prefill share is done. Repeats and unknown requests are ignored."""
        booked = self._bookings.get(request, [])
        if len(booked) < 2:
            return
        self.tree.prefilled(request, now)
        (first, done), (state, work) = booked
        first.line.leave(request, now)
        first.unbook(done)
        state.book(_STREAM)
        booked[:] = [(state, work.plus(_STREAM))]
        self._update_fleet(state)
        if first is not state:
            self._update_fleet(first)

    def unbook(self, request: RequestId, now: float = 0.0) -> None:
        """The request ended, however. Unknown requests are ignored."""
        self.tree.ended(request)
        for state, work in self._bookings.pop(request, []):
            state.line.leave(request, now)
            state.unbook(work)
            self._update_fleet(state)

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

    def _update_fleet(self, state: InstanceState) -> None:
        state.look()
        if self._instances.get(state.instance) is not state:
            return
        columns, slot, load = self.fleet.columns, state.slot, state.load
        streams, context = load.streams + state.foreign.streams, load.context_tokens
        columns.free_at[slot] = state.view.free_at
        columns.line[slot] = state.line.count_delayed(state.step_tokens * state.prices.token)
        columns.streams[slot] = streams
        columns.context[slot] = context
        columns.room[slot] = state.capacity - context
        columns.stretch[slot] = stretch_of(
            state.prices, state.step_tokens, state.target_tpot, streams, context
        )

    def _find_places(self, leg: Leg) -> Places:
        instances = self.instances()
        for admission in (Admission.OPEN, Admission.LAST_RESORT):
            for roles in _ROLES[leg]:
                found = tuple(i for i in instances if i.admission is admission and i.role in roles)
                if found:
                    return places_of(leg, found)
        return places_of(leg, ())


_ROLES: dict[Leg, tuple[tuple[Role, ...], ...]] = {
    Leg.PREFILL: ((Role.PREFILL, Role.COLOCATED),),
    Leg.DECODE: ((Role.DECODE,), (Role.COLOCATED,)),
    Leg.START: ((Role.PREFILL, Role.COLOCATED, Role.DECODE),),
}
