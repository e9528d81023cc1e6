"""Several schedulers side by side, each for the prompts that begin alike: the simulator's model of sharding.

A request goes to the shard that its namespace and first tokens name, so that those who share a prefix meet.
What other shards have booked at an instance a shard only knows from heartbeats.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

from memserve.core.messages import Heartbeat, Member, PoolEvents, Ready
from memserve.core.types import InstanceId, Namespace, RequestId, Role, Tokens
from memserve.scheduler.accuracy import TreeAccuracy
from memserve.scheduler.costs import Wire
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.service import GlobalScheduler


@dataclass(frozen=True, slots=True)
class Sharding:
    """How many schedulers, and how many tokens of a prompt name one: more than what all prompts share.

    With ``owned`` each has instances of its own, as many of each role as the others; else all have all.
    """

    shards: int = 1
    key_tokens: int = 16
    owned: bool = False


class Shards:
    """Several schedulers behind those calls that a simulation makes."""

    def __init__(self, make: Callable[[], GlobalScheduler], sharding: Sharding) -> None:
        self._all = [make() for _ in range(sharding.shards)]
        self._sharding = sharding
        self._owners: dict[InstanceId, Sequence[GlobalScheduler]] = {}
        self._joined: Counter[Role] = Counter()
        self._chosen: dict[RequestId, GlobalScheduler] = {}

    @property
    def accuracy(self) -> TreeAccuracy:
        """How true their trees were, together."""
        sums = [astuple(one.state.accuracy) for one in self._all]
        return TreeAccuracy(*map(sum, zip(*sums, strict=True)))

    def route(self, request: RouteRequest) -> Decision:
        """Its shard decides. Raises ``NoInstance``."""
        chosen = self._all[self._shard(request.namespace, request.tokens)]
        self._chosen[request.request] = chosen
        return chosen.route(request)

    def first_token(self, request: RequestId, cached: int) -> None:
        self._chosen[request].first_token(request, cached)

    def finish(self, request: RequestId) -> None:
        """The last that is heard of it."""
        self._chosen.pop(request).finish(request)

    def learn_answer(self, request: RequestId, namespace: Namespace, tokens: Tokens) -> None:
        self._chosen[request].learn_answer(request, namespace, tokens)

    def answered(self, tokens: int) -> None:
        for one in self._all:
            one.answered(tokens)

    def member_ready(self, member: Member, ready: Ready) -> None:
        if self._sharding.owned and member.instance not in self._owners:
            at = self._joined[member.role] % len(self._all)
            self._joined[member.role] += 1
            self._owners[member.instance] = (self._all[at],)
        for one in self._owners.get(member.instance, self._all):
            one.member_ready(member, ready)

    def member_role_changed(self, member: Member) -> None:
        for one in self._all:
            one.member_role_changed(member)

    def member_lost(self, instance: InstanceId) -> None:
        for one in self._all:
            one.member_lost(instance)

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        for one in self._owners.get(heartbeat.instance, self._all):
            one.on_heartbeat(heartbeat)

    def on_pool_events(self, events: PoolEvents) -> None:
        for one in self._owners.get(events.instance, self._all):
            one.on_pool_events(events)

    def set_link(self, wire: Wire) -> None:
        for one in self._all:
            one.set_link(wire)

    def check(self) -> None:
        """See ``SchedulerState.check``."""
        for one in self._all:
            one.state.check()

    def _shard(self, namespace: Namespace, tokens: Tokens) -> int:
        if len(self._all) == 1:
            return 0
        first = tokens[: self._sharding.key_tokens].tobytes()
        return zlib.crc32(first, zlib.crc32(repr(namespace).encode())) % len(self._all)
