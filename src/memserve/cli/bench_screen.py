"""What ``memserve bench`` shows: progress while it runs, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from memserve.bench.records import SOURCES, Record
from memserve.bench.report import Entry, Report
from memserve.bench.statistics import Figures, Ratio, Summary
from memserve.cli.sizes import show_size

_BUSY_CLIENT, _LATE_CLIENT = 0.5, 0.05
"""Share of a core, and seconds of lateness, from which the client may be measuring itself."""


class BenchScreen:
    """A bar per target and round on a terminal, a line each elsewhere. Use as a context."""

    def __init__(self, console: Console, turns: int, rounds: int) -> None:
        self._console = console
        self._turns = turns
        self._rounds = rounds
        self._failed = 0
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> BenchScreen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def starting(self, target: str, number: int) -> None:
        """A target is started or asked for."""
        name = escape(target) if self._rounds == 1 else f"{escape(target)} {number + 1}/{self._rounds}"
        self._failed = 0
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=self._turns, note="starting")

    def running(self, target: str, number: int) -> None:
        """Its load begins."""
        self._update(note="")
        if not self._console.is_terminal:
            line = f"{target}: round {number + 1} of {self._rounds}, {self._turns} turns"
            self._console.print(line, markup=False, highlight=False)

    def turn_ended(self, record: Record) -> None:
        """A turn was answered, or failed."""
        self._failed += bool(record.error)
        self._update(advance=1, note=f"[red]{self._failed} failed" if self._failed else "")

    def _update(self, advance: float | None = None, note: str = "") -> None:
        if self._task is not None:
            self._progress.update(self._task, advance=advance, note=note)


def print_report(report: Report, console: Console) -> None:
    """The figures of all targets side by side, then what to know about them."""
    console.print(_describe_setting(report), markup=False, highlight=False)
    console.print(_make_table(report.entries))
    for line in note_report(report):
        console.print(line, style="yellow", markup=False, highlight=False)


def note_report(report: Report) -> list[str]:
    """What a reader must know before believing the figures."""
    notes = ["interrupted: the figures are of what was answered before"] if report.interrupted else []
    for entry in report.entries:
        figures, client = entry.figures, entry.client
        notes += [f"{entry.name}: {line}" for line in _note_failures(entry)]
        if figures.inexact:
            notes.append(f"{entry.name}: {figures.inexact} turns whose sources do not add up to the prompt")
        if client.cpu_share > _BUSY_CLIENT or client.loop_lag_mean > _LATE_CLIENT:
            notes.append(
                f"{entry.name}: the client itself took {client.cpu_share:.0%} of a core and was late by "
                f"{client.loop_lag_mean * 1e3:.1f} ms on average (at most {client.loop_lag_max * 1e3:.0f}): "
                "part of what was measured is the client; lower the load"
            )
    return notes


def _note_failures(entry: Entry) -> list[str]:
    errors: dict[str, int] = {}
    for one in entry.rounds:
        for record in one.records:
            if record.error:
                errors[record.error] = errors.get(record.error, 0) + 1
    most = sorted(errors.items(), key=lambda item: -item[1])[:3]
    lines = [f"{count} failed: {error}" for error, count in most]
    missing = entry.figures.unfinished + entry.figures.never_sent
    if missing:
        lines.append(f"{entry.figures.unfinished} turns cut off, {entry.figures.never_sent} never sent")
    return lines


def _describe_setting(report: Report) -> str:
    setting = report.setting
    pace = setting.pace
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


def _make_table(entries: tuple[Entry, ...]) -> Table:
    table = Table("", box=None, padding=(0, 2, 0, 0))
    for entry in entries:
        table.add_column(escape(entry.name), justify="right")
    figures = [entry.figures for entry in entries]
    for name, pick in _SUMMARIES:
        for part in ("mean", "p50", "p90", "p99"):
            values = [_milliseconds(pick(one), part) for one in figures]
            table.add_row(f"{name} {part}, ms", *values)
    for name, show in _ROWS:
        table.add_row(name, *(show(one) for one in figures))
    for source in SOURCES:
        counts = [getattr(one.sources, source) for one in figures]
        if any(counts):
            totals = (max(one.sources.total, 1) for one in figures)
            cells = (f"{count:,} ({count / total:.0%})" for count, total in zip(counts, totals, strict=True))
            table.add_row(f"prompt tokens {source}", *cells)
    if len(entries) > 1:
        _add_ratios(table, entries)
    table.add_row("client: core, lag ms", *(_client(entry) for entry in entries), style="dim")
    return table


def _add_ratios(table: Table, entries: tuple[Entry, ...]) -> None:
    against = [entry.against_first for entry in entries]
    table.add_row(f"[dim]against {escape(entries[0].name)}: median (least–greatest of rounds)[/]")
    for name in ("ttft", "ttft_p99", "itl", "itl_p99", "jct", "jct_p99", "output_per_second"):
        cells = ("1" if one is None else show_ratio(getattr(one, name)) for one in against)
        table.add_row(f"× {_RATIO_NAMES[name]}", *cells)
    equal = (
        "" if one is None or one.equal_answers is None else f"{one.equal_answers:.0%}" for one in against
    )
    table.add_row("equal answers", *equal)


def show_ratio(ratio: Ratio | None) -> str:
    """A ratio and its spread over the rounds."""
    if ratio is None:
        return "–"
    if ratio.low == ratio.high:
        return f"{ratio.median:.2f}"
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def _milliseconds(summary: Summary, part: str) -> str:
    return f"{getattr(summary, part) * 1e3:,.1f}" if summary.count else "–"


def _client(entry: Entry) -> str:
    return f"{entry.client.cpu_share:.2f}, {entry.client.loop_lag_mean * 1e3:.1f}"


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
    ("KV moved", lambda one: "–" if one.sent_bytes is None else show_size(one.sent_bytes)),
)
_RATIO_NAMES = {
    "ttft": "TTFT mean",
    "ttft_p99": "TTFT p99",
    "itl": "ITL mean",
    "itl_p99": "ITL p99",
    "jct": "JCT mean",
    "jct_p99": "JCT p99",
    "output_per_second": "output tokens/s",
}
