"""The report of a simulation as one HTML page that needs nothing else. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

import numpy as np

from memserve.bench.page import render_document, render_table
from memserve.bench.records import SOURCES, Record
from memserve.bench.svg import Line, Series, Stack, plot_distributions, plot_lines, plot_stacks
from memserve.sim.report import Entry, SimReport, describe_setting, make_rows, note_report

_BINS = 80
"""Points of a line over time."""


def render_page(report: SimReport) -> str:
    """The whole page."""
    entries = report.entries
    parts = [
        f"<h1>memserve sim: {escape(report.setting.workload)} on {escape(report.setting.shape)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in describe_setting(report)),
        *(f'<p class="note">{escape(note)}</p>' for note in note_report(report)),
        render_table([entry.name for entry in entries], make_rows(report)),
        f'<div class="plots">{"".join(_plots(entries))}</div>',
    ]
    return render_document("memserve sim", parts)


def _plots(entries: Sequence[Entry]) -> Iterable[str]:
    for title, pick in _DISTRIBUTIONS:
        samples = [Series(one.name, _collect(one, pick)) for one in entries]
        yield plot_distributions(title, "s", samples)
    stacks = [
        Stack(x.name, tuple(float(getattr(x.figures.sources, name)) for name in SOURCES)) for x in entries
    ]
    yield plot_stacks("Where the prompts' KV came from", SOURCES, stacks)
    end = max((record.ended for one in entries for record in one.records), default=0.0) or 1.0
    for title, unit, over_time in _TIMELINES:
        yield plot_lines(title, unit, [over_time(one, end) for one in entries])


def _collect(entry: Entry, pick: Callable[[Record], float | None]) -> tuple[float, ...]:
    values = (pick(record) for record in entry.records if not record.error)
    return tuple(value for value in values if value is not None)


def _in_flight(entry: Entry, end: float) -> Line:
    at = np.linspace(0.0, end, _BINS)
    begun = np.sort([record.due for record in entry.records])
    ended = np.sort([record.ended for record in entry.records])
    open_then = np.searchsorted(begun, at, "right") - np.searchsorted(ended, at, "right")
    return Line(entry.name, tuple(at.tolist()), tuple(open_then.astype(float).tolist()))


def _hit_rate(entry: Entry, end: float) -> Line:
    reused = [float(record.sources.reused) for record in entry.records]
    return _ratio_over_time(entry, end, reused, [float(record.prompt_tokens) for record in entry.records])


def _waiting(entry: Entry, end: float) -> Line:
    return _ratio_over_time(entry, end, [record.ttft for record in entry.records], [1.0] * len(entry.records))


def _ratio_over_time(entry: Entry, end: float, above: Sequence[float], below: Sequence[float]) -> Line:
    """Sums of ``above`` over sums of ``below``, by when requests came; bins without any are left out."""
    edges = np.linspace(0.0, end, _BINS + 1)
    at = [record.due for record in entry.records]
    tops, _ = np.histogram(at, edges, weights=above)
    bottoms, _ = np.histogram(at, edges, weights=below)
    some = bottoms > 0
    middles = (edges[:-1] + edges[1:]) / 2
    return Line(entry.name, tuple(middles[some].tolist()), tuple((tops[some] / bottoms[some]).tolist()))


_DISTRIBUTIONS: tuple[tuple[str, Callable[[Record], float | None]], ...] = (
    ("Time to first token", lambda record: record.ttft),
    ("Time per further token", lambda record: record.tpot),
    ("Time to the answer's end", lambda record: record.jct),
)
_TIMELINES: tuple[tuple[str, str, Callable[[Entry, float], Line]], ...] = (
    ("Requests under way", "", _in_flight),
    ("Mean time to first token, by arrival", "s", _waiting),
    ("Share of prompt tokens found cached, by arrival", "", _hit_rate),
)
