"""Runs requests through the real scheduler and simulated engines on a virtual clock. Deterministic."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import msgspec

from memserve.core.clock import VirtualClock
from memserve.core.errors import OutOfBlocks
from memserve.core.messages import Heartbeat, Member, Ready
from memserve.core.types import InstanceId, Namespace, RequestId, Role, Tokens
from memserve.mempool.address import Origin
from memserve.scheduler.accuracy import TreeAccuracy
from memserve.scheduler.costs import Wire
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.policies import Policy
from memserve.scheduler.prompt_trees import TreeOptions
from memserve.scheduler.service import GlobalScheduler
from memserve.sim.engine import LAYOUT, Job, SimEngine, Speed

SPACE = Namespace("simulated")
_REPORT_SECONDS = 1.0
_RETRY_SECONDS = 0.1
"""Until a decode place without room is asked again."""


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request that comes at ``at`` s; ``prompt``: int32[n], ``answer``: int32[m], m at least 1."""

    at: float
    prompt: Tokens
    answer: Tokens
    session: str | None = None


class Outcome(msgspec.Struct):
    """What became of a request; times in seconds since the start."""

    at: float
    prompt_tokens: int
    answer_tokens: int
    decision: Decision
    cached_tokens: int = 0
    first_token: float = 0.0
    ended: float = 0.0

    @property
    def ttft(self) -> float:
        return self.first_token - self.at

    @property
    def jct(self) -> float:
        return self.ended - self.at


@dataclass(frozen=True, slots=True)
class Site:
    """A cluster to simulate: instances by role, all alike; ``blocks`` of KV each."""

    prefill: int
    decode: int
    colocated: int
    speed: Speed
    blocks: int
    wire: Wire

    def instances(self) -> Iterator[tuple[InstanceId, Role]]:
        """Names and roles."""
        for role, count in (
            (Role.PREFILL, self.prefill),
            (Role.DECODE, self.decode),
            (Role.COLOCATED, self.colocated),
        ):
            for number in range(count):
                yield InstanceId(f"{role}-{number}"), role


class Simulation:
    """One run. ``on_done`` hears of every request that ended."""

    def __init__(
        self,
        site: Site,
        policy: Policy,
        on_done: Callable[[Outcome], None],
        trees: TreeOptions | None = None,
    ) -> None:
        self._clock = VirtualClock()
        self._wire = site.wire
        self._scheduler = GlobalScheduler(policy, self._clock, history=1 << 16, trees=trees)
        self._on_done = on_done
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._due: dict[InstanceId, float] = {}
        self._outcomes: dict[RequestId, Outcome] = {}
        self._open = 0
        self._more = True
        self._engines = {
            name: SimEngine(name, role, site.speed, site.blocks, self._clock)
            for name, role in site.instances()
        }
        for engine in self._engines.values():
            self._introduce(engine)
        state = self._scheduler.state
        state.wire = replace(site.wire, bytes_per_token=site.wire.bytes_per_token)
        self._report()

    def run(self, requests: Iterable[SimRequest]) -> None:
        """Until all are answered. ``requests`` in order of time."""
        coming = iter(requests)
        self._take_next(coming)
        while self._heap:
            at, _, act = heapq.heappop(self._heap)
            self._clock.advance(max(at - self._clock.now(), 0.0))
            act()

    def close(self) -> None:
        """Give the pools' memory back."""
        for engine in self._engines.values():
            engine.pool.check([])
            engine.pool.close()

    @property
    def accuracy(self) -> TreeAccuracy:
        """How true the scheduler's prompt trees were."""
        return self._scheduler.state.accuracy

    @property
    def busy(self) -> dict[InstanceId, float]:
        """Seconds in which each instance had work."""
        return {name: engine.busy for name, engine in self._engines.items()}

    # --- requests ---

    def _take_next(self, coming: Iterator[SimRequest]) -> None:
        request = next(coming, None)
        if request is None:
            self._more = False
            return
        self._at(request.at, lambda: self._arrive(request, coming))

    def _arrive(self, request: SimRequest, coming: Iterator[SimRequest]) -> None:
        now = self._clock.now()
        name = RequestId(f"r{self._scheduler.state.turn}")
        decision = self._scheduler.route(
            RouteRequest(name, SPACE, request.prompt, request.session, len(request.answer))
        )
        self._open += 1
        self._outcomes[name] = Outcome(now, len(request.prompt), len(request.answer), decision)
        job = Job(name, SPACE, request.prompt, request.answer, decision.decode)
        engine = self._engines[decision.prefill]
        self._advance(engine)
        if decision.fetch_from is not None:
            self._fetch(engine, job, decision)
        engine.submit(job)
        self._settle(engine)
        self._take_next(coming)

    def _fetch(self, engine: SimEngine, job: Job, decision: Decision) -> None:
        """The holder sends what it has of the prefix; the job waits for that."""
        assert decision.fetch_from is not None
        tokens = job.prompt[: decision.fetch_tokens]
        have = self._engines[decision.fetch_from].held(SPACE, tokens)
        missing = have - engine.held(SPACE, tokens)
        if missing <= 0:
            return
        job.waits = True

        def deliver() -> None:
            self._advance(engine)
            engine.receive(SPACE, tokens[:have], Origin.PEER)
            job.waits = False
            self._advance(engine)
            self._settle(engine)

        self._at(self._clock.now() + self._wire.seconds(missing), deliver)

    def _prefilled(self, engine: SimEngine, job: Job) -> None:
        outcome = self._outcomes[job.request]
        outcome.first_token = self._clock.now()
        outcome.cached_tokens = min(job.cached, len(job.prompt) - 1)
        self._scheduler.first_token(job.request, outcome.cached_tokens)
        if job.decode_on is None:
            return
        target = self._engines[job.decode_on]
        missing = len(job.prompt) - target.held(SPACE, job.prompt)
        self._at(
            self._clock.now() + self._wire.seconds(missing), lambda: self._hand_over(engine, target, job)
        )

    def _hand_over(self, engine: SimEngine, target: SimEngine, job: Job) -> None:
        self._advance(target)
        self._advance(engine)
        held = job.addrs
        try:
            target.adopt(job)
        except OutOfBlocks:
            self._at(self._clock.now() + _RETRY_SECONDS, lambda: self._hand_over(engine, target, job))
            return
        assert held is not None
        engine.pool.free_mem(held)
        self._settle(engine)
        self._settle(target)

    def _ended(self, job: Job) -> None:
        outcome = self._outcomes.pop(job.request)
        outcome.ended = self._clock.now()
        self._open -= 1
        self._scheduler.finish(job.request)
        self._scheduler.answered(len(job.answer))
        self._scheduler.learn_answer(job.request, SPACE, job.said)
        if job.decode_on is not None:
            source = self._engines[outcome.decision.prefill]
            said, seconds = job.said, self._wire.seconds(len(job.answer))

            def send_back() -> None:
                self._advance(source)
                source.receive(SPACE, said, Origin.BACKFLOW)
                self._settle(source)

            self._at(self._clock.now() + seconds, send_back)
        self._on_done(outcome)

    # --- engines ---

    def _advance(self, engine: SimEngine) -> None:
        """Bring an engine to now; tell of what happened on the way."""
        prefilled, ended = engine.advance(self._clock.now())
        for job in prefilled:
            self._prefilled(engine, job)
        for job in ended:
            self._ended(job)

    def _settle(self, engine: SimEngine) -> None:
        """After a change: tell what the pool holds, and wake the engine when something ends in it."""
        events = engine.take_events()
        if events is not None:
            self._scheduler.on_pool_events(events)
        due = engine.next_event()
        self._due[engine.instance] = due
        if due != float("inf"):
            self._at(due, lambda: self._wake(engine, due))

    def _wake(self, engine: SimEngine, due: float) -> None:
        if self._due[engine.instance] == due:
            self._advance(engine)
            self._settle(engine)

    def _introduce(self, engine: SimEngine) -> None:
        member = Member(engine.instance, 1, engine.role, "")
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

    def _report(self) -> None:
        for engine in self._engines.values():
            self._advance(engine)
            self._settle(engine)
            self._scheduler.on_heartbeat(Heartbeat(engine.instance, 1, engine.read_load()))
        if self._more or self._open:
            self._at(self._clock.now() + _REPORT_SECONDS, self._report)

    def _at(self, at: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (at, next(self._order), act))
