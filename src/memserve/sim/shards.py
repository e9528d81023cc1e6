"""Several schedulers side by side, each for the prompts that begin alike: the simulator's model of sharding.

A request goes to the shard that its namespace and first tokens name, so that those who share a prefix meet.
What other shards have booked at an instance a shard only knows from heartbeats. Each has a line of its own.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass

from memserve.core.messages import Heartbeat, Member, PoolEvents, Ready
from memserve.core.types import InstanceId, Namespace, RequestId, Role, Tokens
from memserve.scheduler.accuracy import TreeAccuracy
from memserve.scheduler.costs import Wire
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.service import GlobalScheduler
from memserve.sim.front_line import FrontLine
from memserve.sim.journey import SPACE, Journey


@dataclass(frozen=True, slots=True)
class Sharding:
    """How many schedulers, and how many tokens of a prompt name one: more than what all prompts share.

    With ``owned`` each has instances of its own, as many of each role as the others; else all have all.
    """

    shards: int = 1
    key_tokens: int = 16
    owned: bool = False


class Shard:
    """A scheduler, and who waits in front of it."""

    def __init__(self, scheduler: GlobalScheduler) -> None:
        self.scheduler = scheduler
        self.line = FrontLine(scheduler)


class Shards:
    """Several schedulers behind those calls that a simulation makes."""

    def __init__(self, make: Callable[[], GlobalScheduler], sharding: Sharding) -> None:
        self._all = [Shard(make()) for _ in range(sharding.shards)]
        self._sharding = sharding
        self._owners: dict[InstanceId, Sequence[Shard]] = {}
        self._joined: Counter[Role] = Counter()
        self._chosen: dict[RequestId, Shard] = {}
        self.waiting = 0
        """Journeys in all lines."""

    @property
    def accuracy(self) -> TreeAccuracy:
        """How true their trees were, together."""
        sums = [astuple(one.scheduler.state.accuracy) for one in self._all]
        return TreeAccuracy(*map(sum, zip(*sums, strict=True)))

    # --- requests ---

    def join(self, journey: Journey, *, coming: bool) -> bool:
        """Whether a journey may begin at once; else it waits in front of its shard.

        ``coming``: whether a lost instance is on its way.
        """
        line = self._shard(SPACE, journey.prompt).line
        if line.lets_through(journey, coming=coming):
            return True
        line.join(journey)
        self.waiting += 1
        return False

    def take(self, *, coming: bool) -> Iterable[tuple[Journey, int]]:
        """Those whose turn it is, and how many are behind them.

        Each is to be routed before the next is asked for.
        """
        for one in self._all if self.waiting else ():
            while (journey := one.line.take(coming=coming)) is not None:
                self.waiting -= 1
                yield journey, len(one.line)

    def route(self, request: RouteRequest) -> Decision:
        """Its shard decides. Raises ``NoInstance``."""
        chosen = self._shard(request.namespace, request.tokens)
        self._chosen[request.request] = chosen
        return chosen.scheduler.route(request)

    def first_token(self, request: RequestId, cached: int) -> None:
        chosen = self._chosen[request]
        chosen.scheduler.first_token(request, cached)
        self._look_again(chosen, request)

    def finish(self, request: RequestId) -> None:
        """The last that is heard of it."""
        chosen = self._chosen.pop(request)
        self._look_again(chosen, request)
        chosen.scheduler.finish(request)

    def learn_answer(self, request: RequestId, namespace: Namespace, tokens: Tokens) -> None:
        self._chosen[request].scheduler.learn_answer(request, namespace, tokens)

    def answered(self, tokens: int) -> None:
        for one in self._all:
            one.scheduler.answered(tokens)

    # --- instances ---

    def member_ready(self, member: Member, ready: Ready) -> None:
        if self._sharding.owned and member.instance not in self._owners:
            at = self._joined[member.role] % len(self._all)
            self._joined[member.role] += 1
            self._owners[member.instance] = (self._all[at],)
        for one in self._owners.get(member.instance, self._all):
            one.scheduler.member_ready(member, ready)
            one.line.look_at(member.instance)

    def member_role_changed(self, member: Member) -> None:
        for one in self._all:
            one.scheduler.member_role_changed(member)
            one.line.look_everywhere()

    def member_lost(self, instance: InstanceId) -> None:
        for one in self._all:
            one.scheduler.member_lost(instance)
            one.line.look_everywhere()

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        for one in self._owners.get(heartbeat.instance, self._all):
            one.scheduler.on_heartbeat(heartbeat)
            one.line.look_at(heartbeat.instance)

    def on_pool_events(self, events: PoolEvents) -> None:
        for one in self._owners.get(events.instance, self._all):
            one.scheduler.on_pool_events(events)

    def set_link(self, wire: Wire) -> None:
        for one in self._all:
            one.scheduler.set_link(wire)

    def check(self) -> None:
        """See ``SchedulerState.check``; nobody waits."""
        for one in self._all:
            one.scheduler.state.check()
            assert not len(one.line), f"{len(one.line)} requests wait"

    # --- inside ---

    def _look_again(self, chosen: Shard, request: RequestId) -> None:
        decision = chosen.scheduler.decision(request)
        if decision is not None:
            chosen.line.look_at_places(decision)

    def _shard(self, namespace: Namespace, tokens: Tokens) -> Shard:
        if len(self._all) == 1:
            return self._all[0]
        first = tokens[: self._sharding.key_tokens].tobytes()
        return self._all[zlib.crc32(first, zlib.crc32(repr(namespace).encode())) % len(self._all)]
