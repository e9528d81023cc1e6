"""The whole cluster for people: the dispatcher plus health and figures, as the HTTP server's ``Backend``."""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from collections.abc import AsyncGenerator

from memserve.cluster.manager import ClusterManager, Link
from memserve.cluster.membership import MemberState, MemberView
from memserve.core.config import Config
from memserve.core.errors import ConfigError, InvalidRequest, PeerLost
from memserve.core.messages import GetStats, PoolResized, ResizePool, Stats, TierName, Trace
from memserve.core.types import InstanceId, RequestId, Role
from memserve.scheduler.decision import Decision
from memserve.scheduler.history import Explanation
from memserve.scheduler.service import GlobalScheduler
from memserve.server.backend import (
    ClusterView,
    Counter,
    Generated,
    GenerationRequest,
    Health,
    InstanceView,
    LostInstance,
    RegretView,
    StateCount,
    TierSize,
    TreeView,
)
from memserve.server.dispatch import Dispatcher
from memserve.server.roles import RoleSwitch, missing_legs, require_ready

_STATS_SECONDS = 2.0
_RESIZE_SECONDS = 60.0


class ClusterOverview:
    """Runs requests through ``dispatcher`` and reports on what ``manager`` and ``scheduler`` know."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        manager: ClusterManager,
        scheduler: GlobalScheduler,
        config: Config,
        *,
        model: str,
    ) -> None:
        self._dispatcher = dispatcher
        self._manager = manager
        self._scheduler = scheduler
        self._config = config
        self._model = model
        self._roles = RoleSwitch(manager, config.engine.phases)
        self._clock_offset = time.time() - time.monotonic()

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Generated, None]:
        return self._dispatcher.generate(request)

    def stop(self, request: RequestId) -> None:
        self._dispatcher.stop(request)

    def decisions(self, request: RequestId) -> tuple[Decision, ...]:
        return self._dispatcher.decisions(request)

    def why(self, request: RequestId) -> tuple[Explanation, ...]:
        return self._dispatcher.why(request)

    def trace(self, request: RequestId) -> tuple[Trace, ...]:
        return self._dispatcher.trace(request)

    def health(self) -> Health:
        views = self._manager.view()
        tally = Tally(str(view.state) for view in views)
        lost = tuple(
            LostInstance(view.instance, view.reason, view.since + self._clock_offset)
            for view in views
            if view.state is MemberState.DEAD
        )
        counts = tuple(StateCount(state, count) for state, count in sorted(tally.items()))
        missing = missing_legs(view.role for view in views if view.state.serves)
        loading = [view.instance for view in views if view.state is MemberState.JOINING]
        coming = f"; starting: {', '.join(loading)}" if loading else ""
        if missing:
            text = f"no {' and no '.join(missing)} instance is alive{coming}"
            return Health("unavailable", text, counts, lost)
        if lost or loading:
            names = ", ".join(sorted([*loading, *(entry.instance for entry in lost)]))
            return Health("degraded", f"serving without {names}{coming}", counts, lost)
        return Health("ok", "all instances are ready", counts, lost)

    async def cluster(self) -> ClusterView:
        views = {view.instance: view for view in self._manager.view()}
        figures = await asyncio.gather(*(self._ask(view.instance) for view in views.values()))
        return ClusterView(
            self._model,
            self._config.server.policy,
            self._config.engine.phases,
            self._config.pool.block_tokens,
            next((link.ready.block_bytes for link in self._manager.links() if link.ready), 0),
            tuple(
                _describe(view, self._manager.link(view.instance), stats)
                for view, stats in zip(views.values(), figures, strict=True)
            ),
            self._trees(),
            self._regrets(),
            tuple(Counter(name, count) for name, count in sorted(self._dispatcher.losses.items())),
            self._dispatcher.failovers,
            self._dispatcher.line(),
        )

    async def resize(self, instance: str, tier: TierName, memory: int) -> TierSize:
        name = InstanceId(instance)
        require_ready(name, self._manager)
        try:
            resized = await self._manager.call(name, ResizePool(tier, memory), _RESIZE_SECONDS)
        except (ConfigError, InvalidRequest) as error:
            raise InvalidRequest(str(error), field=tier) from error
        assert isinstance(resized, PoolResized)
        return TierSize(tier, resized.blocks, resized.blocks * resized.block_bytes, resized.draining)

    async def set_role(self, instance: str, role: Role) -> Role:
        return await self._roles.switch(InstanceId(instance), role)

    def _trees(self) -> tuple[TreeView, ...]:
        state = self._scheduler.state
        held = sum(state.tree.held_tokens(instance.instance) for instance in state.instances())
        if not held and not state.accuracy.requests:
            return ()
        accuracy = state.accuracy
        return (
            TreeView(
                "global",
                state.tree.nodes,
                held,
                str(state.tree.options.source),
                state.tree.memory,
                accuracy.believed,
                accuracy.promised,
                accuracy.stale,
                accuracy.missed,
            ),
        )

    def _regrets(self) -> tuple[RegretView, ...]:
        errors = self._scheduler.state.predictions
        p50, p90 = errors.quantile(0.5), errors.quantile(0.9)
        return tuple(
            RegretView(
                policy, each.decisions, each.others, each.regret, each.totals, each.regret_total, p50, p90
            )
            for policy, each in self._scheduler.regrets().items()
        )

    async def _ask(self, instance: InstanceId) -> Stats | None:
        link = self._manager.link(instance)
        if link is None or link.ready is None:
            return None
        try:
            stats = await self._manager.call(instance, GetStats(), _STATS_SECONDS)
        except PeerLost:
            return None
        assert isinstance(stats, Stats)
        return stats


def _describe(view: MemberView, link: Link | None, stats: Stats | None) -> InstanceView:
    ready = link.ready if link is not None else None
    shown = InstanceView(
        view.instance,
        view.role,
        view.state,
        view.incarnation,
        link.join.pid if link is not None else 0,
        ready.isa if ready is not None else "",
        ready.blocks if ready is not None else 0,
    )
    if stats is None:
        return shown
    load = stats.load
    return InstanceView(
        shown.instance,
        shown.role,
        shown.state,
        shown.incarnation,
        shown.pid,
        shown.isa,
        load.blocks,
        load.free_blocks,
        load.active_blocks,
        load.historical_blocks,
        load.incoming_blocks,
        load.waiting,
        load.running,
        load.tokens_to_prefill,
        tuple(Counter(name, value) for name, value in sorted(stats.counters.items())),
        load.prices,
    )
