"""What a decision saw: kept as it was, and put into words only when somebody asks. Pure.

Most decisions are never asked about, so deciding pays for references and a few array rows, not for the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from memserve.core.types import InstanceId, Role, StepPrices
from memserve.scheduler.costs import prefill_work, use_lowered_at
from memserve.scheduler.fleet import Floats, stretch_of
from memserve.scheduler.holdings import Holdings
from memserve.scheduler.policies import Choice, Plan, Query, Weighed
from memserve.scheduler.state import InstanceState, Leg, Places, Work

MAX_CANDIDATES = 8
"""Candidates recorded per leg: all of a small cluster, of a large one those that explain the choice."""
_CHEAPEST = 3
_CHEAPEST_TO_DECODE = 2
"""Of a large one where seconds were weighed: so many with the chosen one, which is the cheapest."""


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
    """A place as the decision saw it. The last three are those of ``Weighed``, None and -1 without that."""

    place: InstanceState
    role: Role
    load: Work
    free_at: float
    prices: StepPrices
    swap: float
    fetch: float | None
    total: float | None
    tier: int

    def use(self, prompt: int, held: int, on_device: int, fetched: int) -> tuple[int, float]:
        """Tokens that need not be computed, and seconds to swap in those below the device."""
        place, most = self.place, prompt - 1
        held, on_device = min(held, most), min(on_device, most)
        return use_lowered_at(self.prices, place.step_tokens, self.swap, held, on_device, fetched)

    def prefill(self, prompt: int, computed: int, prices: StepPrices) -> float:
        """Seconds to prefill beside the streams that were seen, of which ``computed`` tokens are there."""
        place, load = self.place, self.load
        work = prefill_work(prices, place.step_tokens, prompt, min(computed, prompt - 1))
        return work * stretch_of(
            prices, place.step_tokens, place.target_tpot, load.streams, load.context_tokens
        )


_Raw = tuple[InstanceState, Role, Work, float, StepPrices, float, float | None, float | None, int]
"""The fields of ``Seen``: a plain tuple is made in a third of the time."""


class Record(NamedTuple):
    """The places of a decision about a prompt of ``prompt`` tokens: those taken, and all that were looked at.

    Those looked at are in any order, perhaps one twice. ``decode`` None: where it prefills. ``there`` and
    ``held`` as in ``Query``.
    """

    prompt: int
    now: float
    there: Holdings
    held: Holdings
    prefill: InstanceState
    prefill_seen: Sequence[_Raw]
    decode: InstanceState | None = None
    decode_seen: Sequence[_Raw] = ()

    def prefill_order(self) -> list[int]:
        """Positions in ``prefill_seen``, each place once, by id."""
        return _order(self.prefill_seen)

    def prefill_candidates(self) -> tuple[Candidate, ...]:
        """Where the request could prefill."""
        return tuple(self._candidate(self.prefill_seen[at], Leg.PREFILL) for at in self.prefill_order())

    def decode_candidates(self) -> tuple[Candidate, ...]:
        """Where it could decode then; none if it stays where it prefills."""
        return tuple(self._candidate(self.decode_seen[at], Leg.DECODE) for at in _order(self.decode_seen))

    def _candidate(self, raw: _Raw, leg: Leg) -> Candidate:
        seen, decodes = Seen(*raw), leg is Leg.DECODE
        place, load = seen.place, seen.load
        matched, fetched = self.held.tokens(place.instance), 0
        if seen.tier >= 0:
            fetched = min(self.there.device_tiers()[seen.tier].tokens, self.prompt - 1)
        wait, prefill, swap = None, None, 0.0
        if not decodes:
            wait = max(seen.free_at - self.now, seen.fetch or 0.0)
            used, swap = seen.use(self.prompt, matched, self.held.on_device(place.instance), fetched)
            prefill = seen.prefill(self.prompt, used, seen.prices) + swap
        return Candidate(
            place.instance,
            seen.role,
            matched,
            load.context_tokens if decodes else load.prefill_tokens,
            load.requests,
            load.context_tokens,
            place is (self.decode if decodes else self.prefill),
            wait,
            seen.fetch,
            prefill,
            seen.total,
            fetched,
            swap,
        )


def _order(seen: Sequence[_Raw]) -> list[int]:
    at = {raw[0].instance: position for position, raw in enumerate(seen)}
    return [at[name] for name in sorted(at)]


def take_record(query: Query, plan: Plan) -> Record:
    """Keep what ``plan`` was chosen from, before anything is booked."""
    there, held = query.there, query.held
    prefill, decode, weighed = plan.prefill, plan.decode, plan.prefill_weighed
    if weighed is None:
        first = _look_at(query.prefill, held, prefill)
    else:
        first = _look_at_weighed(query.start.instances, weighed, _CHEAPEST)
    if decode is None:
        return Record(query.prompt, query.now, there, held, prefill.place, first)
    if plan.decode_weighed is None:
        second = _look_at(query.decode, held, decode)
    else:
        second = _look_at_weighed(query.decode.instances, plan.decode_weighed, _CHEAPEST_TO_DECODE)
    return Record(query.prompt, query.now, there, held, prefill.place, first, decode.place, second)


def _look_at(places: Places, held: Holdings, choice: Choice) -> Sequence[_Raw]:
    instances: Sequence[InstanceState] = places.instances
    if len(instances) > MAX_CANDIDATES:
        instances = _worth_a_look(places, held, choice)
    return [(x, x.role, x.load, x.free_at, x.prices, x.swap, None, None, -1) for x in instances]


def _look_at_weighed(instances: Sequence[InstanceState], weighed: Weighed, cheapest: int) -> Sequence[_Raw]:
    few = len(instances) <= MAX_CANDIDATES
    rows = range(len(instances)) if few else _cheapest(weighed.total, weighed.best, cheapest)
    fetch, total, tier = weighed.fetch, weighed.total, weighed.tier
    seen: list[_Raw] = []
    for row in rows:
        x, fetched = instances[row], -1 if tier is None else tier.item(row)
        costs = fetch.item(row), total.item(row), fetched
        seen.append((x, x.role, x.load, x.free_at, x.prices, x.swap, *costs))
    return seen


def _cheapest(total: Floats, best: int, count: int) -> list[int]:
    """Rows of the chosen place and of the cheapest others. Changes ``total`` and changes it back."""
    rows, values = [best], []
    while len(rows) < count:
        values.append(total.item(rows[-1]))
        total[rows[-1]] = np.inf
        rows.append(int(total.argmin()))
    # A copy would take longer than this.
    for row, value in zip(rows, values, strict=False):
        total[row] = value
    return rows


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
