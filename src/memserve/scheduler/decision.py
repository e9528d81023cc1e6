"""Where a request prefills and where it decodes: state, policy and time in, a decision with reasons out.

Deterministic: the same state and request give the same decision, so a log replays exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from memserve.core.errors import NoInstance
from memserve.core.types import InstanceId, Namespace, RequestId, Role, Tokens
from memserve.scheduler.policies import Choice, Policy, Query
from memserve.scheduler.state import InstanceState, Leg, Places, SchedulerState, Share, Work
from memserve.scheduler.tree import Holdings

MAX_CANDIDATES = 8
"""Candidates recorded per leg: all of a small cluster, of a large one those that explain the choice."""


@dataclass(frozen=True, slots=True, eq=False)
class RouteRequest:
    """A request to place. ``tokens``: contiguous int32[n], n at least 1."""

    request: RequestId
    namespace: Namespace
    tokens: Tokens
    session: str | None = None


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A place as it looked at the time of the decision.

    ``queued_tokens`` are ahead of the request: prompt tokens to compute where it would prefill, tokens
    of context to read in each step where it would decode.
    """

    instance: InstanceId
    role: Role
    matched_tokens: int
    queued_tokens: int
    running: int
    chosen: bool


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Where a request runs and why. ``decode`` None: where it prefills. Candidates are ordered by id.

    ``matched_prefill`` and ``matched_decode`` are the tokens of the prompt believed to be held there;
    ``decided_at`` is in the scheduler's clock, seconds.
    """

    request: RequestId
    prefill: InstanceId
    decode: InstanceId | None
    policy: str
    prompt_tokens: int
    prefill_candidates: tuple[Candidate, ...]
    decode_candidates: tuple[Candidate, ...]
    matched_prefill: int
    matched_decode: int
    decided_at: float
    reason: str

    def prefill_share(self) -> Share:
        """Load to book where it prefills. The last prompt token is always computed."""
        to_compute = max(1, self.prompt_tokens - self.matched_prefill)
        return Share(self.prefill, Work(prefill_tokens=to_compute, requests=0 if self.decode is None else 1))

    def decode_share(self) -> Share:
        """Load to book where it decodes."""
        place = self.prefill if self.decode is None else self.decode
        return Share(place, Work(context_tokens=self.prompt_tokens, requests=1))


class _Outcome(NamedTuple):
    choice: Choice
    matched: int
    candidates: tuple[Candidate, ...]


def decide(request: RouteRequest, state: SchedulerState, policy: Policy, now: float) -> Decision:
    """Choose the places of ``request``; changes nothing. Raises ``NoInstance`` naming the missing role."""
    prefill = _choose(Leg.PREFILL, request, state, policy)
    decode = None
    if prefill.choice.place.role is not Role.COLOCATED:
        decode = _choose(Leg.DECODE, request, state, policy)
    return Decision(
        request=request.request,
        prefill=prefill.choice.place.instance,
        decode=decode.choice.place.instance if decode else None,
        policy=policy.name,
        prompt_tokens=len(request.tokens),
        prefill_candidates=prefill.candidates,
        decode_candidates=decode.candidates if decode else (),
        matched_prefill=prefill.matched,
        matched_decode=decode.matched if decode else prefill.matched,
        decided_at=now,
        reason=_explain(prefill, decode),
    )


def _choose(leg: Leg, request: RouteRequest, state: SchedulerState, policy: Policy) -> _Outcome:
    places = state.places(leg)
    if not places.instances:
        raise NoInstance(
            f"no {leg.value} or colocated instance takes requests now; "
            f"start one, or try again when it is ready"
        )
    held = state.match(leg, request.namespace, request.tokens)
    choice = policy.choose(Query(places, held, request.session, state.turn))
    matched = held.tokens(choice.place.instance)
    return _Outcome(choice, matched, _record_candidates(places, held, choice))


def _record_candidates(places: Places, held: Holdings, choice: Choice) -> tuple[Candidate, ...]:
    chosen, prefills = choice.place, places.leg is Leg.PREFILL
    recorded = sorted(_select(places, held, choice), key=_by_id)
    return tuple(
        Candidate(
            place.instance,
            place.role,
            held.tokens(place.instance),
            place.load.prefill_tokens if prefills else place.load.context_tokens,
            place.load.requests,
            place is chosen,
        )
        for place in recorded
    )


def _select(places: Places, held: Holdings, choice: Choice) -> list[InstanceState]:
    """All places when they are few; else the chosen one, what the reason speaks of, and a longest holder."""
    if len(places.instances) <= MAX_CANDIDATES:
        return list(places.instances)
    longest = places.by_id.get(next(held.tiers[0].instances())) if held.tiers else None
    selected = [choice.place]
    for place in (longest, *choice.considered):
        if place is not None and place not in selected and len(selected) < MAX_CANDIDATES:
            selected.append(place)
    return selected


def _by_id(place: InstanceState) -> InstanceId:
    return place.instance


def _explain(prefill: _Outcome, decode: _Outcome | None) -> str:
    first = f"prefill on {prefill.choice.place.instance}: {prefill.choice.reason}"
    if decode is None:
        return f"{first}; decode there too"
    return f"{first}; decode on {decode.choice.place.instance}: {decode.choice.reason}"
