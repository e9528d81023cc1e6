"""What a policy is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple, Protocol

import msgspec

from memserve.core.types import InstanceId
from memserve.scheduler.costs import Wire
from memserve.scheduler.fleet import Fleet
from memserve.scheduler.holdings import Holdings
from memserve.scheduler.places import InstanceState, Leg, Places

MAX_CANDIDATES = 8
"""Places explained per leg: all of a small cluster, of a large one those that explain the choice."""
_FIGURES = Struct("<ddq")


@dataclass(frozen=True, slots=True)
class LegQuery:
    """The places for one leg, at least one, and what they will hold of the prompt of ``prompt`` tokens.

    ``cached`` tells how many tokens an instance holds in all.
    """

    places: Places
    held: Holdings
    session: str | None
    turn: int
    prompt: int
    cached: Callable[[InstanceId], int]


class Query(msgspec.Struct, frozen=True, gc=False):
    """A request and the state of the cluster, as far as policies look at them.

    ``prompt`` in tokens, at least 1; ``answer``: how many tokens are expected. ``there`` is what instances
    hold of it, ``held`` what they will when its turn comes. ``decode`` may be empty where ``prefill`` has
    places that decode themselves. ``start``: see ``Leg.START``; ``cached``: see ``LegQuery``. ``error``: the
    relative error of what was predicted of late. ``behind``: requests in line, per place to prefill.
    """

    prompt: int
    answer: float
    session: str | None
    turn: int
    now: float
    there: Holdings
    held: Holdings
    prefill: Places
    decode: Places
    start: Places
    fleet: Fleet
    wire: Wire
    cached: Callable[[InstanceId], int]
    error: float = 0.0
    behind: float = 0.0

    def leg(self, leg: Leg) -> LegQuery:
        """The part of it that concerns one leg."""
        places = self.prefill if leg is Leg.PREFILL else self.decode
        return LegQuery(places, self.held, self.session, self.turn, self.prompt, self.cached)


class Choice(NamedTuple):
    """The place taken, and why, for people; ``considered`` are others that the reason speaks of."""

    place: InstanceState
    reason: str
    considered: tuple[InstanceState, ...] = ()


class Fetch(NamedTuple):
    """``source`` sends its first ``tokens`` tokens of the prompt to where the request will prefill."""

    source: InstanceId
    tokens: int


class Figures(NamedTuple):
    """A place as the cost policy saw it.

    ``fetch``: seconds to bring KV there; ``total``: seconds of all that counts; ``tier``: which of the
    prefixes held is fetched, -1 for none.
    """

    fetch: float
    total: float
    tier: int


class Weighed(NamedTuple):
    """The cheapest places of a leg by their ``numbers``, the chosen one first, with their figures packed."""

    numbers: Sequence[int]
    packed: bytes

    def figures(self) -> list[Figures]:
        """In the order of ``numbers``."""
        return [Figures(*each) for each in _FIGURES.iter_unpack(self.packed)]


class Plan(NamedTuple):
    """``decode`` None: where it prefills. Places that were weighed explain a choice by cost.

    Those to prefill are of ``Query.start``, those to decode of ``Query.decode``. ``note`` says what is
    unusual.
    """

    prefill: Choice
    decode: Choice | None
    fetch: Fetch | None = None
    prefill_weighed: Weighed | None = None
    decode_weighed: Weighed | None = None
    note: str = ""


class Policy(Protocol):
    """Chooses the places of a request."""

    name: str

    def plan(self, query: Query) -> Plan: ...


class LegPolicy:
    """A policy that chooses the places one after the other and knows nothing of seconds."""

    name: str

    def choose(self, query: LegQuery) -> Choice:
        """The place of one leg."""
        raise NotImplementedError

    def plan(self, query: Query) -> Plan:
        prefill = self.choose(query.leg(Leg.PREFILL))
        if prefill.place.role.decodes:
            return Plan(prefill, None)
        return Plan(prefill, self.choose(query.leg(Leg.DECODE)))
