"""What a decision saw: kept as it was, and put into words only when somebody asks. Pure.

Most decisions are never asked about, so deciding pays for references, not for the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from memserve.core.types import InstanceId, Role, StepPrices
from memserve.scheduler.costs import prefill_work, use_lowered_at
from memserve.scheduler.fleet import stretch_of
from memserve.scheduler.holdings import Holdings
from memserve.scheduler.places import InstanceState, Leg, Places, View
from memserve.scheduler.policies import MAX_CANDIDATES, Choice, Figures, Plan, Query, Weighed


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A place as it looked at the time of the decision.

    ``queued_tokens`` are ahead of the request: prompt tokens to compute where it would prefill, tokens
    of context to read in each step where it would decode. ``context_tokens`` are read there by what decodes.
    In seconds, where it would prefill: ``wait`` until its turn or until KV has been fetched, ``fetch`` among
    that for ``fetch_tokens`` tokens, ``prefill``, ``swap`` among that to bring up what lies below the device;
    where it would decode: ``fetch`` to bring the KV there.
    ``total`` is what the policy compared, where it compares seconds.
    """

    instance: InstanceId
    role: Role
    matched_tokens: int
    queued_tokens: int
    running: int
    context_tokens: int
    chosen: bool
    wait: float | None = None
    fetch: float | None = None
    prefill: float | None = None
    total: float | None = None
    fetch_tokens: int = 0
    swap: float = 0.0

    @property
    def ttft(self) -> float:
        """Seconds to the first token, were it prefilled here."""
        return (self.wait or 0.0) + (self.prefill or 0.0)


class Seen(NamedTuple):
    """A place as the decision saw it; ``figures`` where seconds were compared."""

    view: View
    figures: Figures | None

    def use(self, prompt: int, held: int, on_device: int, fetched: int) -> tuple[int, float]:
        """Tokens that need not be computed, and seconds to swap in those below the device."""
        view, most = self.view, prompt - 1
        held, on_device = min(held, most), min(on_device, most)
        return use_lowered_at(view.prices, view.place.step_tokens, view.swap, held, on_device, fetched)

    def prefill(self, prompt: int, computed: int, prices: StepPrices) -> float:
        """Seconds to prefill beside the streams that were seen, of which ``computed`` tokens are there."""
        place, load = self.view.place, self.view.load
        work = prefill_work(prices, place.step_tokens, prompt, min(computed, prompt - 1))
        return work * stretch_of(
            prices, place.step_tokens, place.target_tpot, load.streams, load.context_tokens
        )


class Record(NamedTuple):
    """A decision's question and answer, and the places that it was chosen from as they were.

    ``prefill_views`` and ``decode_views`` are in any order, perhaps with one twice; the latter are none where
    a request stays where it prefills.
    """

    query: Query
    plan: Plan
    prefill_views: Sequence[View]
    decode_views: Sequence[View] = ()

    def prefill_seen(self) -> list[Seen]:
        """In the order of ``prefill_views``."""
        return _seen(self.prefill_views, self.plan.prefill_weighed)

    def prefill_candidates(self) -> tuple[Candidate, ...]:
        """Where the request could prefill."""
        seen = self.prefill_seen()
        return tuple(self.candidate(seen[at], Leg.PREFILL) for at in order_of(self.prefill_views))

    def decode_candidates(self) -> tuple[Candidate, ...]:
        """Where it could decode then."""
        seen = _seen(self.decode_views, self.plan.decode_weighed)
        return tuple(self.candidate(seen[at], Leg.DECODE) for at in order_of(self.decode_views))

    def candidate(self, seen: Seen, leg: Leg) -> Candidate:
        """A place that was seen, for people."""
        query, view, figures, decodes = self.query, seen.view, seen.figures, leg is Leg.DECODE
        place, load = view.place, view.load
        choice = self.plan.decode if decodes else self.plan.prefill
        matched, fetched, fetch = query.held.tokens(place.instance), 0, figures.fetch if figures else None
        if figures and figures.tier >= 0:
            fetched = min(query.there.device_tiers()[figures.tier].tokens, query.prompt - 1)
        wait, prefill, swap = None, None, 0.0
        if not decodes:
            wait = max(view.free_at - query.now, fetch or 0.0)
            used, swap = seen.use(query.prompt, matched, query.held.on_device(place.instance), fetched)
            prefill = seen.prefill(query.prompt, used, view.prices) + swap
        return Candidate(
            place.instance,
            view.role,
            matched,
            load.context_tokens if decodes else load.prefill_tokens,
            load.requests,
            load.context_tokens,
            choice is not None and choice.place is place,
            wait,
            fetch,
            prefill,
            figures.total if figures else None,
            fetched,
            swap,
        )


def order_of(views: Sequence[View]) -> list[int]:
    """Positions in ``views``, each place once, by id."""
    at = {view.place.instance: position for position, view in enumerate(views)}
    return [at[name] for name in sorted(at)]


def _seen(views: Sequence[View], weighed: Weighed | None) -> list[Seen]:
    figures = weighed.figures() if weighed else [None] * len(views)
    return [Seen(*each) for each in zip(views, figures, strict=True)]


def take_record(query: Query, plan: Plan) -> Record:
    """Keep what ``plan`` was chosen from, before anything is booked. References only: most are never read."""
    first = _look(query.prefill, query.start, query.held, plan.prefill, plan.prefill_weighed)
    if plan.decode is None:
        return Record(query, plan, first)
    second = _look(query.decode, query.decode, query.held, plan.decode, plan.decode_weighed)
    return Record(query, plan, first, second)


def _look(
    asked: Places, weighed_of: Places, held: Holdings, choice: Choice, weighed: Weighed | None
) -> Sequence[View]:
    if weighed is not None:
        instances = weighed_of.instances
        return [instances[number].view for number in weighed.numbers]
    few = len(asked.instances) <= MAX_CANDIDATES
    return [place.view for place in (asked.instances if few else _worth_a_look(asked, held, choice))]


def _worth_a_look(places: Places, held: Holdings, choice: Choice) -> list[InstanceState]:
    """The chosen place, a longest holder, and what the reason speaks of."""
    found = [choice.place]
    for tier in held.tiers:
        mask = tier.mask & places.mask
        if mask:
            lowest = (mask & -mask).bit_length() - 1
            found.append(places.by_id[tier.numbering.names[lowest]])
            break
    found += choice.considered[: MAX_CANDIDATES - len(found)]
    return found
