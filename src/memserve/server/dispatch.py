"""Sends requests where the scheduler says and puts what comes back in order: the real ``Backend``.

One stream per request collects chunks from both instances. Every way out of a stream (end, error, client
gone, instance lost, deadline) cancels what still runs and unbooks the load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from memserve.cluster.manager import ClusterManager
from memserve.core.clock import Clock
from memserve.core.errors import (
    InvalidRequest,
    MemServeError,
    NoInstance,
    Overloaded,
    PeerLost,
    error_from_wire,
)
from memserve.core.messages import (
    Cancel,
    GetSnapshot,
    Heartbeat,
    LoadProgress,
    Member,
    Message,
    PoolEvents,
    Ready,
    RequestClosed,
    RequestError,
    Snapshot,
    StartFailed,
    Submit,
    TokenChunk,
    Trace,
)
from memserve.core.types import FinishReason, InstanceId, Namespace, RequestId, pack_tokens
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.service import GlobalScheduler
from memserve.server.backend import Generated, GenerationRequest
from memserve.server.progress import StartScreen

log = logging.getLogger(__name__)

_SNAPSHOT_SECONDS = 10.0
_TRACES_KEPT = 64
_HERE = InstanceId("server")


@dataclass(slots=True)
class _Stream:
    """Chunks of one request on their way to the client; ``next_offset`` counts sampled tokens."""

    decision: Decision
    arrived: asyncio.Queue[TokenChunk | MemServeError] = field(default_factory=asyncio.Queue)
    next_offset: int = 0
    early: dict[int, TokenChunk] = field(default_factory=dict)
    ended: bool = False

    def accept(self, chunk: TokenChunk) -> None:
        """Queue a chunk once all before it have come; P's first token may arrive after D's second."""
        self.early[chunk.offset] = chunk
        while (ready := self.early.pop(self.next_offset, None)) is not None:
            self.next_offset += len(ready.tokens)
            self.arrived.put_nowait(ready)
            if ready.finish is not None:
                return

    def needs(self, instance: InstanceId) -> bool:
        """Whether the stream cannot go on without ``instance``: P matters until D has spoken."""
        if instance == self.decision.decode:
            return True
        decoding = self.decision.decode is not None and (self.next_offset > 1 or bool(self.early))
        return instance == self.decision.prefill and not decoding


class Dispatcher:
    """Runs requests on the cluster. ``model`` is the weights' identity, the root of every namespace."""

    def __init__(
        self,
        scheduler: GlobalScheduler,
        clock: Clock,
        screen: StartScreen,
        *,
        model: str,
        max_waiting: int,
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._screen = screen
        self._model = model
        self._max_waiting = max_waiting
        self._closing = False
        self._streams: dict[RequestId, _Stream] = {}
        self._snapshots: dict[InstanceId, asyncio.Task[None]] = {}
        self._traces: OrderedDict[RequestId, list[Trace]] = OrderedDict()
        self.manager: ClusterManager | None = None
        """Set once by the composition root, before anything is sent."""
        self.start_failures: dict[InstanceId, str] = {}
        """What instances said that could not come up."""
        self.members_changed = asyncio.Event()
        """Set at each arrival and loss, for whoever waits for the cluster to come up."""

    # --- requests ---

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Generated, None]:
        """See :class:`memserve.server.backend.Backend`."""
        stream = self._open(request)
        try:
            while not stream.ended:
                chunk = await _next(stream)
                if chunk.offset == 0:
                    self._scheduler.first_token(request.request)
                stream.ended = chunk.finish is not None
                if stream.ended:
                    self._trace(request.request, "server.finish", str(chunk.finish))
                yield Generated(chunk.tokens, chunk.logprobs, chunk.finish, chunk.ledger)
        finally:
            if not stream.ended:
                self._cancel(request.request, stream, FinishReason.CANCELLED)
            self._streams.pop(request.request, None)

    def stop(self, request: RequestId) -> None:
        """See :class:`memserve.server.backend.Backend`."""
        stream = self._streams.get(request)
        if stream is not None and not stream.ended:
            stream.ended = True
            self._cancel(request, stream, FinishReason.STOP)
            self._trace(request, "server.finish", "stop string")

    def decision(self, request: RequestId) -> Decision | None:
        """See :class:`memserve.server.backend.Backend`."""
        return self._scheduler.decision(request)

    def trace(self, request: RequestId) -> tuple[Trace, ...]:
        """The rooms that a traced request has passed, in order of time; empty when unknown."""
        return tuple(sorted(self._traces.get(request, ()), key=lambda trace: trace.at))

    def close(self) -> None:
        """End every request with an error that says why, and take no more."""
        self._closing = True
        for stream in self._streams.values():
            stream.arrived.put_nowait(_stopping())

    # --- the cluster manager's listener ---

    def on_progress(self, progress: LoadProgress) -> None:
        self._screen.loading(progress.instance, progress.stage, progress.fraction)

    def on_ready(self, member: Member, ready: Ready) -> None:
        self._scheduler.member_ready(member, ready)
        self.members_changed.set()

    def on_suspected(self, instance: InstanceId) -> None:
        self._scheduler.member_suspected(instance)

    def on_recovered(self, instance: InstanceId) -> None:
        self._scheduler.member_recovered(instance)

    def on_role_changed(self, member: Member) -> None:
        self._scheduler.member_role_changed(member)

    def on_lost(self, instance: InstanceId, reason: str) -> None:
        self._scheduler.member_lost(instance)
        for request, stream in list(self._streams.items()):
            if stream.needs(instance):
                lost = PeerLost(f"{instance} was lost while it served the request ({reason}); try again")
                stream.arrived.put_nowait(lost)
                log.warning("request %s failed: %s", request, lost)
        self._screen.lost(instance, reason)
        self.members_changed.set()

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._scheduler.on_heartbeat(heartbeat)

    def on_message(self, instance: InstanceId, message: Message) -> None:
        if isinstance(message, TokenChunk):
            stream = self._streams.get(message.request)
            if stream is not None:
                stream.accept(message)
        elif isinstance(message, PoolEvents):
            self._apply_events(message)
        elif isinstance(message, RequestClosed):
            self._scheduler.finish(message.request)
            self._trace(message.request, "scheduler.unbook", f"closed by {message.instance}")
        elif isinstance(message, RequestError):
            stream = self._streams.get(message.request)
            if stream is not None:
                stream.arrived.put_nowait(_error_of(message))
        elif isinstance(message, Trace):
            self._record(message)
        elif isinstance(message, StartFailed):
            self.start_failures[message.instance] = message.message
        else:
            log.warning("%s sent an unexpected %s", instance, type(message).__name__)

    # --- inside ---

    def _open(self, request: GenerationRequest) -> _Stream:
        if self._closing:
            raise _stopping()
        if request.request in self._streams:
            raise InvalidRequest(f"request id {request.request} is in use", field="x-request-id")
        if len(self._streams) >= self._max_waiting:
            raise Overloaded(f"{len(self._streams)} requests are being served already; try again later")
        if request.trace:
            self._traces[request.request] = []
            while len(self._traces) > _TRACES_KEPT:
                self._traces.popitem(last=False)
        self._trace(request.request, "server.accept", f"{len(request.tokens)} prompt tokens")
        namespace = Namespace(self._model, salt=request.salt)
        decision = self._scheduler.route(
            RouteRequest(request.request, namespace, request.tokens, request.session)
        )
        self._trace(request.request, "scheduler.decide", decision.reason)
        stream = self._streams[request.request] = _Stream(decision)
        submit = Submit(
            request.request,
            namespace,
            pack_tokens(request.tokens),
            request.sampling,
            decision.decode,
            request.trace,
        )
        try:
            self._manager.send(decision.prefill, submit)
        except PeerLost as error:
            del self._streams[request.request]
            self._scheduler.finish(request.request)
            raise NoInstance(str(error)) from error
        return stream

    def _cancel(self, request: RequestId, stream: _Stream, reason: FinishReason) -> None:
        """End the request on both instances. After a stop they report the end; a cancel is final here."""
        for instance in (stream.decision.prefill, stream.decision.decode):
            # A lost instance has nothing left to cancel.
            with contextlib.suppress(PeerLost):
                if instance is not None:
                    self._manager.send(instance, Cancel(request, reason))
        self._scheduler.finish(request)

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
        if trace.request in self._traces:
            self._traces[trace.request].append(trace)

    @property
    def _manager(self) -> ClusterManager:
        assert self.manager is not None, "the composition root sets the manager first"
        return self.manager


async def _next(stream: _Stream) -> TokenChunk:
    # Unbounded here: whoever iterates sets the deadline, and closing the generator cancels the request.
    arrived = await stream.arrived.get()
    if isinstance(arrived, MemServeError):
        raise arrived
    return arrived


def _stopping() -> NoInstance:
    return NoInstance("the server is stopping")


def _error_of(message: RequestError) -> MemServeError:
    if message.kind == InvalidRequest.__name__:
        return InvalidRequest(message.message, field="prompt")
    return error_from_wire(message.kind, message.message)
