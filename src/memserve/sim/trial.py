"""One policy on one cluster under a workload: from sessions of turns to what was measured of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from memserve.bench.records import Record, Round, Sources
from memserve.bench.timeline import Due, Pace, Timeline
from memserve.bench.workload import Workload
from memserve.core.errors import ConfigError
from memserve.core.types import InstanceId
from memserve.scheduler.decision_log import Sink
from memserve.scheduler.policies import policy_by_name
from memserve.sim.journey import Outcome, SimRequest
from memserve.sim.prompts import content_tokens, prompt_lengths, tokens_of
from memserve.sim.simulation import Simulation
from memserve.sim.site import Change, Site

_END = np.zeros(1, np.int32)
"""An answer of nothing: one token that ends it."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, and how fast."""

    workload: Workload
    pace: Pace
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Busy:
    """Seconds in which an instance had work."""

    instance: InstanceId
    seconds: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What was measured, up to where it was ``stopped``.

    ``moved``: requests that took more than one attempt; ``fetched``: those given a prefix from a peer;
    ``errors``: |predicted - actual| / actual of each first token's time.
    """

    policy: str
    site: Site
    measured: Round
    moved: int
    fetched: int
    errors: tuple[float, ...]
    busy: tuple[Busy, ...]
    stopped: bool = False

    @property
    def utilization(self) -> float:
        """Share of the time in which instances had work, on average."""
        seconds = sum(one.seconds for one in self.busy)
        return seconds / max(self.measured.seconds * len(self.busy), 1e-9)


def run_trial(
    load: Load,
    site: Site,
    policy: str,
    *,
    changes: Sequence[Change] = (),
    on_record: Callable[[Record], None] = lambda _: None,
    give_up: Callable[[], bool] = lambda: False,
    log: Sink | None = None,
) -> Trial:
    """Run ``load`` to its end. ``on_record`` hears of every turn; then ``give_up`` may end it at once.
    ``log`` gets the decision log.

    Raises ``ConfigError``.
    """

    def ended(outcome: Outcome) -> None:
        sessions.ended(outcome)
        if give_up():
            simulation.stop()

    sessions = _Sessions(load, on_record)
    simulation = Simulation(site, policy_by_name(policy), ended, changes=changes, log=log)
    try:
        simulation.run(sessions)
    finally:
        simulation.close()
    outcomes = sessions.outcomes
    last = max((one.ended for one in outcomes), default=0.0)
    answered = [one for one in outcomes if one.first_token and one.served > 0]
    return Trial(
        policy,
        site,
        Round(0, last, tuple(sessions.records)),
        sum(len(one.decisions) > 1 for one in outcomes),
        sum(any(decision.fetch_from for decision in one.decisions) for one in outcomes),
        tuple(abs(one.decision.predicted_ttft - one.served) / one.served for one in answered),
        tuple(Busy(instance, seconds) for instance, seconds in simulation.busy.items()),
        stopped=len(outcomes) < load.workload.turns,
    )


def rate_of(workload: Workload, site: Site, load: float) -> float:
    """Sessions per second that are ``load`` times what the instances that prefill could prefill, had nothing
    been cached."""
    if not load > 0:
        raise ConfigError(f"--load is {load:g}; accepted: more than 0")
    prices = site.speed.prices
    prompts = np.array(prompt_lengths(workload), np.float64)
    token = prices.token + prices.step / site.speed.step_tokens
    work = float((token * prompts + prices.token_context * prompts**2 / 2).sum())
    return load * (site.prefill + site.colocated) * len(workload.sessions) / work


class _Sessions:
    """A timeline as the simulation's source of requests. Answers are the recorded ones."""

    def __init__(self, load: Load, on_record: Callable[[Record], None]) -> None:
        self._workload = load.workload
        self._timeline = Timeline(load.workload, load.pace, load.seed, real_answers=False)
        self._on_record = on_record
        self._sent: list[Due] = []
        self.records: list[Record] = []
        self.outcomes: list[Outcome] = []

    def next_at(self) -> float | None:
        return self._timeline.next_at()

    def take_due(self, now: float) -> Sequence[SimRequest]:
        due = self._timeline.take_due(now)
        self._sent += due
        return [self._request(one) for one in due]

    def ended(self, outcome: Outcome) -> None:
        """A request that was taken has ended."""
        due = self._sent[outcome.number]
        record = _make_record(due, outcome)
        self.records.append(record)
        self.outcomes.append(outcome)
        self._timeline.finish(due, outcome.ended, None if outcome.error else ())
        self._on_record(record)

    def _request(self, due: Due) -> SimRequest:
        reply = self._workload.sessions[due.session].turns[due.turn].reply
        answer = content_tokens(reply)
        return SimRequest(due.at, tokens_of(due.prompt), answer if len(answer) else _END, f"s{due.session}")


def _make_record(due: Due, outcome: Outcome) -> Record:
    ledger = outcome.ledger
    return Record(
        session=due.session,
        turn=due.turn,
        due=outcome.at,
        sent=outcome.at,
        ended=outcome.ended,
        arrivals=(outcome.first_token, outcome.ended) if outcome.first_token else (),
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=outcome.answer_tokens,
        sources=Sources(ledger.computed, ledger.local, peer=ledger.peer, backflow=ledger.backflow),
        exact=ledger.prompt == outcome.prompt_tokens,
        error=outcome.error,
    )
