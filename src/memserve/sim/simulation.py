"""Runs requests through the real scheduler and simulated engines on a virtual clock. Deterministic.

What befalls instances goes the way it goes in a server (``server.placement``): whoever was served by a lost
one goes on elsewhere, with what was answered as part of the prompt.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence

from memserve.core.clock import VirtualClock
from memserve.core.errors import ConfigError, NoInstance, OutOfBlocks
from memserve.core.messages import Heartbeat, Member, Ready
from memserve.core.types import InstanceId, RequestId, Role
from memserve.mempool.address import Origin
from memserve.scheduler.accuracy import TreeAccuracy
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.decision_log import RecordingScheduler, Sink
from memserve.scheduler.policies import Policy
from memserve.scheduler.prompt_trees import TreeOptions
from memserve.scheduler.service import GlobalScheduler
from memserve.server.placement import MAX_ATTEMPTS
from memserve.server.roles import missing_legs
from memserve.server.stream import attempt_of
from memserve.sim.engine import LAYOUT, Job, SimEngine, ledger_of
from memserve.sim.journey import SPACE, Journey, Outcome, SimRequest, Source
from memserve.sim.shards import Sharding, Shards
from memserve.sim.site import Change, Loss, RoleChange, Site, check_changes

_HISTORY = 1 << 16
_REPORT_SECONDS = 1.0
_RETRY_SECONDS = 0.1
"""Until a decode place without room is asked again."""


class Simulation:
    """One run. ``on_done`` hears of every request that ended; ``changes`` befall the site's instances.

    ``explains``: whether the scheduler keeps what each decision was chosen from; ``log``: its decision log.
    ``sharding``: schedulers that share the requests.
    Raises ``ConfigError`` where a change makes no sense.
    """

    def __init__(
        self,
        site: Site,
        policy: Policy,
        on_done: Callable[[Outcome], None],
        trees: TreeOptions | None = None,
        changes: Sequence[Change] = (),
        *,
        explains: bool = False,
        log: Sink | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        assert log is None or sharding is None, "a decision log is that of one scheduler"
        check_changes(site, changes)
        self._clock = VirtualClock()
        self._site = site
        self._wire = site.wire
        self._scheduler = Shards(
            lambda: _make_scheduler(policy, self._clock, trees, explains, log), sharding or Sharding()
        )
        self._on_done = on_done
        self._order = itertools.count()
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._due: dict[InstanceId, float] = {}
        self._journeys: dict[RequestId, Journey] = {}
        self._homeless: list[Journey] = []
        self._stopped = False
        self._coming = 0
        self._busy: dict[InstanceId, float] = {}
        self._engines: dict[InstanceId, SimEngine] = {}
        for name, role in site.instances():
            self._add(name, role, 1)
        self._scheduler.set_link(site.wire)
        for change in changes:
            self._plan(change)

    def run(self, source: Source) -> None:
        """Until all that ``source`` gives is answered or given up, or :meth:`stop` is called."""
        self._report(source)
        while not self._stopped:
            at = source.next_at()
            if at is not None and (not self._heap or at <= self._heap[0][0]):
                self._clock.advance(max(at - self._clock.now(), 0.0))
                for request in source.take_due(self._clock.now()):
                    self._arrive(request)
                self._move_on()
            elif self._heap:
                at, _, act = heapq.heappop(self._heap)
                self._clock.advance(max(at - self._clock.now(), 0.0))
                act()
                self._move_on()
            else:
                return

    def stop(self) -> None:
        """Let :meth:`run` end now; what is under way stays unanswered."""
        self._stopped = True

    def close(self) -> None:
        """Give the pools' memory back."""
        for engine in self._engines.values():
            engine.pool.close()

    def check(self) -> None:
        """Raise ``AssertionError`` if anything is still in use after a whole run. Costs a full pass."""
        self._scheduler.check()
        for engine in self._engines.values():
            engine.pool.check([])
            assert engine.idle, f"{engine.instance} has work left"

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self._clock.now()

    @property
    def accuracy(self) -> TreeAccuracy:
        """How true the scheduler's prompt trees were."""
        return self._scheduler.accuracy

    @property
    def busy(self) -> dict[InstanceId, float]:
        """Seconds in which each instance had work."""
        return {
            name: self._busy[name] + (engine.busy if (engine := self._engines.get(name)) else 0.0)
            for name in self._busy
        }

    # --- requests ---

    def _arrive(self, request: SimRequest) -> None:
        outcome = Outcome(next(self._numbers), self._clock.now(), len(request.prompt), len(request.answer))
        journey = Journey(request, outcome)
        tokens = len(request.prompt) + len(request.answer)
        if LAYOUT.blocks_for(tokens) > self._site.blocks:
            self._end(journey, f"{tokens} tokens do not fit into an instance")
            return
        if self._scheduler.join(journey, coming=self._coming > 0):
            self._start(journey, 0)

    def _move_on(self) -> None:
        """Let those begin whose turn it is."""
        for journey, behind in self._scheduler.take(coming=self._coming > 0):
            self._start(journey, behind)

    def _start(self, journey: Journey, behind: int) -> None:
        try:
            self._begin(journey, behind)
        except NoInstance as error:
            self._end(journey, str(error))

    def _begin(self, journey: Journey, behind: int = 0) -> None:
        """Make an attempt, with so many waiting behind it. Raises ``NoInstance``."""
        request, outcome = journey.request, journey.outcome
        name = attempt_of(RequestId(f"r{outcome.number}"), len(outcome.decisions) + 1)
        prompt, answer = journey.prompt, journey.answer
        asked = RouteRequest(name, SPACE, prompt, request.session, len(answer), behind)
        decision = self._scheduler.route(asked)
        outcome.decisions += (decision,)
        journey.fruitless += 1
        engine = self._engines[decision.prefill]
        job = Job(name, SPACE, prompt, answer, decision.decode)
        journey.job, journey.engine = job, engine
        self._journeys[name] = journey
        self._advance(engine)
        if decision.fetch_from is not None:
            self._fetch(engine, job, decision)
        engine.submit(job)
        self._settle(engine)

    def _fetch(self, engine: SimEngine, job: Job, decision: Decision) -> None:
        """The holder sends what it has of the prefix; the job waits for that."""
        assert decision.fetch_from is not None
        tokens = job.prompt[: decision.fetch_tokens]
        holder = self._engines[decision.fetch_from]
        have = holder.held(SPACE, tokens)
        missing = have - engine.held(SPACE, tokens)
        if missing <= 0:
            return
        job.waits = True

        def deliver() -> None:
            if not self._lives(engine):
                return
            self._advance(engine)
            if self._lives(holder):
                engine.receive(SPACE, tokens[:have], Origin.PEER)
            job.waits = False
            engine.look_again()
            self._settle(engine)

        self._after(self._wire.seconds(missing), deliver)

    def _prefilled(self, engine: SimEngine, job: Job) -> None:
        outcome, ledger = self._journeys[job.request].outcome, ledger_of(job)
        if not outcome.first_token:
            outcome.first_token, outcome.ledger = self._clock.now(), ledger
        self._scheduler.first_token(job.request, ledger.cached)
        if job.decode_on is not None:
            target = self._engines[job.decode_on]
            self._after(self._tail(job, target), lambda: self._hand_over(engine, target, job))

    def _tail(self, job: Job, target: SimEngine) -> float:
        """Seconds of a hand-over that are left when the prefill ends: it went on beside it."""
        missing = len(job.prompt) - target.held(SPACE, job.prompt)
        return max(self._wire.seconds(missing) - (self._clock.now() - job.began), self._wire.latency)

    def _hand_over(self, engine: SimEngine, target: SimEngine, job: Job) -> None:
        journey = self._journeys.get(job.request)
        if journey is None:
            return
        self._advance(target)
        held = job.addrs
        try:
            target.adopt(job)
        except OutOfBlocks:
            self._after(_RETRY_SECONDS, lambda: self._hand_over(engine, target, job))
            return
        assert held is not None
        journey.engine = target
        self._settle(target)
        engine.pool.free_mem(held)
        if not engine.starved:
            return
        self._advance(engine)
        engine.look_again()
        self._settle(engine)

    def _answered(self, job: Job) -> None:
        journey = self._journeys.pop(job.request)
        self._scheduler.answered(len(job.answer))
        self._scheduler.learn_answer(job.request, SPACE, job.whole)
        self._scheduler.finish(job.request)
        if job.decode_on is not None:
            self._send_back(self._engines.get(journey.outcome.decisions[-1].prefill), job)
        self._end(journey)

    def _send_back(self, source: SimEngine | None, job: Job) -> None:
        """The answer's KV goes to where the prompt was prefilled, if that still lives then."""

        def deliver() -> None:
            if source is None or not self._lives(source):
                return
            source.receive(SPACE, job.whole, Origin.BACKFLOW)
            self._tell(source)

        self._after(self._wire.seconds(len(job.answer)), deliver)

    def _end(self, journey: Journey, error: str = "") -> None:
        journey.outcome.ended = self._clock.now()
        journey.outcome.error = error
        self._on_done(journey.outcome)

    # --- what befalls instances ---

    def _plan(self, change: Change) -> None:
        if isinstance(change, RoleChange):
            self._after(change.at, lambda: self._change_role(change))
        else:
            self._after(change.at, lambda: self._lose(change))

    def _change_role(self, change: RoleChange) -> None:
        engine = self._engines.get(change.instance)
        if engine is None:
            return
        roles = [x.role for x in self._engines.values() if x is not engine]
        if missing := missing_legs([*roles, change.role]):
            raise ConfigError(
                f"with {change.instance} as {change.role} nobody would be left to {missing[0]} at "
                f"{change.at:g} s; give another instance that role first"
            )
        engine.role = change.role
        member = Member(engine.instance, engine.incarnation, engine.role, "")
        self._scheduler.member_role_changed(member)

    def _lose(self, change: Loss) -> None:
        """All who need the instance leave it first; then each begins anew, in order of arrival."""
        engine = self._engines.get(change.instance)
        if engine is None:
            return
        for other in self._engines.values():
            self._advance(other)
            self._settle(other)
        moved = [journey for journey in self._journeys.values() if journey.needs(change.instance)]
        for journey in moved:
            self._leave(journey)
        del self._engines[change.instance]
        self._busy[change.instance] += engine.busy
        self._scheduler.member_lost(change.instance)
        engine.pool.close()
        if change.back is not None:
            self._coming += 1
            self._after(change.back, lambda: self._bring_back(engine))
        for journey in sorted(moved, key=lambda one: one.outcome.number):
            self._move(journey, f"{change.instance} was lost")

    def _leave(self, journey: Journey) -> None:
        """End the present attempt everywhere, and keep what it has answered."""
        job, engine = journey.job, journey.engine
        assert job is not None and engine is not None
        said = engine.said(job)
        if said:
            journey.answered += said
            journey.fruitless = 0
        engine.cancel(job)
        self._settle(engine)
        journey.job = journey.engine = None
        del self._journeys[job.request]
        self._scheduler.finish(job.request)

    def _move(self, journey: Journey, why: str) -> None:
        if journey.fruitless >= MAX_ATTEMPTS:
            self._end(journey, f"{why}; that was attempt {MAX_ATTEMPTS} without a token")
            return
        try:
            self._begin(journey)
        except NoInstance as error:
            if self._coming:
                self._homeless.append(journey)
            else:
                self._end(journey, f"{why}; {error}")

    def _bring_back(self, lost: SimEngine) -> None:
        """Its next incarnation starts, empty, in the role that it had."""
        self._coming -= 1
        self._add(lost.instance, lost.role, lost.incarnation + 1)
        waiting, self._homeless = self._homeless, []
        for journey in waiting:
            self._move(journey, "nobody was left")

    # --- engines ---

    def _add(self, instance: InstanceId, role: Role, incarnation: int) -> None:
        site = self._site
        speed = site.speed_of(role)
        engine = SimEngine(instance, role, speed, site.blocks, self._clock, incarnation=incarnation)
        self._engines[instance] = engine
        self._busy.setdefault(instance, 0.0)
        self._introduce(engine)
        self._settle(engine)

    def _lives(self, engine: SimEngine) -> bool:
        return self._engines.get(engine.instance) is engine

    def _advance(self, engine: SimEngine) -> None:
        """Bring an engine to now; tell of what happened on the way."""
        prefilled, ended = engine.advance(self._clock.now())
        for job in prefilled:
            self._prefilled(engine, job)
        for job in ended:
            self._answered(job)

    def _settle(self, engine: SimEngine) -> None:
        """After a change: tell what the pool holds, and wake the engine when something ends in it."""
        due = engine.next_event()
        self._tell(engine)
        self._due[engine.instance] = due
        if due != float("inf"):
            self._at(due, lambda: self._wake(engine, due))

    def _tell(self, engine: SimEngine) -> None:
        events = engine.take_events()
        if events is not None:
            self._scheduler.on_pool_events(events)

    def _wake(self, engine: SimEngine, due: float) -> None:
        if self._lives(engine) and self._due[engine.instance] == due:
            self._advance(engine)
            self._settle(engine)

    def _introduce(self, engine: SimEngine) -> None:
        member = Member(engine.instance, engine.incarnation, engine.role, "")
        self._scheduler.member_ready(
            member,
            Ready(
                engine.instance,
                "",
                SPACE.model,
                1 << 20,
                LAYOUT.block_tokens,
                engine.pool.blocks,
                int(self._wire.bytes_per_token * LAYOUT.block_tokens),
                LAYOUT.fingerprint,
                "simulated",
                engine.speed.step_tokens,
                engine.speed.target_tpot,
            ),
        )

    def _report(self, source: Source) -> None:
        now = self._clock.now()
        for engine in self._engines.values():
            load = engine.read_load(now)
            self._scheduler.on_heartbeat(Heartbeat(engine.instance, engine.incarnation, load))
        if source.next_at() is not None or self._journeys or self._homeless or self._scheduler.waiting:
            self._after(_REPORT_SECONDS, lambda: self._report(source))

    # --- time ---

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._at(self._clock.now() + seconds, act)

    def _at(self, at: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (at, next(self._order), act))


def _make_scheduler(
    policy: Policy, clock: VirtualClock, trees: TreeOptions | None, explains: bool, log: Sink | None
) -> GlobalScheduler:
    if log is None:
        return GlobalScheduler(policy, clock, history=_HISTORY, explains=explains, trees=trees)
    return RecordingScheduler(policy, clock, log, history=_HISTORY, explains=explains, trees=trees)
