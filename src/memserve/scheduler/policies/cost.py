"""Least cost: the time a request will take, and the time it will take from others, at every place.

Candidates are all pairs of a place to prefill and a place to decode, each with the best way to get KV there:
compute it, swap it in from below the device, or fetch a longer prefix from a peer where that is quicker (the
paper's condition, ``transfer <= exec(without) - exec(with)``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from memserve.scheduler.costs import (
    PrefillCosts,
    decode_costs,
    on_device_by_slot,
    prefill_costs,
    tokens_by_slot,
    use_lowered,
)
from memserve.scheduler.fleet import Columns, Flags, Floats, Indices
from memserve.scheduler.policies.classic import PromptTree
from memserve.scheduler.policies.plan import Choice, Fetch, Plan, Query, Weighed

_FETCHED_TIERS = 3
"""Prefixes of so many lengths are looked at for fetching, longest first."""
_WORST_ERROR = 1.0
_LEAST_GAIN = 0.9
"""A fetch must bring the first token to this part of the time it takes without: forecasts err."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What a second of each kind counts.

    opportunity : work on an instance, for those who will come behind.
    append : the same where only streams run otherwise, in addition: more of them will come.
    streams : a second by which each of the streams beside it is delayed.
    decode : of the request's own answer.
    """

    opportunity: float = 1.0
    append: float = 2.0
    streams: float = 1.0
    decode: float = 1.0


class LeastCost:
    """See the module. ``fetches``: whether KV is brought from peers before a prompt is prefilled.

    While predictions are worse than ``_WORST_ERROR`` it decides as ``prompt-tree``, which never waits longer
    for a prefix than computing it would take, in tokens.
    """

    name = "cost"

    def __init__(self, weights: Weights | None = None, *, fetches: bool = True) -> None:
        self._weights = weights or Weights()
        self._fetches = fetches
        self._fallback = PromptTree()

    def plan(self, query: Query) -> Plan:
        if query.error > _WORST_ERROR:
            note = f"predictions are off by {query.error:.0%}, so as {self._fallback.name}"
            return replace(self._fallback.plan(query), note=note)
        held = tokens_by_slot(query.held, query.fleet.rows, query.prompt - 1)
        above = on_device_by_slot(query.held, held, query.prompt - 1)
        first = self._weigh_prefill(query, held, above)
        second = self._weigh_decode(query, held, above) if query.decode.instances else None
        handed = np.inf if second is None else second.total[second.best]
        total = first.alone + np.where(first.hands_over, handed, first.stays)
        best = int(total.argmin())
        tier = int(first.tier[best])
        fetch = None if tier < 0 else self._fetch_of(query, tier)
        prefill = Choice(query.start.instances[best], _explain(first.costs, best, fetch))
        weighed = Weighed(best, first.costs.fetch, total, first.tier)
        if second is None or not first.hands_over[best]:
            return Plan(prefill, None, fetch, weighed)
        moved = (
            f"{second.moved.item(second.best):.3f} s to move, {second.own.item(second.best):.3f} s to decode"
        )
        decode = Choice(query.decode.instances[second.best], moved)
        return Plan(prefill, decode, fetch, weighed, Weighed(second.best, second.moved, second.total))

    def _weigh_prefill(self, query: Query, held: Floats, above: Floats) -> _Prefill:
        slots, weights = query.start.slots, self._weights
        places, there = query.fleet.at(slots), held.take(slots)
        swap = no_fetch = np.zeros(len(slots))
        used = there
        if query.held.lowered:
            used, swap = use_lowered(places, there, above.take(slots))
        costs = prefill_costs(places, query.prompt, used, no_fetch, query.now, swap)
        tier: Indices = np.full(len(slots), -1)
        if self._fetches:
            # Who receives KV swaps in first what it has of the prompt.
            swap = places.swap * (there - above.take(slots)) if query.held.lowered else swap
            costs, tier = self._with_fetches(query, places, there, swap, costs, tier)
        behind = weights.opportunity + weights.append * query.start.only_decodes
        others = (behind + weights.streams * places.streams) * costs.work
        own, beside = self._weigh_streams(query, places)
        return _Prefill(costs, tier, costs.ttft + others, own, beside, query.start.hands_over)

    def _weigh_streams(self, query: Query, places: Columns) -> tuple[Floats, Floats]:
        weights = self._weights
        return decode_costs(places, query.prompt, query.answer, weights.decode, weights.streams)

    def _with_fetches(
        self, query: Query, places: Columns, held: Floats, swap: Floats, costs: PrefillCosts, tier: Indices
    ) -> tuple[PrefillCosts, Indices]:
        wire = query.wire
        # Where a token takes longer to compute than to fetch, no shorter prefix is better than the longest.
        tiers = _FETCHED_TIERS if wire.token > places.token.min() else 1
        least = held.min()
        for number, longer in enumerate(query.there.device_tiers()[:tiers]):
            there = float(min(longer.tokens, query.prompt - 1))
            if there <= least:
                break
            missing = np.maximum(there - held, 0.0)
            fetch = wire.latency + wire.token * missing
            fetched = prefill_costs(places, query.prompt, held + missing, fetch, query.now, swap)
            better = (missing > 0) & (fetched.ttft < _LEAST_GAIN * costs.ttft)
            if better.any():
                costs, tier = costs.where(better, fetched), np.where(better, number, tier)
        return costs, tier

    def _weigh_decode(self, query: Query, held: Floats, above: Floats) -> _Decode:
        slots = query.decode.slots
        places = query.fleet.at(slots)
        own, others = self._weigh_streams(query, places)
        missing = query.prompt - held.take(slots)
        moved = query.wire.latency + query.wire.token * missing
        if query.held.lowered:
            moved += places.swap * (held - above).take(slots)
        # Who has no room lets the request wait for another to end, about as long as an answer takes.
        full = np.where(places.room < missing, own, 0.0)
        total = moved + own + others + full
        return _Decode(moved, own, others, total, int(total.argmin()))

    def _fetch_of(self, query: Query, number: int) -> Fetch:
        """From the holder that will be done with its own prompts first."""
        tier = query.there.device_tiers()[number]
        holders = sorted((query.fleet.columns.free_at[slot], name) for slot, name in tier.numbered())
        return Fetch(holders[0][1], min(tier.tokens, query.prompt - 1))


class _Prefill(NamedTuple):
    """One entry per place that prefills; ``tier``: what it fetches, an index into the tiers held, or -1."""

    costs: PrefillCosts
    tier: Indices
    alone: Floats
    own: Floats
    others: Floats
    hands_over: Flags

    @property
    def stays(self) -> Floats:
        """What decoding where it prefills costs."""
        return self.own + self.others


class _Decode(NamedTuple):
    """One entry per place that takes a request over; ``own`` and ``others`` are weighted seconds."""

    moved: Floats
    own: Floats
    others: Floats
    total: Floats
    best: int


def _explain(costs: PrefillCosts, best: int, fetch: Fetch | None) -> str:
    text = f"{costs.wait.item(best):.3f} s to wait, {costs.prefill.item(best):.3f} s to prefill"
    return text if fetch is None else f"{text}, fetches {fetch.tokens} tokens from {fetch.source}"
