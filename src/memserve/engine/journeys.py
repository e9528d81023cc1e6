"""Sequences whose KV is on its way to a peer: P to D after prefill, D to P after decode.

Knows which are under way and how each ends; steps and queues are the engine's, transport the carrier's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

from memserve.core.clock import Clock
from memserve.core.errors import MemServeError
from memserve.core.messages import Message, RequestClosed, RequestError
from memserve.core.types import FinishReason, InstanceId, RequestId
from memserve.engine.backflow import Backflow
from memserve.engine.carrier import Carrier, Delivered
from memserve.engine.head_start import HeadStarts
from memserve.engine.phases import Handoff, Phases
from memserve.engine.sequence import Sequence

log = logging.getLogger(__name__)

Journey = Coroutine[None, None, RequestClosed | None]


class Journeys:
    """Sends sequences off through ``carrier``; a sequence that departs is in no batch any more.

    ``release`` lets go of a sequence's blocks, ``trace`` records an event of it (sequence, room, text).
    """

    def __init__(
        self,
        instance: InstanceId,
        phases: Phases,
        carrier: Carrier,
        heads: HeadStarts,
        backflow: Backflow,
        clock: Clock,
        *,
        release: Callable[[Sequence], None],
        trace: Callable[[Sequence, str, str], None],
        emit: Callable[[Message], None],
    ) -> None:
        self._instance = instance
        self._phases = phases
        self._carrier = carrier
        self._heads = heads
        self._backflow = backflow
        self._clock = clock
        self._release = release
        self._trace = trace
        self._emit = emit
        self._departed: dict[RequestId, asyncio.Task[RequestClosed | None]] = {}
        self._handing_over: set[RequestId] = set()

    def hand_over(self, sequence: Sequence) -> None:
        """P to D. When it cannot be done the request fails; the prompt's KV stays here for the next try."""
        self._handing_over.add(sequence.request)
        self._depart(sequence, self._hand_over(sequence, self._heads.take(sequence)))

    def send_back(self, sequence: Sequence) -> None:
        """D to P. When it cannot be done the next turn computes a little more; nobody is told."""
        self._depart(sequence, self._send_back(sequence))

    def cancel(self, request: RequestId, reason: FinishReason) -> bool:
        """End a request's journey early, if it is on one; whether it is."""
        journey = self._departed.get(request)
        # After a stop an answer's KV is still worth moving; a prompt that nobody decodes any more is not.
        if journey is not None and (reason is FinishReason.CANCELLED or request in self._handing_over):
            self._stop(request, journey)
        return journey is not None

    async def close(self) -> None:
        """End all journeys, however far they have come."""
        under_way = dict(self._departed)
        for request, journey in under_way.items():
            self._stop(request, journey)
        await asyncio.gather(*under_way.values(), return_exceptions=True)

    def _stop(self, request: RequestId, journey: asyncio.Task[RequestClosed | None]) -> None:
        # Where it had a head start, that ends first: what it holds is free before the request is closed.
        if not self._heads.call_off(request):
            journey.cancel()

    def _depart(self, sequence: Sequence, journey: Journey) -> None:
        task = asyncio.get_running_loop().create_task(journey)
        self._departed[sequence.request] = task
        # Not a ``finally`` of the journey: a task that is cancelled before its first step runs none.
        task.add_done_callback(lambda done: self._arrive(sequence, done))

    def _arrive(self, sequence: Sequence, journey: asyncio.Task[RequestClosed | None]) -> None:
        """However a journey ended: let go of the blocks, and close the request unless it goes on at D."""
        del self._departed[sequence.request]
        self._handing_over.discard(sequence.request)
        self._release(sequence)
        closed: RequestClosed | None = RequestClosed(sequence.request, self._instance)
        if not journey.cancelled():
            closed = journey.result()
        if closed is not None:
            self._emit(closed)

    async def _hand_over(
        self, sequence: Sequence, under_way: asyncio.Task[Delivered] | None
    ) -> RequestClosed | None:
        with_insert, started = self._phases.handoff is Handoff.TRANSFER_WITH_INSERT, self._clock.now()
        try:
            if under_way is None:
                done = await self._carrier.hand_over(sequence, with_insert=with_insert)
            else:
                done = await under_way
        except MemServeError as error:
            self._emit(RequestError(sequence.request, type(error).__name__, str(error)))
            return RequestClosed(sequence.request, self._instance)
        told = self._heads.record(sequence, done, self._clock.now() - started)
        self._trace(sequence, "mempool.transfer", told)
        return None

    async def _send_back(self, sequence: Sequence) -> RequestClosed:
        sent = 0
        try:
            sent = await self._backflow.send_rest(sequence)
            self._trace(sequence, "mempool.backflow", f"sent back: {sent} bytes in all")
        except MemServeError as error:
            log.info("the answer's KV of %s did not go back: %s", sequence.request, error)
        return RequestClosed(sequence.request, self._instance, sent)
