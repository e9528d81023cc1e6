"""Sends streams where the scheduler says, and elsewhere when an instance is lost under them (failover).

A continuation is a request of its own to the instances: prompt and answered tokens as its prompt, the rest of
``max_tokens``, and random numbers from where they stopped. What survives of its KV is found as any prefix is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from memserve.core.errors import InvalidRequest, MemServeError, NoInstance, PeerLost, error_from_wire
from memserve.core.messages import Cancel, Fetch, Message, RequestError, SendPrefix, Submit
from memserve.core.types import FinishReason, InstanceId, Namespace, RequestId, Tokens, pack_tokens
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.service import GlobalScheduler
from memserve.server.stream import Interrupted, Stream

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""So many in a row may bring no token: a request that kills whoever runs it must not kill them all."""
_PAUSE_SECONDS = 0.05
"""Before an attempt after which nobody is known to be lost; doubled each time, while the loss gets known."""
_LOOK_SECONDS = 0.25
"""How often to look whether anybody is still on the way back."""
_FETCH_PATIENCE = 4.0
_FETCH_SECONDS = 0.05
"""A prefix from a peer is waited for so many times as long as it should take, and so many seconds more."""
_MOVABLE = frozenset({"PeerLost", "TransferAborted", "StaleAddress"})
"""Errors of an instance that speak of another one: the request itself is fine."""

Send = Callable[[InstanceId, Message], None]
Note = Callable[[RequestId, str, str], None]


class Placement:
    """Streams by attempt, from being placed until they leave.

    ``send`` reaches an instance or raises ``PeerLost``; ``restarting`` tells whether a lost one is on its way
    back; ``note(request, room, event)`` is for traces.
    """

    def __init__(
        self,
        scheduler: GlobalScheduler,
        model: str,
        *,
        send: Send,
        restarting: Callable[[], bool],
        note: Note,
    ) -> None:
        self._scheduler = scheduler
        self._model = model
        self._send = send
        self._restarting = restarting
        self._note = note
        self._attempts: dict[RequestId, Stream] = {}
        self.moves = 0
        """How often a stream has gone on elsewhere."""
        self._arrival = asyncio.Event()

    def find(self, attempt: RequestId) -> Stream | None:
        """The stream that waits for messages of ``attempt``; None when that is over."""
        return self._attempts.get(attempt)

    def uses(self, instance: InstanceId) -> bool:
        """Whether the present attempt of any stream was sent to ``instance``."""
        return any(stream.uses(instance) for stream in self._attempts.values())

    def begin(self, stream: Stream, behind: int = 0) -> None:
        """Make an attempt, with so many waiting behind it.

        Raises ``NoInstance``, or ``PeerLost`` where the chosen one is gone already.
        """
        request, attempt = stream.request, stream.next_attempt
        namespace, tokens = Namespace(self._model, salt=request.salt), stream.tokens()
        sampling = stream.sampling()
        decision = self._scheduler.route(
            RouteRequest(attempt, namespace, tokens, request.session, sampling.max_tokens, behind)
        )
        self._note(request.request, "scheduler.decide", decision.reason)
        stream.begin(decision)
        self._attempts[attempt] = stream
        try:
            fetch = self._ask_for_prefix(decision, namespace, tokens)
            submit = Submit(
                attempt, namespace, pack_tokens(tokens), sampling, decision.decode, request.trace, fetch
            )
            self._send(decision.prefill, submit)
        except PeerLost:
            self.leave(stream, FinishReason.CANCELLED)
            raise

    async def move(self, stream: Stream, why: Interrupted) -> None:
        """Let an interrupted stream go on elsewhere, waiting for whoever is coming back if need be.

        Raises ``PeerLost`` after too many attempts, ``NoInstance`` when nobody is left and nobody comes.
        """
        while stream.fruitless < MAX_ATTEMPTS:
            if not why.lost:
                await asyncio.sleep(_PAUSE_SECONDS * 2**stream.fruitless)
            self._note(stream.request.request, "server.failover", why.reason)
            log.warning("request %s is moved: %s", stream.request.request, why.reason)
            try:
                await self._begin_when_possible(stream)
            except PeerLost as error:
                why = Interrupted(str(error), lost=False)
            except NoInstance as error:
                raise NoInstance(f"{why.reason}; {error}") from error
            else:
                self.moves += 1
                return
        raise PeerLost(f"{why.reason}; that was attempt {MAX_ATTEMPTS} without a token; try again later")

    def arrived(self) -> None:
        """An instance has become ready: whoever waits for one may try again."""
        self._arrival.set()
        self._arrival = asyncio.Event()

    def lose(self, instance: InstanceId, reason: str) -> None:
        """An instance is gone: interrupt the attempts that cannot do without it."""
        for stream in [stream for stream in self._attempts.values() if stream.needs(instance)]:
            self._interrupt(stream, f"{instance} was lost while it served the request ({reason})")

    def report(self, error: RequestError) -> None:
        """An instance could not do its part: another may, if it was not the request's fault."""
        stream = self._attempts.get(error.request)
        if stream is None or stream.decision is None:
            return
        if error.kind in _MOVABLE:
            self._interrupt(stream, error.message, lost=False)
        else:
            stream.fail(_error_of(error))

    def leave(self, stream: Stream, reason: FinishReason) -> None:
        """End the present attempt everywhere. After a stop instances report its end; a cancel is final."""
        attempt, decision = stream.attempt, stream.decision
        self._attempts.pop(attempt, None)
        self._scheduler.finish(attempt)
        for instance in () if decision is None else (decision.prefill, decision.decode):
            # A lost instance has nothing left to cancel.
            with contextlib.suppress(PeerLost):
                if instance is not None:
                    self._send(instance, Cancel(attempt, reason))

    def forget(self, stream: Stream) -> None:
        """The stream has ended by itself."""
        self._attempts.pop(stream.attempt, None)
        if self._scheduler.learns_answers:
            namespace = Namespace(self._model, salt=stream.request.salt)
            self._scheduler.learn_answer(stream.attempt, namespace, stream.tokens()[:-1])

    # --- inside ---

    def _ask_for_prefix(self, decision: Decision, namespace: Namespace, tokens: Tokens) -> Fetch | None:
        """Let the holder that the decision names send its part; None where there is nothing to wait for."""
        if decision.fetch_from is None:
            return None
        wanted = tokens[: decision.fetch_tokens]
        ask = SendPrefix(decision.request, namespace, pack_tokens(wanted), decision.prefill)
        try:
            self._send(decision.fetch_from, ask)
        except PeerLost:
            return None
        missing = decision.fetch_tokens - decision.matched_prefill
        seconds = _FETCH_SECONDS + _FETCH_PATIENCE * self._scheduler.state.wire.seconds(missing)
        return Fetch(decision.fetch_tokens, seconds)

    def _interrupt(self, stream: Stream, reason: str, *, lost: bool = True) -> None:
        self.leave(stream, FinishReason.CANCELLED)
        stream.interrupt(reason, lost=lost)

    async def _begin_when_possible(self, stream: Stream) -> None:
        while True:
            arrival = self._arrival
            try:
                return self.begin(stream)
            except NoInstance:
                await self._wait_for(arrival)
                if not arrival.is_set():
                    raise

    async def _wait_for(self, arrival: asyncio.Event) -> None:
        """Until an instance becomes ready, or none is on its way any more."""
        while not arrival.is_set() and self._restarting():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await arrival.wait()


def _error_of(message: RequestError) -> MemServeError:
    if message.kind == InvalidRequest.__name__:
        return InvalidRequest(message.message, field="prompt")
    return error_from_wire(message.kind, message.message)
