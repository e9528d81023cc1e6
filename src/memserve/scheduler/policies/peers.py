"""The ideas of other routers, for comparison, each as its authors describe it. They count tokens or requests.

Only what concerns the choice of a place is here. For decode each takes the least loaded place.
"""

from __future__ import annotations

from operator import attrgetter

from memserve.scheduler.places import InstanceState, Leg
from memserve.scheduler.policies.classic import LeastLoad
from memserve.scheduler.policies.plan import Choice, LegPolicy, LegQuery


class WeightedOverlap(LegPolicy):
    """Fewest tokens to compute there in all: those ahead, and what is not cached of the prompt.

    NVIDIA Dynamo's KV router (its documentation, "cost function"): overlap weight times potential prefill
    blocks, plus active decode blocks.
    """

    name = "weighted-overlap"

    def choose(self, query: LegQuery) -> Choice:
        if query.places.leg is Leg.DECODE:
            return LeastLoad().choose(query)

        def cost(place: InstanceState) -> int:
            load = place.load
            decoded = load.context_tokens if place.role.decodes else 0
            return load.prefill_tokens + query.prompt - query.held.tokens(place.instance) + decoded

        place = min(query.places.instances, key=cost)
        return Choice(place, f"{cost(place)} tokens to compute and to hold")


class CacheAware(LegPolicy):
    """The longest prefix if it is long enough, unless requests are spread too unevenly.

    SGLang's router (sgl-router, "cache_aware", its defaults): above ``_RATIO`` of the prompt the longest
    holder, below it the place with the smallest tree; the fewest requests where places differ too much.
    """

    name = "cache-aware"

    _RATIO = 0.3
    _UNEVEN = 64
    _UNEVEN_RATIO = 1.5

    def choose(self, query: LegQuery) -> Choice:
        if query.places.leg is Leg.DECODE:
            return LeastLoad().choose(query)
        instances = query.places.instances
        requests = [place.load.requests for place in instances]
        most, fewest = max(requests), min(requests)
        if most - fewest > self._UNEVEN and most > self._UNEVEN_RATIO * fewest:
            return Choice(instances[requests.index(fewest)], "fewest requests: load is uneven")
        longest = max(instances, key=lambda place: query.held.tokens(place.instance))
        held = query.held.tokens(longest.instance)
        if held > self._RATIO * query.prompt:
            return Choice(longest, f"holds {held} tokens")
        smallest = min(instances, key=lambda place: query.cached(place.instance))
        return Choice(smallest, f"has least cached: {query.cached(smallest.instance)} tokens")


class ExploitExplore(LegPolicy):
    """Where most is cached if that is more than half; else where the least is to do.

    Preble's E2 (Srivatsa et al., ICLR 2025), with its rebalancing: a place with more than twice the load of
    the least loaded one is not exploited.
    """

    name = "exploit-explore"

    def choose(self, query: LegQuery) -> Choice:
        if query.places.leg is Leg.DECODE:
            return LeastLoad().choose(query)
        instances, held = query.places.instances, query.held
        most = max(held.tokens(place.instance) for place in instances)
        if most > query.prompt - most:
            holders = [place for place in instances if held.tokens(place.instance) == most]
            place = min(holders, key=_ORDER)
            least = min(instances, key=_ORDER)
            if place.load.prefill_tokens <= 2 * least.load.prefill_tokens + query.prompt:
                return Choice(place, f"exploits {most} tokens")
            return Choice(least, "rebalances")
        place = min(
            instances,
            key=lambda one: one.load.prefill_tokens + query.prompt - held.tokens(one.instance),
        )
        return Choice(place, "explores")


_ORDER = attrgetter("prefill_order")
