"""Streams that wait in front of the instances, and the moment when each is begun.

Decides nothing: ``scheduler.admission`` says who may wait, whose turn it is, and when there is room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from memserve.core.clock import Clock
from memserve.core.errors import MemServeError, Refusal
from memserve.core.types import InstanceId, Namespace, RequestId
from memserve.scheduler.admission import LineLimits, Room, WaitingLine, is_served, price_rate
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.fair_queue import FairQueue, Waiting
from memserve.scheduler.service import GlobalScheduler
from memserve.server.backend import Counter, LineView, TenantView
from memserve.server.stream import Stream

_LOOK_SECONDS = 0.25
"""How often to look whether anybody is still on the way back, which nobody tells."""


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """A stream that waits; ``come`` with what went wrong when it was begun, or None."""

    stream: Stream
    come: asyncio.Future[MemServeError | None]


class FrontLine:
    """Lets streams through while there is room, and one after the other when there is not.

    ``begin`` sends a stream, with the number of those behind it, or raises; ``restarting`` tells whether a
    lost instance is on its way back; ``weight`` is that of a tenant.
    """

    def __init__(
        self,
        scheduler: GlobalScheduler,
        clock: Clock,
        model: str,
        *,
        begin: Callable[[Stream, int], None],
        restarting: Callable[[], bool],
        limits: LineLimits,
        weight: Callable[[str], float],
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._model = model
        self._begin = begin
        self._restarting = restarting
        self._line = WaitingLine(limits, FairQueue(weight))
        self._room = Room(scheduler.state, limits.max_running)
        self._turns: dict[RequestId, _Turn] = {}
        self._in_flight: set[RequestId] = set()
        self._look: asyncio.TimerHandle | None = None

    async def send(self, stream: Stream) -> None:
        """Begin the stream now, or when its turn has come.

        Raises ``Overloaded`` where it may not wait, or has waited for longer than its first token may take,
        and what ``begin`` raises. Otherwise bounded by whoever awaits it.
        """
        request = stream.request
        waiting = Waiting(
            request.request,
            request.tenant,
            self._scheduler.tokens_of(request.tokens, request.sampling.max_tokens),
            request.priority,
            self._clock.now(),
        )
        # Where nobody is, nothing is to be waited for: the attempt says who is missing.
        at_once = not is_served(self._scheduler.state) or (not len(self._line) and self._has_room(stream))
        if request.slo_ttft is not None:
            self._require_in_time(stream, waiting, request.slo_ttft, at_once=at_once)
        if at_once:
            self._start(stream)
        else:
            self._line.join(waiting, price_rate(self._scheduler.state))
            await self._wait(stream, waiting)

    def left(self, stream: Stream) -> None:
        """A stream has ended, however: there may be room for others."""
        self._in_flight.discard(stream.request.request)
        decision = self._scheduler.decision(stream.attempt)
        if decision is not None:
            self._room.look_at(decision.prefill)
            self._room.look_at(decision.decode or decision.prefill)
        self._move()

    def changed(self, instance: InstanceId) -> None:
        """An instance has got less to do, or told of itself."""
        self._room.look_at(instance)
        self._move()

    def members_changed(self) -> None:
        """Others take requests now than before, or other ones."""
        self._room.look_everywhere()
        self._move()

    def close(self, error: MemServeError) -> None:
        """End the wait of all with ``error``."""
        if self._look is not None:
            self._look.cancel()
        for turn in self._turns.values():
            if not turn.come.done():
                turn.come.set_result(error)

    def view(self) -> LineView:
        """Who waits, and what became of those who did."""
        lanes, waits = self._line.queue.lanes(), self._line.waits
        tenants = []
        for name in sorted({*lanes, *waits}):
            lane, past = lanes.get(name), waits.get(name)
            tenants.append(
                TenantView(
                    name,
                    self._line.queue.weight(name),
                    len(lane) if lane else 0,
                    lane.tokens if lane else 0,
                    past.requests if past else 0,
                    past.seconds if past else 0.0,
                )
            )
        refusals = (Counter(str(reason), count) for reason, count in sorted(self._line.refusals.items()))
        return LineView(tuple(tenants), tuple(refusals))

    # --- inside ---

    def _move(self) -> None:
        """Begin those whose turn it is, as far as there is room."""
        while (first := self._line.queue.peek()) and self._is_open(self._turns[first.request].stream):
            waiting = self._line.take(self._clock.now())
            assert waiting is not None, "somebody waits"
            turn = self._turns[waiting.request]
            # A task that is being cancelled has not come to leave the line yet.
            if not turn.come.done():
                turn.come.set_result(self._try_to_start(turn.stream))

    async def _wait(self, stream: Stream, waiting: Waiting) -> None:
        turn = _Turn(stream, asyncio.get_running_loop().create_future())
        self._turns[waiting.request] = turn
        slo = stream.request.slo_ttft
        try:
            async with asyncio.timeout(slo) as limit:
                error = await turn.come
        except TimeoutError:
            if not limit.expired():
                raise
            self._line.leave(waiting)
            raise self._line.refuse(
                Refusal.SLO_TTFT,
                f"the request has waited for {slo:g} s, within which the first token was asked for. Remedy: "
                "try again after the seconds in Retry-After, or allow more time (x-memserve-slo-ttft).",
                self._line.predict_wait(waiting, price_rate(self._scheduler.state)),
            ) from None
        finally:
            del self._turns[waiting.request]
            self._line.leave(waiting)
        if error is not None:
            raise error

    def _require_in_time(self, stream: Stream, waiting: Waiting, slo: float, *, at_once: bool) -> None:
        state = self._scheduler.state
        if is_served(state):
            service = self._foresee(stream).predicted_ttft
            self._line.require_in_time(waiting, slo, price_rate(state), service, at_once=at_once)

    def _foresee(self, stream: Stream) -> Decision:
        request = stream.request
        return self._scheduler.foresee(
            RouteRequest(
                request.request,
                Namespace(self._model, salt=request.salt),
                request.tokens,
                request.session,
                request.sampling.max_tokens,
                max(len(self._line) - 1, 0),
            )
        )

    def _is_open(self, stream: Stream) -> bool:
        """Whether the next one may begin, if only to learn that nobody is left and nobody comes."""
        if is_served(self._scheduler.state):
            return self._has_room(stream)
        if not self._restarting():
            return True
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look_again)
        return False

    def _look_again(self) -> None:
        self._look = None
        self._move()

    def _has_room(self, stream: Stream) -> bool:
        return self._room.is_left(len(self._in_flight), lambda: self._foresee(stream).prefill)

    def _start(self, stream: Stream) -> None:
        self._in_flight.add(stream.request.request)
        self._begin(stream, len(self._line))

    def _try_to_start(self, stream: Stream) -> MemServeError | None:
        try:
            self._start(stream)
        except MemServeError as error:
            return error
        return None
