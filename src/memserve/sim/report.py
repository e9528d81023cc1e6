"""What came out of simulated trials: every figure and every record, as types and as rows of text. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from memserve import __version__
from memserve.bench.records import SOURCES, Record
from memserve.bench.statistics import Figures, Slo, Summary, compute_figures, summarize
from memserve.bench.table import Row
from memserve.bench.timeline import Pace
from memserve.core.types import StepPrices
from memserve.sim.site import Change, Loss, Site
from memserve.sim.speeds import Profile
from memserve.sim.trial import Busy, Load, Trial

_KINDS = 3
"""Kinds of errors that are shown."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What was simulated; with the version, all that makes it the same again."""

    memserve: str
    workload: str
    sessions: int
    turns: int
    pace: Pace
    seed: int
    shape: str
    profile: str
    source: str
    prices: StepPrices
    kv_tokens: int
    changes: tuple[Change, ...]
    slo: Slo


@dataclass(frozen=True, slots=True)
class Entry:
    """One trial. ``good``: share of all turns that kept the SLO; ``utilization``: share of the time in which
    instances had work, on average; ``prediction``: errors of the predicted time to the first token, relative.
    """

    name: str
    figures: Figures
    good: float
    moved: int
    fetched: int
    utilization: float
    prediction: Summary
    busy: tuple[Busy, ...]
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class SimReport:
    """Everything."""

    setting: Setting
    entries: tuple[Entry, ...]


def make_report(
    load: Load, site: Site, profile: Profile, changes: Sequence[Change], slo: Slo, trials: Sequence[Trial]
) -> SimReport:
    """Compute every figure."""
    workload = load.workload
    setting = Setting(
        memserve=__version__,
        workload=workload.name,
        sessions=len(workload.sessions),
        turns=workload.turns,
        pace=load.pace,
        seed=load.seed,
        shape=site.shape,
        profile=profile.name,
        source=profile.source,
        prices=site.speed.prices,
        kv_tokens=site.blocks * 16,
        changes=tuple(changes),
        slo=slo,
    )
    return SimReport(setting, tuple(make_entry(trial, slo) for trial in trials))


def make_entry(trial: Trial, slo: Slo) -> Entry:
    """The figures of one trial."""
    measured = trial.measured
    return Entry(
        trial.policy,
        compute_figures((measured,), slo),
        share_good(measured.records, slo),
        trial.moved,
        trial.fetched,
        trial.utilization,
        summarize(trial.errors),
        trial.busy,
        measured.records,
    )


def share_good(records: Sequence[Record], slo: Slo) -> float:
    """Share of all turns, failed ones included, that kept the SLO."""
    return sum(slo.kept_by(record) for record in records) / max(len(records), 1)


def encode_report(report: SimReport) -> bytes:
    """The report as JSON; its names are those of the types here. Equal runs give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1)


def describe_setting(report: SimReport) -> list[str]:
    """What was simulated, in lines."""
    setting, pace = report.setting, report.setting.pace
    if pace.concurrency is not None:
        load = f"{pace.concurrency} sessions at a time"
    elif pace.rate is not None:
        load = f"{pace.rate:.3g} sessions/s"
    else:
        load = f"recorded arrivals at {pace.speed:g} times their speed"
    lines = [
        f"{setting.workload}: {setting.sessions} sessions, {setting.turns} turns, {load}, "
        f"seed {setting.seed}",
        f"{setting.shape}: {setting.profile}, {setting.kv_tokens:,} tokens of KV each ({setting.source})",
    ]
    return lines + [_describe(change) for change in setting.changes]


def note_report(report: SimReport) -> list[str]:
    """What a reader must know before believing the figures."""
    lines = []
    for entry in report.entries:
        errors = Counter(record.error for record in entry.records if record.error)
        lines += [f"{entry.name}: {count} failed: {error}" for error, count in errors.most_common(_KINDS)]
    return lines


def make_rows(report: SimReport) -> list[Row]:
    """All figures, one column per trial."""
    entries = report.entries
    rows = [
        Row(f"{name} {part}, s", tuple(_seconds(pick(entry.figures), part) for entry in entries))
        for name, pick in _SUMMARIES
        for part in ("mean", "p50", "p99")
    ]
    rows += [Row(name, tuple(show(entry) for entry in entries)) for name, show in _ROWS]
    for source in SOURCES:
        shares = [_share(entry, source) for entry in entries]
        if any(shares):
            rows.append(Row(f"prompt tokens {source}", tuple(f"{share:.1%}" for share in shares)))
    if report.setting.slo.given:
        rows.append(Row("turns that kept the SLO", tuple(f"{entry.good:.1%}" for entry in entries)))
    return rows


def _describe(change: Change) -> str:
    if not isinstance(change, Loss):
        return f"at {change.at:g} s {change.instance} becomes {change.role}"
    back = "for good" if change.back is None else f"and is back {change.back:g} s later"
    return f"at {change.at:g} s {change.instance} is lost {back}"


def _seconds(summary: Summary, part: str) -> str:
    return f"{getattr(summary, part):,.3f}" if summary.count else "–"


def _share(entry: Entry, source: str) -> float:
    sources = entry.figures.sources
    return float(getattr(sources, source)) / max(sources.total, 1)


_SUMMARIES: tuple[tuple[str, Callable[[Figures], Summary]], ...] = (
    ("TTFT", lambda one: one.ttft),
    ("TPOT", lambda one: one.tpot),
    ("JCT", lambda one: one.jct),
)
_ROWS: tuple[tuple[str, Callable[[Entry], str]], ...] = (
    ("turns answered, failed, moved", lambda x: f"{x.figures.turns}, {x.figures.failed}, {x.moved}"),
    ("turns/s", lambda x: f"{x.figures.turns_per_second:.2f}"),
    ("output tokens/s", lambda x: f"{x.figures.output_per_second:,.0f}"),
    ("prefixes fetched", lambda x: f"{x.fetched:,}"),
    ("time with work", lambda x: f"{x.utilization:.0%}"),
    ("predicted TTFT off by, p50 · p90", lambda x: f"{x.prediction.p50:.0%} · {x.prediction.p90:.0%}"),
)
