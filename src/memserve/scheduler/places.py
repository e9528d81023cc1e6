"""Instances as the scheduler sees them, and those that may take a leg of a request."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from memserve.core.messages import LoadReport
from memserve.core.types import InstanceId, Role, StepPrices
from memserve.scheduler.fleet import FLOOR_TOKENS, Flags, Slots
from memserve.scheduler.line import Mark, PrefillLine
from memserve.scheduler.predictions import Correction


class Admission(enum.Enum):
    """Whether an instance gets new requests: yes, only if no other can, or no."""

    OPEN = "open"
    LAST_RESORT = "last resort"
    CLOSED = "closed"


class Leg(enum.Enum):
    """The two parts of a request's way, each with a place of its own or both at one colocated instance.

    ``START``: where a request may begin when costs are weighed. A decode instance may then prefill what
    little is missing there, and keep the request.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    START = "start"


class Work(NamedTuple):
    """Load of an instance: prompt tokens to prefill, tokens of context to decode over, requests.

    ``streams`` are those of the requests whose first token is out.
    """

    prefill_tokens: int = 0
    context_tokens: int = 0
    requests: int = 0
    streams: int = 0

    def plus(self, other: Work) -> Work:
        return Work(self[0] + other[0], self[1] + other[1], self[2] + other[2], self[3] + other[3])

    def minus(self, other: Work) -> Work:
        return Work(self[0] - other[0], self[1] - other[1], self[2] - other[2], self[3] - other[3])

    def at_least(self, other: Work) -> Work:
        return Work(
            max(self[0], other[0]), max(self[1], other[1]), max(self[2], other[2]), max(self[3], other[3])
        )


_NO_REPORT = LoadReport()
_NO_WORK = Work()
_PRIOR = StepPrices()


class Foreign(NamedTuple):
    """Work that this scheduler has not booked, of other shards or from before its start, at ``at`` s:
    ``seconds`` of prefill, and ``streams`` that are decoded.
    """

    at: float = 0.0
    seconds: float = 0.0
    streams: float = 0.0


_NO_FOREIGN = Foreign()


class View(NamedTuple):
    """An instance at one moment.

    ``free_at``: when all that is to be prefilled there will be; ``end`` of its line will tell when it was.
    """

    place: InstanceState
    role: Role
    load: Work
    prices: StepPrices
    swap: float
    free_at: float
    end: Mark


@dataclass(slots=True, eq=False)
class InstanceState:
    """One living instance; ``capacity`` in tokens.

    ``load`` is what is booked and not finished, but never less than what the last report said, plus and
    minus what was booked and finished since. The report adds what this scheduler did not book (before a
    restart of its own) and contexts that grew while decoding. The ``order`` pairs, kept beside it because
    policies compare them for every instance, rank places: tokens ahead, then requests. ``slot`` is its row
    in the fleet, ``line`` the forecast of its prefills, ``correction`` what that leaves out, ``swap`` the
    seconds per token to bring KV up to the device. ``view`` is replaced by :meth:`look`, which whoever
    changes something calls: decisions keep views.
    """

    instance: InstanceId
    incarnation: int
    role: Role
    block_tokens: int
    capacity: int
    slot: int
    step_tokens: int
    target_tpot: float
    prices: StepPrices = _PRIOR
    swap: float = 0.0
    line: PrefillLine = field(default_factory=PrefillLine)
    correction: Correction = field(default_factory=Correction)
    admission: Admission = Admission.OPEN
    foreign: Foreign = _NO_FOREIGN
    report: LoadReport = _NO_REPORT
    booked: Work = _NO_WORK
    load: Work = _NO_WORK
    prefill_order: tuple[int, int] = (0, 0)
    decode_order: tuple[int, int] = (0, 0)
    view: View = field(init=False)
    _booked_then: Work | None = None

    def __post_init__(self) -> None:
        self.look()

    def look(self) -> None:
        """What is seen of it from now on is as it is now."""
        free_at = max(self.line.free_at, self.foreign.at) + self.foreign.seconds
        self.view = View(self, self.role, self.load, self.prices, self.swap, free_at, self.line.mark())

    def book(self, work: Work) -> None:
        self.booked = self.booked.plus(work)
        self._set_load(self.load.plus(work))

    def unbook(self, work: Work) -> None:
        self.booked = self.booked.minus(work)
        self._set_load(self.load.minus(work))

    def step_ahead(self, line: float) -> float:
        """Seconds of the steps that a request comes into the middle of, with ``line`` seconds to prefill."""
        prices, load = self.prices, self.load
        decoding = prices.decode_step(load.streams, load.context_tokens) if load.streams else 0.0
        part = self.step_tokens * prices.token
        if load.streams and self.target_tpot > 0:
            part = min(part, max(FLOOR_TOKENS * prices.token, self.target_tpot - decoding))
        return decoding + min(part, line)

    def knows(self, report: LoadReport) -> bool:
        """Whether ``report`` says what the last one did, and nothing has been booked or unbooked since."""
        return report == self.report and self.booked is self._booked_then and self.foreign[1:] == (0.0, 0.0)

    def take_report(self, report: LoadReport, now: float) -> None:
        """Replace the last load report."""
        self.report, self._booked_then = report, self.booked
        self.foreign = self._foreign_of(report, now)
        if report.prices is not None:
            self.prices = report.prices
        self.swap = report.swap
        if report.blocks:
            self.capacity = report.blocks * self.block_tokens
        context = (report.active_blocks + report.incoming_blocks) * self.block_tokens
        reported = Work(report.tokens_to_prefill, context, report.waiting + report.running, 0)
        self._set_load(self.booked.at_least(reported))

    def _foreign_of(self, report: LoadReport, now: float) -> Foreign:
        requests = report.waiting + report.running
        if requests <= self.booked.requests:
            return Foreign(now)
        share = 1 - self.booked.requests / requests
        prices = report.prices or self.prices
        return Foreign(now, share * report.tokens_to_prefill * prices.token, share * report.running)

    def _set_load(self, load: Work) -> None:
        self.load = load
        self.prefill_order = (load.prefill_tokens, load.requests)
        self.decode_order = (load.context_tokens, load.requests)


@dataclass(frozen=True, slots=True)
class Places:
    """The instances that may take one leg of a request now, ordered by id.

    In the same order their ``slots`` in the fleet, whether their role ``decodes``, nothing else, or not
    (``hands_over``). ``mask`` has the bits of the slots.
    """

    leg: Leg
    instances: tuple[InstanceState, ...]
    by_id: dict[InstanceId, InstanceState]
    slots: Slots
    decodes: Flags
    only_decodes: Flags
    hands_over: Flags
    mask: int


def places_of(leg: Leg, instances: tuple[InstanceState, ...]) -> Places:
    """For ``instances``, which are ordered by id."""
    slots = np.array([state.slot for state in instances], np.intp)
    decodes = np.array([state.role.decodes for state in instances], np.bool_)
    only = np.array([not state.role.prefills for state in instances], np.bool_)
    by_id = {state.instance: state for state in instances}
    mask = sum(1 << state.slot for state in instances)
    return Places(leg, instances, by_id, slots, decodes, only, ~decodes, mask)
