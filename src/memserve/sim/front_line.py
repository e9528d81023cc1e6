"""The line in front of simulated instances: the real queue and the real question whether there is room.

As a server keeps it (``server.front_line``), for one tenant and without bounds: who would be refused there
waits here. Simulated engines have no limit of streams, and so the line has none.
"""

from __future__ import annotations

from memserve.core.types import InstanceId, RequestId
from memserve.scheduler.admission import Room, is_served
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.fair_queue import FairQueue, Waiting
from memserve.scheduler.service import GlobalScheduler
from memserve.sim.journey import SPACE, Journey

_TENANT = "all"
_STREAMS = 1 << 30


class FrontLine:
    """Journeys that wait for their first attempt, in front of one scheduler's instances."""

    def __init__(self, scheduler: GlobalScheduler) -> None:
        self._scheduler = scheduler
        self._queue = FairQueue(lambda tenant: 1.0)
        self._room = Room(scheduler.state, _STREAMS)
        self._journeys: dict[RequestId, Journey] = {}

    def __len__(self) -> int:
        return len(self._journeys)

    def lets_through(self, journey: Journey, *, coming: bool) -> bool:
        """Whether it may begin at once, as nobody waits and there is room."""
        return not self._journeys and self._is_open(journey, 0, coming)

    def join(self, journey: Journey) -> None:
        """Let it wait for its turn."""
        request = RequestId(f"r{journey.outcome.number}")
        tokens = self._scheduler.tokens_of(journey.prompt, len(journey.answer))
        self._queue.add(Waiting(request, _TENANT, tokens, since=journey.outcome.at))
        self._journeys[request] = journey

    def take(self, *, coming: bool) -> Journey | None:
        """Whose turn it is, if there is room; ``coming``: whether a lost instance is on its way back."""
        first = self._queue.peek()
        if first is None or not self._is_open(self._journeys[first.request], len(self) - 1, coming):
            return None
        self._queue.take()
        return self._journeys.pop(first.request)

    def look_at(self, instance: InstanceId) -> None:
        """Something has changed there."""
        self._room.look_at(instance)

    def look_at_places(self, decision: Decision) -> None:
        """Something has ended where a request was sent."""
        self._room.look_at(decision.prefill)
        self._room.look_at(decision.decode or decision.prefill)

    def look_everywhere(self) -> None:
        """Who there is, or what they do, has changed."""
        self._room.look_everywhere()

    def _is_open(self, journey: Journey, behind: int, coming: bool) -> bool:
        if is_served(self._scheduler.state):
            return self._room.is_left(0, lambda: self._foresee(journey, behind).prefill)
        return not coming

    def _foresee(self, journey: Journey, behind: int) -> Decision:
        name = RequestId(f"r{journey.outcome.number}")
        request, answer = journey.request, len(journey.answer)
        return self._scheduler.foresee(
            RouteRequest(name, SPACE, journey.prompt, request.session, answer, behind)
        )
