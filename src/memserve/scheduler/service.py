"""The global scheduler as the server uses it: hands news to the state, decides, books, remembers.

Synchronous calls from one thread; sends nothing itself.
"""

from __future__ import annotations

from memserve.core.clock import Clock
from memserve.core.messages import Heartbeat, Member, PoolEvents, Ready, Snapshot
from memserve.core.types import InstanceId, Namespace, RequestId, Tokens
from memserve.scheduler.costs import Wire
from memserve.scheduler.decision import Decision, RouteRequest, decide, decide_recorded
from memserve.scheduler.feeds import EventOutcome
from memserve.scheduler.hindsight import RegretSum
from memserve.scheduler.history import Explanation, History
from memserve.scheduler.places import Admission
from memserve.scheduler.policies import Policy
from memserve.scheduler.prompt_trees import TreeOptions
from memserve.scheduler.state import SchedulerState

_ANSWER_TOKENS = 128.0
_ANSWER_RATE = 0.02
"""Length of answers to begin with, and the weight of a new one in their mean."""
EASING_BEATS = 8
"""So many heartbeats long an instance that has come back takes only what no other can take."""


class GlobalScheduler:
    """Places requests on instances. ``history`` is the number of decisions remembered.

    ``explains``: with the places that each was chosen from, so that it can be judged afterwards.
    """

    def __init__(
        self,
        policy: Policy,
        clock: Clock,
        *,
        history: int = 1024,
        block_tokens: int = 16,
        explains: bool = True,
        trees: TreeOptions | None = None,
    ) -> None:
        self.state = SchedulerState(block_tokens, trees)
        self._policy = policy
        self._clock = clock
        self._explains = explains
        self._history = History(self.state, history)
        self._answer = _ANSWER_TOKENS
        self._easing: dict[InstanceId, int] = {}
        self._seen: set[InstanceId] = set()

    # --- requests ---

    def route(self, request: RouteRequest) -> Decision:
        """Decide, book the load and remember why. Raises ``NoInstance``."""
        now, record = self._clock.now(), None
        self.state.tree.advance(now)
        if self._explains:
            decision, record = decide_recorded(request, self.state, self._policy, now, self._answer)
        else:
            decision = decide(request, self.state, self._policy, now, self._answer)
        self._history.add(request, decision, record)
        self.state.book(decision.request, decision.prefill_share(), decision.decode_share(), now)
        self.state.promise(decision.request, decision.prefill, request.namespace, request.tokens, now)
        return decision

    def foresee(self, request: RouteRequest) -> Decision:
        """What :meth:`route` would decide now; books nothing. Raises ``NoInstance``."""
        return decide(request, self.state, self._policy, self._clock.now(), self._answer)

    def tokens_of(self, prompt: Tokens, max_tokens: int) -> int:
        """What a request takes of a tenant's part: its prompt, and an answer as they are on average."""
        return len(prompt) + max(1, round(min(self._answer, max_tokens)))

    def first_token(self, request: RequestId, cached: int | None = None) -> None:
        """The request's prefill is done: its load at the prefill place ends.

        ``cached`` tokens of its prompt need not have been computed, by the ledger.
        """
        now = self._clock.now()
        decision = self._history.settle(request, cached, now)
        if decision is not None:
            self.state.learn_first_token(
                decision.prefill, decision.forecast, decision.predicted_ttft, now - decision.decided_at
            )
            if cached is not None:
                self.state.accuracy.learn(
                    decision.prompt_tokens, decision.believed, decision.promised_prefill, cached
                )
        self.state.finish_prefill(request, now)

    def answered(self, tokens: int) -> None:
        """An answer had so many tokens: others are expected to be like it."""
        self._answer += _ANSWER_RATE * (tokens - self._answer)

    def finish(self, request: RequestId) -> None:
        """The request ended, however: nothing of it is load any more. May be repeated."""
        self._history.end(request)
        self.state.unbook(request, self._clock.now())

    @property
    def learns_answers(self) -> bool:
        """Whether :meth:`learn_answer` has any use."""
        return not self.state.tree.by_events

    def learn_answer(self, request: RequestId, namespace: Namespace, tokens: Tokens) -> None:
        """``tokens``: what was computed for a request that has ended, all but the answer's last token."""
        decision = self._history.decision(request)
        if decision is None:
            return
        options = self.state.tree.options
        places = []
        if options.answers_kept:
            places.append(decision.decode or decision.prefill)
        if options.answers_return and decision.decode is not None:
            places.append(decision.prefill)
        self.state.learn_answer(places, namespace, tokens, self._clock.now())

    def has_work(self, instance: InstanceId) -> bool:
        """Whether anything that was routed to it is still booked there."""
        return self.state.is_booked(instance)

    def decision(self, request: RequestId) -> Decision | None:
        """Where the request was sent; None when unknown or forgotten."""
        return self._history.decision(request)

    def explain(self, request: RequestId) -> Explanation | None:
        """Why the request runs where it runs, and whether that was right; None when unknown or forgotten."""
        return self._history.explain(request)

    def remembered(self) -> tuple[RequestId, ...]:
        """Whose decisions can be explained, oldest first."""
        return self._history.names()

    def regrets(self) -> dict[str, RegretSum]:
        """What better decisions would have saved, by policy, since the start."""
        return self._history.regrets.by_policy

    # --- membership ---

    def member_ready(self, member: Member, ready: Ready) -> None:
        """A new incarnation takes requests; what an earlier one held is forgotten. ``LayoutMismatch``.

        One that comes back, empty, is eased in: memory is touched and weights are read before load comes.
        """
        self.state.add_instance(member, ready)
        if member.instance in self._seen:
            self._easing[member.instance] = EASING_BEATS
            self.state.set_admission(member.instance, Admission.LAST_RESORT)
        self._seen.add(member.instance)

    def member_suspected(self, instance: InstanceId) -> None:
        """Use it only if no other can take a request."""
        self.state.set_admission(instance, Admission.LAST_RESORT)

    def member_recovered(self, instance: InstanceId) -> None:
        """Use it as before."""
        easing = instance in self._easing
        self.state.set_admission(instance, Admission.LAST_RESORT if easing else Admission.OPEN)

    def member_draining(self, instance: InstanceId) -> None:
        """Give it no new request; what it holds stays known."""
        self._easing.pop(instance, None)
        self.state.set_admission(instance, Admission.CLOSED)

    def member_role_changed(self, member: Member) -> None:
        """Route to it by its new role; what it holds stays known."""
        self.state.set_role(member.instance, member.role)

    def member_lost(self, instance: InstanceId) -> None:
        """Forget it and all it held."""
        self._easing.pop(instance, None)
        self.state.drop_instance(instance)

    # --- news from instances ---

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self.state.apply_load(heartbeat, self._clock.now())
        if heartbeat.instance in self._easing:
            self._ease(heartbeat.instance)

    def set_link(self, wire: Wire) -> None:
        """How KV travels between instances, until transfers tell better."""
        self.state.wire = wire

    def on_transfer(self, moved: int, seconds: float) -> None:
        """Bytes that went from an instance to another, and what that took."""
        self.state.wire = self.state.wire.learn(moved, seconds)

    def on_pool_events(self, events: PoolEvents) -> bool:
        """Apply a batch; True when a snapshot is needed first.

        True comes for every batch until the snapshot is applied: ask only if no answer is under way.
        """
        return self.state.apply_events(events) is EventOutcome.NEEDS_SNAPSHOT

    def on_snapshot(self, snapshot: Snapshot) -> bool:
        """Apply a snapshot; True when another one is needed because events were lost meanwhile."""
        return self.state.apply_snapshot(snapshot) is EventOutcome.NEEDS_SNAPSHOT

    def _ease(self, instance: InstanceId) -> None:
        self._easing[instance] -= 1
        if self._easing[instance] == 0:
            del self._easing[instance]
            self.state.set_admission(instance, Admission.OPEN)
