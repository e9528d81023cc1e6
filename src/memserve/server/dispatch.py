"""Between HTTP and the cluster: requests go out, news of instances come in, and each finds its place.

One stream per request collects chunks from all instances that work on it. Every way out of a stream (end,
error, client gone, deadline) cancels what still runs and unbooks the load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable

from memserve.cluster.manager import ClusterManager
from memserve.cluster.supervisor import Supervisor
from memserve.core.clock import Clock
from memserve.core.errors import (
    InvalidRequest,
    MemServeError,
    NoInstance,
    PeerLost,
)
from memserve.core.messages import (
    GetSnapshot,
    Heartbeat,
    LoadProgress,
    Member,
    Message,
    PoolEvents,
    PrefixSent,
    Ready,
    RequestClosed,
    RequestError,
    Shutdown,
    Snapshot,
    StartFailed,
    TokenChunk,
    Trace,
)
from memserve.core.types import FinishReason, InstanceId, RequestId
from memserve.scheduler.admission import LineLimits
from memserve.scheduler.decision import Decision
from memserve.scheduler.history import Explanation
from memserve.scheduler.service import GlobalScheduler
from memserve.server.backend import Generated, GenerationRequest, LineView
from memserve.server.front_line import FrontLine
from memserve.server.placement import Placement
from memserve.server.progress import StartScreen
from memserve.server.stream import Interrupted, Stream, attempt_of, request_of

log = logging.getLogger(__name__)

_SNAPSHOT_SECONDS = 10.0
_TRACES_KEPT = 64
_HERE = InstanceId("server")


class Dispatcher:
    """Runs requests on the cluster. ``model`` is the weights' identity, the root of every namespace."""

    def __init__(
        self,
        scheduler: GlobalScheduler,
        clock: Clock,
        screen: StartScreen,
        *,
        model: str,
        limits: LineLimits | None = None,
        weight: Callable[[str], float] = lambda tenant: 1.0,
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._screen = screen
        self._closing = False
        self._streams: dict[RequestId, Stream] = {}
        self._draining: set[InstanceId] = set()
        self.losses: Counter[InstanceId] = Counter()
        """How often each instance was lost."""
        self._placement = Placement(
            scheduler,
            model,
            send=lambda instance, message: self._manager.send(instance, message),
            restarting=self._is_restarting,
            note=self._trace,
        )
        self._line = FrontLine(
            scheduler,
            clock,
            model,
            begin=self._placement.begin,
            restarting=self._is_restarting,
            limits=limits or LineLimits(),
            weight=weight,
        )
        self._snapshots: dict[InstanceId, asyncio.Task[None]] = {}
        self._traces: OrderedDict[RequestId, list[Trace]] = OrderedDict()
        self.manager: ClusterManager | None = None
        """Set once by the composition root, before anything is sent."""
        self.supervisor: Supervisor | None = None
        """Set likewise, where instances are started again."""
        self.start_failures: dict[InstanceId, str] = {}
        """What instances said that could not come up."""
        self.members_changed = asyncio.Event()
        """Set at each arrival and loss, for whoever waits for the cluster to come up."""

    # --- requests ---

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Generated, None]:
        """See :class:`memserve.server.backend.Backend`."""
        stream = self._open(request)
        try:
            await self._place(stream)
            while not stream.ended:
                chunk = await stream.next()
                if isinstance(chunk, Interrupted):
                    await self._placement.move(stream, chunk)
                    continue
                stream.ended = chunk.finish is not None
                if stream.ended:
                    self._trace(request.request, "server.finish", str(chunk.finish))
                yield Generated(chunk.tokens, chunk.logprobs, chunk.finish, chunk.ledger)
        finally:
            if stream.ended:
                self._placement.forget(stream)
                self._scheduler.answered(stream.answered)
            else:
                self._placement.leave(stream, FinishReason.CANCELLED)
            del self._streams[request.request]
            self._line.left(stream)
            self._dismiss_idle()

    def stop(self, request: RequestId) -> None:
        """See :class:`memserve.server.backend.Backend`."""
        stream = self._streams.get(request)
        if stream is not None and not stream.ended:
            stream.ended = True
            self._placement.leave(stream, FinishReason.STOP)
            self._trace(request, "server.finish", "stop string")

    def decisions(self, request: RequestId) -> tuple[Decision, ...]:
        """See :class:`memserve.server.backend.Backend`."""
        found: list[Decision] = []
        while (decision := self._scheduler.decision(attempt_of(request, len(found) + 1))) is not None:
            found.append(decision)
        return tuple(found)

    def why(self, request: RequestId) -> tuple[Explanation, ...]:
        """See :class:`memserve.server.backend.Backend`."""
        wanted = request_of(request)
        names = [name for name in self._scheduler.remembered() if request_of(name) == wanted]
        return tuple(each for each in map(self._scheduler.explain, names) if each is not None)

    def trace(self, request: RequestId) -> tuple[Trace, ...]:
        """The rooms that a traced request has passed, in order of time; empty when unknown."""
        return tuple(sorted(self._traces.get(request, ()), key=lambda trace: trace.at))

    def line(self) -> LineView:
        """Who waits in front of the instances."""
        return self._line.view()

    @property
    def failovers(self) -> int:
        """How often a request has gone on elsewhere."""
        return self._placement.moves

    def close(self) -> None:
        """End every request with an error that says why, and take no more."""
        self._closing = True
        self._line.close(_stopping())
        for stream in self._streams.values():
            stream.fail(_stopping())

    # --- the cluster manager's listener ---

    def on_progress(self, progress: LoadProgress) -> None:
        self._screen.loading(progress.instance, progress.stage, progress.fraction)

    def on_ready(self, member: Member, ready: Ready) -> None:
        self._scheduler.member_ready(member, ready)
        if self.supervisor is not None and self.supervisor.became_ready(member.instance):
            self._screen.back(member.instance)
        self._placement.arrived()
        self._line.members_changed()
        self.members_changed.set()

    def on_suspected(self, instance: InstanceId) -> None:
        self._scheduler.member_suspected(instance)
        self._line.members_changed()

    def on_recovered(self, instance: InstanceId) -> None:
        self._scheduler.member_recovered(instance)
        self._line.members_changed()

    def on_role_changed(self, member: Member) -> None:
        self._scheduler.member_role_changed(member)
        self._line.members_changed()

    def on_draining(self, instance: InstanceId) -> None:
        self._scheduler.member_draining(instance)
        self._draining.add(instance)
        self._line.members_changed()
        self._dismiss_idle()

    def on_lost(self, instance: InstanceId, reason: str) -> None:
        self.losses[instance] += 1
        self._scheduler.member_lost(instance)
        self._draining.discard(instance)
        self._placement.lose(instance, reason)
        self._line.members_changed()
        self._screen.lost(instance, reason)
        self.members_changed.set()

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._scheduler.on_heartbeat(heartbeat)
        self._line.changed(heartbeat.instance)

    def on_message(self, instance: InstanceId, message: Message) -> None:
        if isinstance(message, TokenChunk):
            self._accept(message)
        elif isinstance(message, PoolEvents):
            self._apply_events(message)
        elif isinstance(message, RequestClosed):
            self._scheduler.finish(message.request)
            self._line.changed(message.instance)
            self._trace(message.request, "scheduler.unbook", f"closed by {message.instance}")
            self._dismiss_idle()
        elif isinstance(message, RequestError):
            self._placement.report(message)
        elif isinstance(message, PrefixSent):
            self._scheduler.on_transfer(message.bytes, message.seconds)
            self._trace(message.request, "mempool.fetch", message.error or f"{message.tokens} tokens fetched")
        elif isinstance(message, Trace):
            self._record(message)
        elif isinstance(message, StartFailed):
            self.start_failures[message.instance] = message.message
        else:
            log.warning("%s sent an unexpected %s", instance, type(message).__name__)

    # --- inside ---

    def _open(self, request: GenerationRequest) -> Stream:
        if self._closing:
            raise _stopping()
        if request.request in self._streams:
            raise InvalidRequest(f"request id {request.request} is in use", field="x-request-id")
        if request.trace:
            self._traces[request.request] = []
            while len(self._traces) > _TRACES_KEPT:
                self._traces.popitem(last=False)
        self._trace(request.request, "server.accept", f"{len(request.tokens)} prompt tokens")
        stream = self._streams[request.request] = Stream(request)
        return stream

    async def _place(self, stream: Stream) -> None:
        try:
            await self._line.send(stream)
        except PeerLost as error:
            await self._placement.move(stream, Interrupted(str(error), lost=False))

    def _dismiss_idle(self) -> None:
        """Let those go that have asked to and for whom nothing is left to do."""
        for instance in list(self._draining):
            if not self._scheduler.has_work(instance) and not self._placement.uses(instance):
                self._draining.discard(instance)
                with contextlib.suppress(PeerLost):
                    self._manager.send(instance, Shutdown())

    def _accept(self, chunk: TokenChunk) -> None:
        stream = self._placement.find(chunk.request)
        if stream is not None:
            if chunk.offset == 0:
                cached = chunk.ledger.cached if chunk.ledger is not None else None
                self._scheduler.first_token(chunk.request, cached)
                if stream.decision is not None:
                    self._line.changed(stream.decision.prefill)
            stream.accept(chunk)

    def _apply_events(self, events: PoolEvents) -> None:
        if self._scheduler.on_pool_events(events) and events.instance not in self._snapshots:
            task = asyncio.get_running_loop().create_task(self._fetch_snapshot(events.instance))
            self._snapshots[events.instance] = task
            task.add_done_callback(lambda _: self._snapshots.pop(events.instance, None))

    async def _fetch_snapshot(self, instance: InstanceId) -> None:
        try:
            again = True
            while again:
                snapshot = await self._manager.call(instance, GetSnapshot(), _SNAPSHOT_SECONDS)
                assert isinstance(snapshot, Snapshot)
                again = self._scheduler.on_snapshot(snapshot)
        except MemServeError as error:
            # The next batch of events asks again; until then the tree knows less than there is.
            log.warning("no snapshot from %s: %s", instance, error)

    def _trace(self, request: RequestId, room: str, event: str) -> None:
        self._record(Trace(request, _HERE, room, event, self._clock.now()))

    def _record(self, trace: Trace) -> None:
        request = request_of(trace.request)
        if request in self._traces:
            self._traces[request].append(trace)

    def _is_restarting(self) -> bool:
        return self.supervisor is not None and bool(self.supervisor.restarting)

    @property
    def _manager(self) -> ClusterManager:
        assert self.manager is not None, "the composition root sets the manager first"
        return self.manager


def _stopping() -> NoInstance:
    return NoInstance("the server is stopping")
