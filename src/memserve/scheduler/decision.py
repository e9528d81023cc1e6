"""Where a request prefills and where it decodes: state, policy and time in, a decision with reasons out.

Deterministic: the same state and request give the same decision, so a log replays exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from memserve.core.errors import NoInstance
from memserve.core.types import InstanceId, Namespace, RequestId, Tokens
from memserve.scheduler.costs import prefill_work, use_lowered_at
from memserve.scheduler.places import InstanceState, Leg, Work
from memserve.scheduler.policies import Plan, Policy, Query
from memserve.scheduler.predictions import Forecast
from memserve.scheduler.record import Record, take_record
from memserve.scheduler.state import SchedulerState, Share

_NOTHING = Forecast()


@dataclass(frozen=True, slots=True, eq=False)
class RouteRequest:
    """A request to place. ``tokens``: contiguous int32[n], n at least 1; ``max_tokens`` 0: unknown.

    ``behind``: how many wait in line behind it.
    """

    request: RequestId
    namespace: Namespace
    tokens: Tokens
    session: str | None = None
    max_tokens: int = 0
    behind: int = 0


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Where a request runs and why. ``decode`` None: where it prefills.

    ``matched_prefill`` and ``matched_decode`` are the tokens of the prompt believed to be held there;
    ``decided_at`` is in the scheduler's clock, seconds. ``predicted_ttft``: seconds from then to the first
    token, of which ``predicted_prefill`` to compute it and to swap KV in. With ``fetch_from``, that instance
    sends the first ``fetch_tokens`` tokens of the prompt to where it is prefilled. Of ``matched_prefill`` the
    last ``promised_prefill`` are not there yet: requests before this one compute them; the last
    ``left_below`` lie below the device and are computed again, which is quicker. ``forecast`` is what the
    prediction was made from.
    """

    request: RequestId
    prefill: InstanceId
    decode: InstanceId | None
    policy: str
    prompt_tokens: int
    matched_prefill: int
    matched_decode: int
    decided_at: float
    reason: str
    predicted_ttft: float = 0.0
    predicted_prefill: float = 0.0
    fetch_from: InstanceId | None = None
    fetch_tokens: int = 0
    promised_prefill: int = 0
    forecast: Forecast = _NOTHING
    left_below: int = 0

    @property
    def believed(self) -> int:
        """Tokens of the prompt that need not be computed, as far as was known."""
        return max(self.matched_prefill - self.left_below, self.fetch_tokens)

    def prefill_share(self) -> Share:
        """Load to book where it prefills. The last prompt token is always computed."""
        to_compute = max(1, self.prompt_tokens - self.believed)
        work = Work(prefill_tokens=to_compute, requests=0 if self.decode is None else 1)
        return Share(self.prefill, work, self.predicted_prefill)

    def decode_share(self) -> Share:
        """Load to book where it decodes."""
        place = self.prefill if self.decode is None else self.decode
        return Share(place, Work(context_tokens=self.prompt_tokens, requests=1))


def decide(
    request: RouteRequest, state: SchedulerState, policy: Policy, now: float, answer: float = 128.0
) -> Decision:
    """Choose the places of ``request``; changes nothing. Raises ``NoInstance`` naming the missing role.

    ``answer``: tokens that answers have on average.
    """
    query = _ask(request, state, now, answer)
    return _conclude(request, policy, query, policy.plan(query))


def decide_recorded(
    request: RouteRequest, state: SchedulerState, policy: Policy, now: float, answer: float = 128.0
) -> tuple[Decision, Record]:
    """The same, with what was known of the places it was chosen from."""
    query = _ask(request, state, now, answer)
    plan = policy.plan(query)
    return _conclude(request, policy, query, plan), take_record(query, plan)


def _conclude(request: RouteRequest, policy: Policy, query: Query, plan: Plan) -> Decision:
    prefill, decode, held = plan.prefill.place, plan.decode, query.held
    matched = held.tokens(prefill.instance)
    fetched = plan.fetch.tokens if plan.fetch else 0
    promised = max(0, matched - query.there.tokens(prefill.instance))
    fetch = query.wire.seconds(fetched - matched)
    most, on_device = query.prompt - 1, held.on_device(prefill.instance)
    used, swap = use_lowered_at(
        prefill.prices, prefill.step_tokens, prefill.swap, min(matched, most), min(on_device, most), fetched
    )
    forecast, work = _foresee(query, prefill, used, swap, fetch, promised)
    return Decision(
        request=request.request,
        prefill=prefill.instance,
        decode=decode.place.instance if decode else None,
        policy=policy.name,
        prompt_tokens=query.prompt,
        matched_prefill=matched,
        matched_decode=held.tokens(decode.place.instance) if decode else matched,
        decided_at=query.now,
        reason=_explain(plan),
        predicted_ttft=prefill.correction.seconds(forecast),
        predicted_prefill=work,
        fetch_from=plan.fetch.source if plan.fetch else None,
        fetch_tokens=fetched,
        promised_prefill=promised,
        forecast=forecast,
        left_below=max(0, min(matched, most) - used),
    )


def _ask(request: RouteRequest, state: SchedulerState, now: float, answer: float) -> Query:
    prefill, decode = state.places(Leg.PREFILL), state.places(Leg.DECODE)
    if not prefill.instances or (not decode.instances and not prefill.decodes.any()):
        missing = Leg.DECODE if prefill.instances else Leg.PREFILL
        raise NoInstance(
            f"no {missing.value} or colocated instance takes requests now; "
            f"start one, or try again when it is ready"
        )
    there = state.match(request.namespace, request.tokens)
    return Query(
        prompt=len(request.tokens),
        answer=min(answer, request.max_tokens) if request.max_tokens else answer,
        session=request.session,
        turn=state.turn,
        now=now,
        there=there,
        held=there.expected(),
        prefill=prefill,
        decode=decode,
        start=state.places(Leg.START),
        fleet=state.fleet,
        wire=state.wire,
        cached=state.tree.held_tokens,
        error=state.predictions.typical,
        behind=request.behind / len(prefill.instances),
    )


def _foresee(
    query: Query, place: InstanceState, computed: int, swap: float, fetch: float, promised: int
) -> tuple[Forecast, float]:
    """When the first token will be there by the prices of steps, and the seconds of prefill until then."""
    work = prefill_work(place.prices, place.step_tokens, query.prompt, computed)
    prefill = work * float(query.fleet.columns.stretch[place.slot]) + swap
    line = max(place.view.free_at - query.now, 0.0)
    in_line = promised > 0 or place.foreign.seconds > 0
    served = line + prefill if in_line else place.line.forecast(query.now, prefill)
    return Forecast(max(served, fetch + prefill), place.step_ahead(line)), prefill


def _explain(plan: Plan) -> str:
    first = f"prefill on {plan.prefill.place.instance}: {plan.prefill.reason}"
    if plan.note:
        first = f"{plan.note}: {first}"
    if plan.decode is None:
        return f"{first}; decode there too"
    return f"{first}; decode on {plan.decode.place.instance}: {plan.decode.reason}"
