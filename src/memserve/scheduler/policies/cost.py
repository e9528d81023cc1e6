"""Least cost: the time a request will take, and the time it will take from others, at every place.

Candidates are all pairs of a place to prefill and a place to decode, each with the best way to get KV there:
compute it, swap it in from below the device, or fetch a longer prefix from a peer where that is quicker (the
paper's condition, ``transfer <= exec(without) - exec(with)``). The arithmetic is ``native/weigh.cpp``.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from memserve._native import weigh_places
from memserve.scheduler.holdings import Tier
from memserve.scheduler.places import Places
from memserve.scheduler.policies.classic import PromptTree
from memserve.scheduler.policies.plan import MAX_CANDIDATES, Choice, Fetch, Plan, Query, Weighed

_FETCHED_TIERS = 3
"""Prefixes of so many lengths are looked at for fetching, longest first."""
_WORST_ERROR = 1.0
_CHEAPEST = 3
_CHEAPEST_TO_DECODE = 2
"""Places that explain the choice in a large cluster, the chosen one among them."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What a second of each kind counts.

    opportunity : work on an instance, for those who will come behind. Those who wait in line already are
        counted in addition, but where only streams run otherwise.
    append : work there, in addition: more streams will come.
    line : work beside each of the prompts in the instance's own line: half of each step stays the oldest's.
    streams : a second by which each of the streams beside it is delayed.
    decode : of the request's own answer.
    """

    opportunity: float = 1.0
    append: float = 2.0
    line: float = 0.5
    streams: float = 1.0
    decode: float = 1.0


class LeastCost:
    """See the module. ``fetches``: whether KV is brought from peers before a prompt is prefilled.

    While predictions are worse than ``_WORST_ERROR`` it decides as ``prompt-tree``, which never waits longer
    for a prefix than computing it would take, in tokens.
    """

    name = "cost"

    def __init__(self, weights: Weights | None = None, *, fetches: bool = True) -> None:
        self._weights = astuple(weights or Weights())
        self._fetches = fetches
        self._fallback = PromptTree()

    def plan(self, query: Query) -> Plan:
        if query.error > _WORST_ERROR:
            note = f"predictions are off by {query.error:.0%}, so as {self._fallback.name}"
            return self._fallback.plan(query)._replace(note=note)
        start, decode, wire, there = query.start, query.decode, query.wire, query.there.device_tiers()
        starts, decodes, wait, seconds, answering, source = weigh_places(
            query.fleet.table,
            start.slots,
            start.only_decodes,
            start.hands_over,
            decode.slots,
            _masks(query.held.tiers, query.fleet.rows),
            _masks(query.held.lowered, query.fleet.rows),
            _masks(there[:_FETCHED_TIERS], query.fleet.rows) if self._fetches else [],
            (query.prompt, query.answer, query.now, query.behind, wire.latency, wire.token),
            self._weights,
            _shown(start, _CHEAPEST),
            _shown(decode, _CHEAPEST_TO_DECODE),
        )
        first = Weighed(*starts)
        reason, fetch = f"{wait:.3f} s to wait, {seconds:.3f} s to prefill", None
        if source >= 0:
            tier = there[first.figures()[0].tier]
            fetch = Fetch(tier.numbering.names[source], min(tier.tokens, query.prompt - 1))
            reason = f"{reason}, fetches {fetch.tokens} tokens from {fetch.source}"
        if query.behind:
            reason = f"{reason}, {query.behind:.1f} in line per place to prefill"
        prefill = Choice(start.instances[first.numbers[0]], reason)
        if prefill.place.role.decodes:
            return Plan(prefill, None, fetch, first)
        second = Weighed(*decodes)
        moved = second.figures()[0].fetch
        place = decode.instances[second.numbers[0]]
        choice = Choice(place, f"{moved:.3f} s to move, {answering:.3f} s to decode")
        return Plan(prefill, choice, fetch, first, second)


def _masks(tiers: tuple[Tier, ...], slots: int) -> list[tuple[int, bytes]]:
    size = slots // 8 + 1
    return [(tier.tokens, tier.mask.to_bytes(size, "little")) for tier in tiers]


def _shown(places: Places, cheapest: int) -> int:
    """All places of a small cluster are shown, of a large one the cheapest."""
    count = len(places.instances)
    return count if count <= MAX_CANDIDATES else cheapest
