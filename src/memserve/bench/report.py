"""The report of a benchmark: what was run, on what, every figure and every record."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from memserve import __version__
from memserve.bench.comparison import Plan, Result
from memserve.bench.records import ClientLoad, Round
from memserve.bench.statistics import Figures, Ratio, Slo, compare_rounds, compute_figures, share_equal
from memserve.bench.timeline import Pace


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the client ran, and with which version."""

    processor: str
    cores: int
    system: str
    python: str
    memserve: str


@dataclass(frozen=True, slots=True)
class Setting:
    """What was run; ``salt`` and ``seed`` make it the same again."""

    workload: str
    sessions: int
    turns: int
    context: int
    endpoint: str
    fixed: bool
    real_answers: bool
    pace: Pace
    seed: int
    salt: str
    rounds: int
    slo: Slo


@dataclass(frozen=True, slots=True)
class Against:
    """Figures of a target relative to the first one's."""

    ttft: Ratio | None
    ttft_p99: Ratio | None
    itl: Ratio | None
    itl_p99: Ratio | None
    jct: Ratio | None
    jct_p99: Ratio | None
    output_per_second: Ratio | None
    equal_answers: float | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One target: its figures over all rounds and per round, and the records behind them."""

    name: str
    model: str
    options: tuple[str, ...]
    figures: Figures
    per_round: tuple[Figures, ...]
    against_first: Against | None
    client: ClientLoad
    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything."""

    machine: Machine
    setting: Setting
    interrupted: bool
    entries: tuple[Entry, ...]


def make_report(results: Sequence[Result], plan: Plan, slo: Slo, *, interrupted: bool) -> Report:
    """Compute every figure. The first of ``results`` is what the others are compared with."""
    workload = plan.workload
    fixed = workload.fixed if plan.fixed is None else plan.fixed
    setting = Setting(
        workload=workload.name,
        sessions=len(workload.sessions),
        turns=workload.turns,
        context=plan.context,
        endpoint=plan.way,
        fixed=fixed,
        real_answers=plan.real_answers,
        pace=plan.pace,
        seed=plan.seed,
        salt=plan.salt,
        rounds=plan.rounds,
        slo=slo,
    )
    entries = tuple(_make_entry(result, results[0], slo) for result in results)
    return Report(describe_machine(), setting, interrupted, entries)


def encode_report(report: Report) -> bytes:
    """The report as JSON; its names are those of the types here."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1)


def describe_machine() -> Machine:
    """The machine that this runs on."""
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        system=platform.platform(),
        python=platform.python_version(),
        memserve=__version__,
    )


def _make_entry(result: Result, first: Result, slo: Slo) -> Entry:
    per_round = tuple(compute_figures((one,), slo) for one in result.rounds)
    against = None if result is first else _compare(result, first, slo)
    return Entry(
        result.target.name,
        result.model,
        result.target.options,
        compute_figures(result.rounds, slo),
        per_round,
        against,
        _worst([one.client for one in result.rounds]),
        result.rounds,
    )


def _compare(result: Result, first: Result, slo: Slo) -> Against:
    """Only rounds that both have are compared, each with its own counterpart."""
    mine = [compute_figures((one,), slo) for one in result.rounds]
    theirs = [compute_figures((one,), slo) for one in first.rounds]

    def ratio(pick: Callable[[Figures], float]) -> Ratio | None:
        return compare_rounds(pick, mine, theirs)

    return Against(
        ttft=ratio(lambda one: one.ttft.mean),
        ttft_p99=ratio(lambda one: one.ttft.p99),
        itl=ratio(lambda one: one.itl.mean),
        itl_p99=ratio(lambda one: one.itl.p99),
        jct=ratio(lambda one: one.jct.mean),
        jct_p99=ratio(lambda one: one.jct.p99),
        output_per_second=ratio(lambda one: one.output_per_second),
        equal_answers=share_equal(result.rounds, first.rounds),
    )


def _worst(loads: Sequence[ClientLoad]) -> ClientLoad:
    """The worst of each over the rounds."""
    return ClientLoad(
        loop_lag_mean=max(load.loop_lag_mean for load in loads),
        loop_lag_max=max(load.loop_lag_max for load in loads),
        late_max=max(load.late_max for load in loads),
        cpu_share=max(load.cpu_share for load in loads),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
