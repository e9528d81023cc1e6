"""The line in front of the instances: who may join, when it moves, how long one waits in it. Pure.

Requests stay here while instances have enough to do, so that whose turn it is can still be decided.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from memserve.core.errors import Overloaded, Refusal
from memserve.core.types import InstanceId, Role
from memserve.scheduler.fair_queue import FairQueue, Lane, Waiting
from memserve.scheduler.places import InstanceState, Leg
from memserve.scheduler.state import SchedulerState

LEAD_STEPS = 2
"""Behind the prompt that it computes, an instance has so many steps of work: one to begin at once, and one
while it is told that the first is done and the next request is on its way."""
_SPARE_PART = 8
"""The part of its KV that an instance keeps free for what comes, where that is less than its steps bring."""
_KEPT = 0.95
"""What a take leaves of the weight of those before it in the pace of the line."""
_ENOUGH = 4
"""Takes that must have been seen before they say more than the instances' prices do."""
_OTHERS = "(others)"
_TENANTS_COUNTED = 256


@dataclass(frozen=True, slots=True)
class LineLimits:
    """Most that may wait, of all tenants and of each: requests, and tokens of prompts and answers.

    ``max_running``: streams that one instance runs at a time.
    """

    requests: int = 1024
    tokens: int = 4 << 20
    tenant_requests: int = 256
    tenant_tokens: int = 1 << 20
    max_running: int = 64


@dataclass(slots=True)
class Waits:
    """Requests of a tenant that have waited and gone, and the seconds of their waits, summed."""

    requests: int = 0
    seconds: float = 0.0


def is_served(state: SchedulerState) -> bool:
    """Whether there is anybody to prefill and anybody to decode."""
    return bool(state.places(Leg.PREFILL).instances and state.places(Leg.DECODE).instances)


class Room:
    """Whether one more request keeps an instance busy that could have nothing to do otherwise.

    Some place has less than ``LEAD_STEPS`` steps of prompts behind the one it computes, and some place to
    decode has a stream to spare, and KV for as many tokens, or an eighth of its KV. Policies that crowd one
    place find the other ones open; they are stopped at twice the streams that all can run.

    Where no place to prefill has room, a decode instance may have: for the next one, if the policy would let
    that begin there. Others who only find it open would pile up elsewhere.

    It has to be told where something changes, and then looks there only: a place that had no room has none
    until then.
    """

    def __init__(self, state: SchedulerState, max_running: int) -> None:
        self._state = state
        self._max_running = max_running
        self._prefill: dict[InstanceId, None] = {}
        self._decode: dict[InstanceId, None] = {}
        self._helpers: dict[InstanceId, None] = {}
        """Who may have room, in the order in which they are to be looked at."""

    def look_at(self, instance: InstanceId) -> None:
        """Something has changed there."""
        self._prefill[instance] = self._decode[instance] = self._helpers[instance] = None

    def look_everywhere(self) -> None:
        """Who there is, or what they do, has changed."""
        self._prefill = dict.fromkeys(self._state.places(Leg.PREFILL).by_id)
        self._decode = dict.fromkeys(self._state.places(Leg.DECODE).by_id)
        self._helpers = self._decode.copy()

    def is_left(self, in_flight: int, where: Callable[[], InstanceId]) -> bool:
        """Whether there is room with so many streams under way.

        ``where``: at which place the next one would begin. Asked only where that matters.
        """
        prefill, decode = self._state.places(Leg.PREFILL).by_id, self._state.places(Leg.DECODE).by_id
        return (
            in_flight < 2 * self._max_running * len(decode)
            and _find_open(self._decode, decode, self._decodes_soon)
            and (_find_open(self._prefill, prefill, _prefills_soon) or self._is_helped(decode, where))
        )

    def _is_helped(self, decode: dict[InstanceId, InstanceState], where: Callable[[], InstanceId]) -> bool:
        if not _find_open(self._helpers, decode, _helps_soon):
            return False
        chosen = decode.get(where())
        if chosen is not None and _helps_soon(chosen):
            return True
        self._helpers.clear()
        return False

    def _decodes_soon(self, place: InstanceState) -> bool:
        report = place.report
        running = place.booked.requests if place.role is Role.COLOCATED else place.load.streams
        if not running:
            return True
        used = (report.active_blocks + report.incoming_blocks) * place.block_tokens
        # Small pools could never hold as much beside what runs.
        spare = min(LEAD_STEPS * place.step_tokens, place.capacity // _SPARE_PART)
        return running < self._max_running and used + spare <= place.capacity


class WaitingLine:
    """A fair queue with limits, and its pace. ``waits`` by tenant and ``refusals`` are kept for metrics."""

    def __init__(self, limits: LineLimits, queue: FairQueue) -> None:
        self.limits = limits
        self.queue = queue
        self.pace = Pace()
        self.waits: dict[str, Waits] = {}
        self.refusals: Counter[Refusal] = Counter()

    def __len__(self) -> int:
        return len(self.queue)

    def join(self, waiting: Waiting, prior: float) -> None:
        """Let a request wait. Raises ``Overloaded`` where there is no place for it.

        ``prior``: tokens per second that the instances take by their prices.
        """
        limits, lane = self.limits, self.queue.lanes().get(waiting.tenant)
        if lane is not None and _is_full(
            len(lane), lane.tokens + waiting.tokens, limits.tenant_requests, limits.tenant_tokens
        ):
            whose, reason = f"tenant {waiting.tenant!r} has", Refusal.TENANT_QUEUE_FULL
            held, tokens = len(lane), lane.tokens
        elif len(self.queue) and _is_full(
            len(self.queue), self.queue.tokens + waiting.tokens, limits.requests, limits.tokens
        ):
            whose, reason = "there are", Refusal.QUEUE_FULL
            held, tokens = len(self.queue), self.queue.tokens
        else:
            if not len(self.queue):
                self.pace.start(waiting.since)
            self.queue.add(waiting)
            return
        raise self.refuse(
            reason,
            f"{whose} {held} requests of {tokens} tokens waiting already, which is the limit. "
            "Remedy: try again after the seconds in Retry-After, or send fewer at a time.",
            waiting.tokens / self._rate(waiting.tenant, prior),
        )

    def require_in_time(
        self, waiting: Waiting, slo: float, prior: float, service: float, *, at_once: bool
    ) -> None:
        """Raise ``Overloaded`` if the first token would come later than ``slo`` seconds from now.

        ``service``: seconds until then from when the request is sent; ``at_once``: which is now.
        """
        predicted = service + (0.0 if at_once else self.predict_wait(waiting, prior))
        if predicted > slo:
            raise self.refuse(
                Refusal.SLO_TTFT,
                f"the first token would come after about {predicted:.1f} s and was asked for within "
                f"{slo:g} s. Remedy: try again after the seconds in Retry-After, or allow more time "
                "(x-memserve-slo-ttft).",
                predicted - slo,
            )

    def refuse(self, reason: Refusal, message: str, retry_after: float) -> Overloaded:
        """The error for a request that is not taken, counted."""
        self.refusals[reason] += 1
        return Overloaded(message, reason=reason, retry_after=retry_after)

    def take(self, now: float) -> Waiting | None:
        """The request whose turn it is leaves to be sent."""
        waiting = self.queue.take()
        if waiting is not None:
            self.pace.learn(waiting.tokens, now, last=not len(self.queue))
            waits = self._waits_of(waiting.tenant)
            waits.requests += 1
            waits.seconds += now - waiting.since
        return waiting

    def leave(self, waiting: Waiting) -> None:
        """The request is not wanted any more, or has been taken."""
        self.queue.discard(waiting.request)
        if not len(self.queue):
            self.pace.stop()

    def predict_wait(self, waiting: Waiting, prior: float) -> float:
        """Seconds in line of a request that joined now.

        What its tenant has before it, and what others get meanwhile by their weights, at the line's pace.
        """
        lanes = self.queue.lanes()
        own = lanes.get(waiting.tenant)
        before = waiting.tokens + _tokens_before(own, waiting.priority)
        weight = self.queue.weight(waiting.tenant)
        others = sum(
            min(lane.tokens, before * lane.weight / weight) for lane in lanes.values() if lane is not own
        )
        return (before + others) / self.pace.rate(prior)

    def _rate(self, tenant: str, prior: float) -> float:
        """Tokens per second that a tenant gets beside those that wait now."""
        weight = self.queue.weight(tenant)
        others = sum(lane.weight for name, lane in self.queue.lanes().items() if name != tenant)
        return self.pace.rate(prior) * weight / (weight + others)

    def _waits_of(self, tenant: str) -> Waits:
        # Names come from clients: as many as they like must not take memory for good.
        known = tenant in self.waits or len(self.waits) < _TENANTS_COUNTED
        return self.waits.setdefault(tenant if known else _OTHERS, Waits())


@dataclass(slots=True)
class Pace:
    """How fast the line moves while somebody waits: tokens per second, of late."""

    _tokens: float = 0.0
    _seconds: float = 0.0
    _takes: int = 0
    _since: float | None = field(default=None)

    def start(self, now: float) -> None:
        """Somebody waits from now on."""
        self._since = now

    def stop(self) -> None:
        """Nobody waits any more."""
        self._since = None

    def learn(self, tokens: int, now: float, *, last: bool) -> None:
        """A request of ``tokens`` went; ``last``: nobody waits behind it."""
        if self._since is not None:
            self._tokens = _KEPT * self._tokens + tokens
            self._seconds = _KEPT * self._seconds + now - self._since
            self._takes += 1
        self._since = None if last else now

    def rate(self, prior: float) -> float:
        """Tokens per second; ``prior`` while too little has been seen."""
        if self._takes < _ENOUGH or self._seconds <= 0:
            return prior
        return self._tokens / self._seconds


def price_rate(state: SchedulerState) -> float:
    """Prompt tokens per second that all who prefill compute by the prices of their steps."""
    places = state.fleet.at(state.places(Leg.PREFILL).slots)
    rate = float((1.0 / (places.token * places.stretch)).sum())
    return rate if math.isfinite(rate) and rate > 0 else 1.0


def _prefills_soon(place: InstanceState) -> bool:
    # Steps as the engine makes them: beside streams they hold fewer prompt tokens than they could.
    lead = LEAD_STEPS * place.step_ahead(math.inf)
    return place.line.behind_first(lead) < lead


def _helps_soon(place: InstanceState) -> bool:
    return not place.role.prefills and _prefills_soon(place)


def _find_open(
    candidates: dict[InstanceId, None],
    places: dict[InstanceId, InstanceState],
    is_open: Callable[[InstanceState], bool],
) -> bool:
    """Whether a candidate is open; those before it, which are not, are candidates no longer."""
    while candidates:
        name = next(iter(candidates))
        place = places.get(name)
        if place is not None and is_open(place):
            return True
        del candidates[name]
    return False


def _is_full(requests: int, tokens: int, most_requests: int, most_tokens: int) -> bool:
    return requests >= most_requests or tokens > most_tokens


def _tokens_before(lane: Lane | None, priority: int) -> int:
    return 0 if lane is None else sum(each.tokens for each in lane if each.priority <= priority)
