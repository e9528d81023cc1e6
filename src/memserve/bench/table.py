"""A report as rows of text, for the terminal and the page alike, and the notes that go with it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from memserve.bench.records import SOURCES
from memserve.bench.report import Against, Entry, Report
from memserve.bench.statistics import Figures, Ratio, Summary

_BUSY_CLIENT, _LATE_CLIENT = 0.5, 0.05
"""Share of a core, and seconds of lateness, from which the client may be measuring itself."""

_LEGEND = 3
"""Kinds of errors that are shown."""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure's name and its value for each target."""

    name: str
    cells: tuple[str, ...]


def make_rows(report: Report) -> list[Row]:
    """All figures, one column per target."""
    entries = report.entries
    rows = [
        Row(f"{name} {part}, ms", tuple(_milliseconds(pick(entry.figures), part) for entry in entries))
        for name, pick in _SUMMARIES
        for part in ("mean", "p50", "p90", "p99")
    ]
    rows += [Row(name, tuple(show(entry.figures) for entry in entries)) for name, show in _ROWS]
    rows += _source_rows(entries)
    if any(entry.figures.sent_bytes for entry in entries):
        rows.append(Row("KV moved, MiB", tuple(_moved(entry) for entry in entries)))
    if len(entries) > 1:
        rows += _ratio_rows(entries)
    clients = (f"{entry.client.cpu_share:.2f}, {entry.client.loop_lag_mean * 1e3:.1f}" for entry in entries)
    return [*rows, Row("client: cores, lag in ms", tuple(clients))]


def describe_setting(report: Report) -> str:
    """What was run, in a line."""
    setting, pace = report.setting, report.setting.pace
    if pace.concurrency is not None:
        load = f"{pace.concurrency} sessions at a time"
    elif pace.rate is not None:
        load = f"{pace.rate:g} sessions/s"
    else:
        load = f"recorded arrivals at {pace.speed:g} times their speed"
    return (
        f"{setting.workload}: {setting.sessions} sessions, {setting.turns} turns, {load} · context "
        f"{setting.context} · seed {setting.seed} · {setting.rounds} round(s)"
    )


def note_report(report: Report) -> list[str]:
    """What a reader must know before believing the figures."""
    notes = ["interrupted: the figures are of what was answered before"] if report.interrupted else []
    return notes + [f"{entry.name}: {line}" for entry in report.entries for line in _note_entry(entry)]


def _note_entry(entry: Entry) -> list[str]:
    figures, client = entry.figures, entry.client
    errors = Counter(record.error for one in entry.rounds for record in one.records if record.error)
    lines = [f"{count} failed: {error}" for error, count in errors.most_common(_LEGEND)]
    if figures.unfinished or figures.never_sent:
        lines.append(f"{figures.unfinished} turns cut off, {figures.never_sent} never sent")
    if figures.inexact:
        lines.append(f"{figures.inexact} turns whose sources do not add up to the prompt")
    if client.cpu_share > _BUSY_CLIENT or client.loop_lag_mean > _LATE_CLIENT:
        lines.append(
            f"the client itself took {client.cpu_share:.0%} of a core and was late by "
            f"{client.loop_lag_mean * 1e3:.1f} ms on average (at most {client.loop_lag_max * 1e3:.0f}): "
            "part of what was measured is the client or other work on its machine"
        )
    return lines


def _source_rows(entries: tuple[Entry, ...]) -> list[Row]:
    rows = []
    for source in SOURCES:
        counts = [getattr(entry.figures.sources, source) for entry in entries]
        if any(counts):
            totals = (max(entry.figures.sources.total, 1) for entry in entries)
            cells = (f"{count:,} ({count / total:.0%})" for count, total in zip(counts, totals, strict=True))
            rows.append(Row(f"prompt tokens {source}", tuple(cells)))
    return rows


def _ratio_rows(entries: tuple[Entry, ...]) -> list[Row]:
    against = [entry.against_first for entry in entries]
    rows = [
        Row(
            f"{name}, × {entries[0].name}",
            tuple("1" if one is None else show_ratio(pick(one)) for one in against),
        )
        for name, pick in _RATIOS
    ]
    equal = (
        "" if one is None or one.equal_answers is None else f"{one.equal_answers:.0%}" for one in against
    )
    return [*rows, Row(f"answers equal to {entries[0].name}'s", tuple(equal))]


def show_ratio(ratio: Ratio | None) -> str:
    """A ratio: median, and least to greatest of the rounds."""
    if ratio is None:
        return "–"
    if ratio.low == ratio.high:
        return f"{ratio.median:.2f}"
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def _milliseconds(summary: Summary, part: str) -> str:
    return f"{getattr(summary, part) * 1e3:,.1f}" if summary.count else "–"


def _moved(entry: Entry) -> str:
    """Bytes sent, by the sender's role."""
    if entry.figures.sent_bytes is None:
        return "–"
    roles: Counter[str] = Counter()
    for one in entry.rounds:
        for sent in one.sent or ():
            roles[sent.role] += sent.bytes
    return ", ".join(f"{role} {count / 2**20:.1f}" for role, count in roles.items() if count) or "0"


_SUMMARIES: tuple[tuple[str, Callable[[Figures], Summary]], ...] = (
    ("TTFT", lambda one: one.ttft),
    ("ITL", lambda one: one.itl),
    ("JCT", lambda one: one.jct),
)
_ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("TTFT of later turns, mean, ms", lambda one: _milliseconds(one.ttft_later, "mean")),
    ("TPOT mean, ms", lambda one: _milliseconds(one.tpot, "mean")),
    ("turns answered, failed", lambda one: f"{one.turns}, {one.failed}"),
    ("turns/s", lambda one: f"{one.turns_per_second:.2f}"),
    ("output tokens/s", lambda one: f"{one.output_per_second:.1f}"),
    ("goodput, turns/s", lambda one: "–" if one.goodput is None else f"{one.goodput:.2f}"),
)
_RATIOS: tuple[tuple[str, Callable[[Against], Ratio | None]], ...] = (
    ("TTFT mean", lambda one: one.ttft),
    ("TTFT p99", lambda one: one.ttft_p99),
    ("ITL mean", lambda one: one.itl),
    ("ITL p99", lambda one: one.itl_p99),
    ("JCT mean", lambda one: one.jct),
    ("JCT p99", lambda one: one.jct_p99),
    ("output tokens/s", lambda one: one.output_per_second),
)
