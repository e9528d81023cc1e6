"""Decisions of late, what they saw and what became of them. Decides nothing."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from memserve.core.types import RequestId
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.hindsight import Known, Outcome, Regrets, look_back
from memserve.scheduler.record import Candidate, Record
from memserve.scheduler.state import SchedulerState


class Explanation(msgspec.Struct, frozen=True):
    """A decision, the places it was chosen from, ordered by id, and what became of it once that is known."""

    decision: Decision
    prefill_candidates: tuple[Candidate, ...]
    decode_candidates: tuple[Candidate, ...]
    outcome: Outcome | None


class _Kept(msgspec.Struct):
    """``request`` only until the first token has come: prompts are long."""

    decision: Decision
    record: Record | None
    request: RouteRequest | None = None
    outcome: Outcome | None = None


class History:
    """The last ``size`` decisions about ``state``, and the regret of all.

    Up to twice as many while no request ends: to forget takes longer than to remember, and nobody waits then.
    """

    def __init__(self, state: SchedulerState, size: int) -> None:
        self._state = state
        self._size = size
        self._kept: OrderedDict[RequestId, _Kept] = OrderedDict()
        self.regrets = Regrets()

    def add(self, request: RouteRequest, decision: Decision, record: Record | None) -> None:
        """Remember a decision, before it is booked; one of the same name is replaced."""
        kept = _Kept(decision, record, request if record is not None else None)
        self._kept.pop(decision.request, None)
        self._kept[decision.request] = kept
        self._forget(2 * self._size)

    def settle(self, request: RequestId, cached: int | None, now: float) -> Decision | None:
        """The first token has come: look back. None if the decision is not remembered."""
        kept = self._kept.get(request)
        if kept is None:
            return None
        if kept.record is not None and kept.request is not None:
            asked = kept.request
            ends = [view.end if self._state.knows(view.place) else None for view in kept.record.prefill_views]
            held = self._state.match(asked.namespace, asked.tokens)
            known = Known(now, ends, held, cached, self._state.wire)
            kept.outcome = look_back(kept.decision, kept.record, known)
            self.regrets.add(kept.decision.policy, kept.outcome)
            kept.request = None
        return kept.decision

    def end(self, request: RequestId) -> None:
        """The request has ended, perhaps without a token."""
        kept = self._kept.get(request)
        if kept is not None:
            kept.request = None
        self._forget(self._size)

    def names(self) -> tuple[RequestId, ...]:
        """Whose decisions are remembered, oldest first."""
        return tuple(self._kept)

    def decision(self, request: RequestId) -> Decision | None:
        """Where the request was sent; None when unknown or forgotten."""
        kept = self._kept.get(request)
        return None if kept is None else kept.decision

    def explain(self, request: RequestId) -> Explanation | None:
        """Why; None when unknown or forgotten. Without candidates where none were recorded."""
        kept = self._kept.get(request)
        if kept is None:
            return None
        record = kept.record
        first = () if record is None else record.prefill_candidates()
        second = () if record is None else record.decode_candidates()
        return Explanation(kept.decision, first, second, kept.outcome)

    def _forget(self, size: int) -> None:
        while len(self._kept) > size:
            self._kept.popitem(last=False)
