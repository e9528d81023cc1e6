"""Why a request ran where it ran, for clients: the header of every answer, and the ids to ask by."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from memserve.scheduler.decision import Decision
from memserve.scheduler.history import Explanation

ROUTE_HEADER = "x-memserve-route"
_IDS_KEPT = 1024


class WhyBody(msgspec.Struct, frozen=True):
    """Body of ``GET /v1/cluster/why/{id}``: ``id`` is the answer's; each lost instance adds an attempt."""

    id: str
    attempts: tuple[Explanation, ...]


class RecentIds:
    """Answers' ids by the ``x-request-id`` of their requests; of equal ones the latest counts."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, str] = OrderedDict()

    def note(self, request_id: str, answer: str) -> None:
        """``answer`` is that of the request with this header."""
        self._answers.pop(request_id, None)
        self._answers[request_id] = answer
        if len(self._answers) > _IDS_KEPT:
            self._answers.popitem(last=False)

    def answer_of(self, either: str) -> str:
        """The answer's id, given that or its request's."""
        return self._answers.get(either, either)


def route_header(decisions: Sequence[Decision]) -> dict[str, str]:
    """The last of a request's decisions in short; nothing if it is forgotten."""
    if not decisions:
        return {}
    last = decisions[-1]
    parts = [
        f"prefill={last.prefill}",
        f"decode={last.decode or last.prefill}",
        f"policy={last.policy}",
        f"matched={last.matched_prefill}",
    ]
    if last.fetch_from is not None:
        parts.append(f"fetch={last.fetch_tokens} from {last.fetch_from}")
    if len(decisions) > 1:
        parts.append(f"attempt={len(decisions)}")
    return {ROUTE_HEADER: "; ".join(parts)}
