"""Requests that wait, and whose turn it is: deficit round robin over tenants, urgency and age in each. Pure.

Knows neither limits nor instances nor time. Source: Shreedhar and Varghese, "Efficient fair queuing using
deficit round robin", 1995; tokens here are what bytes are there.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memserve.core.types import RequestId

QUANTUM = 64
"""Tokens that a tenant of weight 1 may take in each round; rounds in which nobody goes cost nothing."""
PATIENCE_EQUAL = 1
PATIENCE_URGENT = 8
"""So many times its own tokens a tenant's oldest request lets others pass: equally urgent, and more so."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the line. ``tokens`` of prompt and expected answer; a lower ``priority`` goes earlier."""

    request: RequestId
    tenant: str
    tokens: int
    priority: int = 0
    since: float = 0.0


class Lane:
    """One tenant's requests.

    The most urgent goes first, of these the shortest; but the oldest of all is passed by no more than
    ``PATIENCE_URGENT`` times its tokens, and one request.
    """

    __slots__ = ("_by_age", "_by_urgency", "_joined", "_passed", "deficit", "tokens", "visited", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.tokens = 0
        self.deficit = 0.0
        self.visited = False
        """Whether it has had this round's quantum."""
        self._by_age: OrderedDict[RequestId, Waiting] = OrderedDict()
        self._by_urgency: list[tuple[int, int, int, Waiting]] = []
        """A heap; those that have left stay in it until they come up."""
        self._joined = 0
        self._passed = 0
        """Tokens taken since the oldest last was."""

    def __len__(self) -> int:
        return len(self._by_age)

    def __iter__(self) -> Iterator[Waiting]:
        """From the oldest on."""
        return iter(self._by_age.values())

    def add(self, waiting: Waiting) -> None:
        self._joined += 1
        self.tokens += waiting.tokens
        self._by_age[waiting.request] = waiting
        heapq.heappush(self._by_urgency, (waiting.priority, waiting.tokens, self._joined, waiting))

    def peek(self) -> Waiting:
        """Whose turn it is."""
        oldest, urgent = self._oldest(), self._most_urgent()
        patience = PATIENCE_EQUAL if oldest.priority == urgent.priority else PATIENCE_URGENT
        return oldest if self._passed >= patience * oldest.tokens else urgent

    def take(self, waiting: Waiting) -> None:
        """``waiting`` was its turn and goes."""
        self._passed = 0 if waiting is self._oldest() else self._passed + waiting.tokens
        self.remove(waiting.request)
        self.deficit -= waiting.tokens

    def remove(self, request: RequestId) -> Waiting:
        waiting = self._by_age.pop(request)
        self.tokens -= waiting.tokens
        if len(self._by_urgency) > 2 * len(self._by_age) + 8:
            self._by_urgency = [each for each in self._by_urgency if self._waits(each[-1])]
            heapq.heapify(self._by_urgency)
        return waiting

    def _oldest(self) -> Waiting:
        return next(iter(self._by_age.values()))

    def _most_urgent(self) -> Waiting:
        while not self._waits(self._by_urgency[0][-1]):
            heapq.heappop(self._by_urgency)
        return self._by_urgency[0][-1]

    def _waits(self, waiting: Waiting) -> bool:
        return self._by_age.get(waiting.request) is waiting


class FairQueue:
    """The whole line. ``weight`` of a tenant: its part of the tokens beside others that wait, positive.

    While two tenants wait, the tokens that each has had, divided by its weight, differ by at most
    ``QUANTUM`` and the largest request of each, divided likewise.
    """

    def __init__(self, weight: Callable[[str], float]) -> None:
        self.weight = weight
        self._lanes: dict[str, Lane] = {}
        self._round: deque[Lane] = deque()
        self._tenants: dict[RequestId, str] = {}
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._tenants)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._tenants

    def lanes(self) -> dict[str, Lane]:
        """Tenants that wait; read only."""
        return self._lanes

    def add(self, waiting: Waiting) -> None:
        """Put a request that does not wait yet into its tenant's lane."""
        assert waiting.request not in self._tenants, f"{waiting.request} waits already"
        lane = self._lanes.get(waiting.tenant)
        if lane is None:
            lane = self._lanes[waiting.tenant] = Lane(self.weight(waiting.tenant))
            self._round.append(lane)
        lane.add(waiting)
        self._tenants[waiting.request] = waiting.tenant
        self.tokens += waiting.tokens

    def discard(self, request: RequestId) -> None:
        """Let a request go that is not wanted any more; unknown ones are ignored."""
        tenant = self._tenants.get(request)
        if tenant is not None:
            self._left(self._lanes[tenant].remove(request))

    def take(self) -> Waiting | None:
        """Remove and return the request whose turn it is; None when nobody waits."""
        waiting = self.peek()
        if waiting is not None:
            self._lanes[waiting.tenant].take(waiting)
            self._left(waiting)
        return waiting

    def peek(self) -> Waiting | None:
        """The request whose turn it is, unless others come or go before it is taken."""
        if not self._round:
            return None
        first = self._round[0]
        if first.visited and first.peek().tokens <= first.deficit:
            return first.peek()
        self._skip_rounds()
        while True:
            lane = self._round[0]
            if not lane.visited:
                lane.visited = True
                lane.deficit += QUANTUM * lane.weight
            waiting = lane.peek()
            if waiting.tokens <= lane.deficit:
                return waiting
            lane.visited = False
            self._round.rotate(-1)

    def check(self) -> None:
        """Raise ``AssertionError`` if the parts contradict each other."""
        assert set(self._round) == set(self._lanes.values()), "a lane is not in the round"
        assert len(self._round) == len(self._lanes), "a lane is in the round twice"
        held = {each.request: tenant for tenant, lane in self._lanes.items() for each in lane}
        assert held == self._tenants, "lanes hold others than those who wait"
        assert self.tokens == sum(lane.tokens for lane in self._lanes.values()), "tokens do not add up"
        for tenant, lane in self._lanes.items():
            assert len(lane), f"{tenant}'s lane is empty"
            assert lane.tokens == sum(each.tokens for each in lane), f"{tenant}: tokens do not add up"
            assert lane.deficit >= 0, f"{tenant}: deficit {lane.deficit}"

    # --- inside ---

    def _skip_rounds(self) -> None:
        """Pass in one go the rounds in which nobody would have saved enough."""
        missing = (
            math.ceil((lane.peek().tokens - lane.deficit) / (QUANTUM * lane.weight)) for lane in self._round
        )
        rounds = min(missing) - 1
        if rounds > 0:
            for lane in self._round:
                lane.deficit += rounds * QUANTUM * lane.weight

    def _left(self, waiting: Waiting) -> None:
        """Its lane has no longer ``waiting``; an empty lane takes no deficit along."""
        del self._tenants[waiting.request]
        self.tokens -= waiting.tokens
        lane = self._lanes[waiting.tenant]
        if not len(lane):
            del self._lanes[waiting.tenant]
            self._round.remove(lane)
