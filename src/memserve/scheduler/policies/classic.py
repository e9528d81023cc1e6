"""Policies of one rule each: turns, load, sessions, longest prefix. They know tokens, not seconds.

Places come ordered by id, so that the first of equals is the one with the smallest id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain, groupby, takewhile
from operator import attrgetter

from memserve.core.types import InstanceId
from memserve.scheduler.places import InstanceState, Leg
from memserve.scheduler.policies.plan import Choice, LegPolicy, LegQuery

_MASK = (1 << 64) - 1
_SEEDS_KEPT = 1 << 14
_TOO_BUSY = "; longer holders have more tokens ahead than their prefix saves"


class RoundRobin(LegPolicy):
    """One after the other."""

    name = "round-robin"

    def choose(self, query: LegQuery) -> Choice:
        instances = query.places.instances
        number = query.turn % len(instances)
        return Choice(instances[number], f"turn {query.turn}, number {number} of {len(instances)}")


class LeastLoad(LegPolicy):
    """Fewest tokens ahead (to prefill, or to decode over), then fewest requests."""

    name = "least-load"

    def choose(self, query: LegQuery) -> Choice:
        places = query.places
        place = min(places.instances, key=_ORDER[places.leg])
        return Choice(place, "least load")


class SessionId(LegPolicy):
    """The same session goes to the same place; requests without a session go to the least loaded one.

    Highest random weight (Thaler and Ravishankar, 1998): a place that joins or leaves moves only the
    sessions that it gains or had.
    """

    name = "session-id"

    def choose(self, query: LegQuery) -> Choice:
        if query.session is None:
            return LeastLoad().choose(query)
        number = _hash64(query.session)
        place = max(query.places.instances, key=lambda state: _seed(state.instance) * number & _MASK)
        return Choice(place, "session")


class PromptTree(LegPolicy):
    """The longest prefix held; among equals the least loaded place.

    A holder is passed over when it has more tokens ahead than the least loaded place, by more than the
    prefix would save: waiting there would take longer than doing the prefix again elsewhere. If that
    leaves no holder, the least loaded place takes the request.
    """

    name = "prompt-tree"

    def choose(self, query: LegQuery) -> Choice:
        places, held = query.places, query.held
        order = _ORDER[places.leg]
        least = min(places.instances, key=order)
        floor = order(least)[0]
        # What the least loaded place holds always pays there, so only longer holdings need a look.
        enough = held.tokens(least.instance)
        considered = [least]
        for tokens, holders in _holders(query, enough):
            place = min(holders, key=order)
            if order(place)[0] - floor <= tokens:
                return Choice(place, f"holds {tokens} tokens", tuple(considered))
            considered.append(place)
        reason = f"least load, holds {enough} tokens" if enough else "least load"
        return Choice(least, reason + _TOO_BUSY if len(considered) > 1 else reason, tuple(considered))


def _holders(query: LegQuery, enough: int) -> Iterator[tuple[int, list[InstanceState]]]:
    """Places that hold more than ``enough`` tokens, longest first, those that hold the same by id."""
    by_id = query.places.by_id
    longer = takewhile(lambda tier: tier.tokens > enough, query.held.tiers)
    for tokens, tiers in groupby(longer, key=attrgetter("tokens")):
        names = chain.from_iterable(tier.instances() for tier in tiers)
        holders = [by_id[name] for name in sorted(names) if name in by_id]
        if holders:
            yield tokens, holders


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=_SEEDS_KEPT)
def _seed(instance: InstanceId) -> int:
    # Odd, so that multiplying by it is a bijection of the sessions' hashes.
    return _hash64(instance) | 1


_ORDER: dict[Leg, Callable[[InstanceState], tuple[int, int]]] = {
    Leg.PREFILL: attrgetter("prefill_order"),
    Leg.DECODE: attrgetter("decode_order"),
}
