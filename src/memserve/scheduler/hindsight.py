"""What a decision turned out to be worth, once its first token is there: regret. Pure.

Every recorded place is priced again with what has become known by then; docs/scheduling.md has the formula
and what it leaves out. Knows nothing of what an answer cost after its first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from memserve.core.types import InstanceId
from memserve.scheduler.costs import Wire
from memserve.scheduler.decision import Decision
from memserve.scheduler.holdings import Holdings
from memserve.scheduler.line import Mark
from memserve.scheduler.places import Leg
from memserve.scheduler.record import Candidate, Record, Seen, order_of


class Hindsight(msgspec.Struct, frozen=True, gc=False):
    """What a place would have cost, as known at the first token; seconds.

    ``waited``: until the requests ahead there were done; ``still_busy``: they were not by then, and it is at
    least that. ``ttft``: time to the first token; ``total``: what the policy compares, with that in it.
    """

    instance: InstanceId
    chosen: bool
    waited: float
    still_busy: bool
    cached_tokens: int
    fetch: float
    prefill: float
    ttft: float
    total: float | None


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What happened; seconds. ``cached_tokens`` by the request's ledger, None where that is not known.

    ``error``: of the predicted time to the first token, relative. ``unexplained``: what of the actual time is
    in no term, at the chosen place, and taken to be the same at the others. ``regret``: how much sooner the
    first token had come from ``best``; ``regret_total``: the same of what the policy compares.
    """

    ttft: float
    cached_tokens: int | None
    error: float
    unexplained: float
    regret: float
    regret_total: float | None
    best: InstanceId
    places: tuple[Hindsight, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """What the first token's arrival at ``now`` makes known.

    ``ends``: of the lines at the recorded places (``Record.prefill_views``), None where the place is lost;
    ``held``: what places hold of the prompt by now; ``cached``: what the chosen one had of it.
    """

    now: float
    ends: Sequence[Mark | None]
    held: Holdings
    cached: int | None
    wire: Wire


def look_back(decision: Decision, record: Record, known: Known) -> Outcome:
    """Price the recorded places again. Never negative: the chosen one is among them."""
    actual = known.now - decision.decided_at
    places = []
    seen = record.prefill_seen()
    for at in order_of(record.prefill_views):
        one, end = record.candidate(seen[at], Leg.PREFILL), known.ends[at]
        if end is not None or one.chosen:
            places.append(_price(decision, seen[at], one, end, known))
    chosen = next(place for place in places if place.chosen)
    best = min(places, key=lambda place: place.ttft)
    totals = [place.total for place in places if place.total is not None]
    return Outcome(
        actual,
        known.cached,
        abs(decision.predicted_ttft - actual) / actual if actual > 0 else 0.0,
        actual - chosen.ttft,
        chosen.ttft - best.ttft,
        None if chosen.total is None else chosen.total - min(totals),
        best.instance if best.ttft < chosen.ttft else chosen.instance,
        tuple(places),
    )


def _price(decision: Decision, seen: Seen, one: Candidate, end: Mark | None, known: Known) -> Hindsight:
    actual, prompt = known.now - decision.decided_at, decision.prompt_tokens
    at = None if end is None else end.at
    waited = actual if at is None else max(at - decision.decided_at, 0.0)
    held = _held(decision, one, known)
    fetched = min(one.fetch_tokens, _fetchable(decision, known))
    fetch = known.wire.seconds(fetched - held)
    computed, swap = seen.use(prompt, held, _on_device(one, held, known), fetched)
    if one.chosen or one.instance == decision.decode:
        # It has brought up itself what it found below the device.
        swap = one.swap
    if one.chosen and known.cached is not None:
        computed = held
    prefill = seen.prefill(prompt, computed, seen.view.place.prices) + swap
    ttft = max(waited, fetch) + prefill
    if one.chosen:
        # Those behind may have overtaken those ahead: what did happen bounds what could.
        ttft = min(ttft, actual)
    total = None if one.total is None else one.total - one.ttft + ttft
    return Hindsight(
        one.instance,
        one.chosen,
        waited,
        at is None,
        min(computed, prompt - 1),
        fetch,
        prefill,
        ttft,
        total,
    )


def _held(decision: Decision, one: Candidate, known: Known) -> int:
    if one.chosen and known.cached is not None:
        return known.cached
    # Where the request itself has come by, what is there now may be its own.
    if one.chosen or one.instance == decision.decode:
        return one.matched_tokens
    return known.held.tokens(one.instance)


def _on_device(one: Candidate, held: int, known: Known) -> int:
    return min(known.held.on_device(one.instance), held)


def _fetchable(decision: Decision, known: Known) -> int:
    """The longest prefix that anybody had to send. What lies where the request has come by may be its own."""
    if known.cached is None:
        return decision.prompt_tokens
    own = (decision.prefill, decision.decode)
    for tier in known.held.device_tiers():
        if tier.tokens <= known.cached or any(name not in own for name in tier.instances()):
            return max(tier.tokens, known.cached)
    return known.cached


@dataclass(slots=True)
class RegretSum:
    """Outcomes of one policy's decisions, added up; ``others`` were better in so many. Seconds.

    ``totals`` counts those that compared seconds.
    """

    decisions: int = 0
    others: int = 0
    ttft: float = 0.0
    regret: float = 0.0
    totals: int = 0
    regret_total: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one more."""
        self.decisions += 1
        self.others += outcome.regret > 0
        self.ttft += outcome.ttft
        self.regret += outcome.regret
        if outcome.regret_total is not None:
            self.totals += 1
            self.regret_total += outcome.regret_total


@dataclass(slots=True)
class Regrets:
    """The sums by the policy's name."""

    by_policy: dict[str, RegretSum] = field(default_factory=dict)

    def add(self, policy: str, outcome: Outcome) -> None:
        """Count one more."""
        self.by_policy.setdefault(policy, RegretSum()).add(outcome)
