"""What a decision saw: kept as it was, and put into words only when somebody asks. Pure.

Most decisions are never asked about, so deciding pays for references and a few array rows, not for the words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import msgspec
import numpy as np

from memserve.core.types import InstanceId, Role, StepPrices
from memserve.scheduler.costs import prefill_work
from memserve.scheduler.fleet import Indices, stretch_of
from memserve.scheduler.policies import Choice, Plan, Query, Weighed
from memserve.scheduler.state import InstanceState, Leg, Places, Work
from memserve.scheduler.tree import Holdings

MAX_CANDIDATES = 8
"""Candidates recorded per leg: all of a small cluster, of a large one those that explain the choice."""


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
    """What of a place changes later."""

    place: InstanceState
    role: Role
    load: Work
    free_at: float
    prices: StepPrices

    def prefill(self, prompt: int, computed: int, prices: StepPrices) -> float:
        """Seconds to prefill beside the streams that were seen, of which ``computed`` tokens are there."""
        place, load = self.place, self.load
        work = prefill_work(prices, place.step_tokens, prompt, min(computed, prompt - 1))
        return work * stretch_of(
            prices, place.step_tokens, place.target_tpot, load.streams, load.context_tokens
        )


@dataclass(frozen=True, slots=True, eq=False)
class LegRecord:
    """The places of one leg, ordered by id, with a row of ``weighed`` each if the policy weighed seconds."""

    leg: Leg
    chosen: InstanceState
    seen: tuple[Seen, ...]
    weighed: Weighed | None


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """Both legs of a decision about a prompt of ``prompt`` tokens; ``decode`` None: where it prefills."""

    prompt: int
    now: float
    held: Holdings
    prefill: LegRecord
    decode: LegRecord | None

    def prefill_candidates(self) -> tuple[Candidate, ...]:
        """Where the request could prefill."""
        return tuple(self._candidate(self.prefill, row) for row in range(len(self.prefill.seen)))

    def decode_candidates(self) -> tuple[Candidate, ...]:
        """Where it could decode then; none if it stays where it prefills."""
        leg = self.decode
        return () if leg is None else tuple(self._candidate(leg, row) for row in range(len(leg.seen)))

    def _candidate(self, leg: LegRecord, row: int) -> Candidate:
        seen, decodes = leg.seen[row], leg.leg is Leg.DECODE
        place, load = seen.place, seen.load
        matched = self.held.tokens(place.instance)
        wait = prefill = fetch = total = None
        if leg.weighed is not None:
            fetch, total = float(leg.weighed.fetch[row]), float(leg.weighed.total[row])
        if not decodes:
            wait = max(seen.free_at - self.now, fetch or 0.0)
            fetched = self._fetched(leg.weighed, row)
            prefill = seen.prefill(self.prompt, max(matched, fetched), seen.prices)
        return Candidate(
            place.instance,
            seen.role,
            matched,
            load.context_tokens if decodes else load.prefill_tokens,
            load.requests,
            load.context_tokens,
            place is leg.chosen,
            wait,
            fetch,
            prefill,
            total,
            0 if decodes else self._fetched(leg.weighed, row),
        )

    def _fetched(self, weighed: Weighed | None, row: int) -> int:
        if weighed is None or weighed.tier is None or weighed.tier[row] < 0:
            return 0
        return min(self.held.tiers[int(weighed.tier[row])].tokens, self.prompt - 1)


def take_record(query: Query, plan: Plan) -> Record:
    """Keep what ``plan`` was chosen from, before anything is booked."""
    first = query.prefill if plan.prefill_weighed is None else query.start
    decode = None
    if plan.decode is not None:
        decode = _keep(Leg.DECODE, query.decode, query.held, plan.decode, plan.decode_weighed)
    return Record(
        query.prompt,
        query.now,
        query.held,
        _keep(Leg.PREFILL, first, query.held, plan.prefill, plan.prefill_weighed),
        decode,
    )


def _keep(leg: Leg, places: Places, held: Holdings, choice: Choice, weighed: Weighed | None) -> LegRecord:
    chosen, instances = choice.place, places.instances
    if len(instances) <= MAX_CANDIDATES:
        return LegRecord(leg, chosen, _look_at(instances), weighed)
    if weighed is None:
        return LegRecord(leg, chosen, _look_at(_select(places, held, choice)), None)
    rows = _cheapest(weighed)
    return LegRecord(leg, chosen, _look_at([instances[row] for row in rows.tolist()]), weighed.take(rows))


def _look_at(places: tuple[InstanceState, ...] | list[InstanceState]) -> tuple[Seen, ...]:
    return tuple([Seen(one, one.role, one.load, one.line.free_at, one.prices) for one in places])


def _cheapest(weighed: Weighed) -> Indices:
    """Rows of the chosen one and the cheapest others, in order of id."""
    best = weighed.total.argmin()
    rows = np.argpartition(weighed.total, MAX_CANDIDATES)[:MAX_CANDIDATES]
    # Of equals the first is chosen, and any may be among the cheapest.
    if best not in rows:
        rows[0] = best
    rows.sort()
    return rows


def _select(places: Places, held: Holdings, choice: Choice) -> list[InstanceState]:
    """The chosen one, what the reason speaks of, and a longest holder; ordered by id."""
    longest = next((place for name in _longest(held) if (place := places.by_id.get(name))), None)
    selected = [choice.place]
    for place in (longest, *choice.considered):
        if place is not None and place not in selected and len(selected) < MAX_CANDIDATES:
            selected.append(place)
    return sorted(selected, key=_by_id)


def _by_id(place: InstanceState) -> InstanceId:
    return place.instance


def _longest(held: Holdings) -> Iterator[InstanceId]:
    """Names of holders, longest prefix first."""
    return chain.from_iterable(tier.instances() for tier in held.tiers)
