"""What a decision saw: kept as it was, and put into words only when somebody asks. Pure.

Most decisions are never asked about, so deciding pays for references and a few array rows, not for the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from memserve.core.types import InstanceId, Role, StepPrices
from memserve.scheduler.costs import prefill_work
from memserve.scheduler.fleet import stretch_of
from memserve.scheduler.holdings import Holdings
from memserve.scheduler.places import InstanceState, Leg, Places, View
from memserve.scheduler.policies import MAX_CANDIDATES, Choice, Figures, Plan, Query, Weighed


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A place as it looked at the time of the decision.

    ``queued_tokens`` are ahead of the request: prompt tokens to compute where it would prefill, tokens
    of context to read in each step where it would decode. ``context_tokens`` are read there by what decodes.
    In seconds, where it would prefill: ``wait`` until its turn or until KV has been fetched, ``fetch`` among
    that for ``fetch_tokens`` tokens, ``prefill``; where it would decode: ``fetch`` to bring the KV there.
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

    @property
    def ttft(self) -> float:
        """Seconds to the first token, were it prefilled here."""
        return (self.wait or 0.0) + (self.prefill or 0.0)


class Seen(NamedTuple):
    """A place as the decision saw it; ``figures`` where seconds were compared."""

    place: InstanceState
    view: View
    figures: Figures | None

    def prefill(self, prompt: int, computed: int, prices: StepPrices) -> float:
        """Seconds to prefill beside the streams that were seen, of which ``computed`` tokens are there."""
        place, load = self.place, self.view.load
        work = prefill_work(prices, place.step_tokens, prompt, min(computed, prompt - 1))
        return work * stretch_of(
            prices, place.step_tokens, place.target_tpot, load.streams, load.context_tokens
        )


class Looked(NamedTuple):
    """The places of a leg that were looked at, in any order, perhaps one twice."""

    places: Sequence[InstanceState] = ()
    views: Sequence[View] = ()
    weighed: Weighed | None = None

    def seen(self) -> list[Seen]:
        """In the same order."""
        figures = self.weighed.figures() if self.weighed else [None] * len(self.places)
        return [Seen(*each) for each in zip(self.places, self.views, figures, strict=True)]

    def order(self) -> list[int]:
        """Positions, each place once, by id."""
        at = {place.instance: position for position, place in enumerate(self.places)}
        return [at[name] for name in sorted(at)]


_NOTHING = Looked()


class Record(NamedTuple):
    """The places of a decision about a prompt of ``prompt`` tokens: those taken, and those looked at.

    ``decode`` None: where it prefills. ``there`` and ``held`` as in ``Query``.
    """

    prompt: int
    now: float
    there: Holdings
    held: Holdings
    prefill: InstanceState
    first: Looked
    decode: InstanceState | None = None
    second: Looked = _NOTHING

    def prefill_candidates(self) -> tuple[Candidate, ...]:
        """Where the request could prefill."""
        seen = self.first.seen()
        return tuple(self.candidate(seen[at], Leg.PREFILL) for at in self.first.order())

    def decode_candidates(self) -> tuple[Candidate, ...]:
        """Where it could decode then; none if it stays where it prefills."""
        seen = self.second.seen()
        return tuple(self.candidate(seen[at], Leg.DECODE) for at in self.second.order())

    def candidate(self, seen: Seen, leg: Leg) -> Candidate:
        """A place that was seen, for people."""
        decodes, place, view, figures = leg is Leg.DECODE, seen.place, seen.view, seen.figures
        load = view.load
        matched, fetched, fetch = self.held.tokens(place.instance), 0, figures.fetch if figures else None
        if figures and figures.tier >= 0:
            fetched = min(self.there.tiers[figures.tier].tokens, self.prompt - 1)
        wait = prefill = None
        if not decodes:
            wait = max(view.free_at - self.now, fetch or 0.0)
            prefill = seen.prefill(self.prompt, max(matched, fetched), view.prices)
        return Candidate(
            place.instance,
            view.role,
            matched,
            load.context_tokens if decodes else load.prefill_tokens,
            load.requests,
            load.context_tokens,
            place is (self.decode if decodes else self.prefill),
            wait,
            fetch,
            prefill,
            figures.total if figures else None,
            fetched,
        )


def take_record(query: Query, plan: Plan) -> Record:
    """Keep what ``plan`` was chosen from, before anything is booked."""
    prompt, now, there, held = query.prompt, query.now, query.there, query.held
    prefill, decode = plan.prefill, plan.decode
    if plan.prefill_weighed is None:
        first = _look_at(query.prefill, held, prefill)
    else:
        first = _look_at_weighed(query.start.instances, plan.prefill_weighed)
    if decode is None:
        return Record(prompt, now, there, held, prefill.place, first)
    if plan.decode_weighed is None:
        second = _look_at(query.decode, held, decode)
    else:
        second = _look_at_weighed(query.decode.instances, plan.decode_weighed)
    return Record(prompt, now, there, held, prefill.place, first, decode.place, second)


def _look_at(places: Places, held: Holdings, choice: Choice) -> Looked:
    instances: Sequence[InstanceState] = places.instances
    if len(instances) > MAX_CANDIDATES:
        instances = _worth_a_look(places, held, choice)
    return Looked(instances, [place.view for place in instances])


def _look_at_weighed(instances: Sequence[InstanceState], weighed: Weighed) -> Looked:
    places = [instances[number] for number in weighed.numbers]
    return Looked(places, [place.view for place in places], weighed)


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
