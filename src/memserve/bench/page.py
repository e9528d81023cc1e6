"""The report as one HTML page that needs nothing else: table, plots, setting. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape

from memserve.bench.records import SOURCES, Record
from memserve.bench.report import Entry, Report
from memserve.bench.svg import Series, Span, Stack, plot_distributions, plot_stacks, plot_timeline
from memserve.bench.table import Row, describe_setting, make_rows, note_report

_STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#0f172a}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:2px 14px 2px 0;text-align:right;"
    "border-bottom:1px solid #e2e8f0;font-variant-numeric:tabular-nums}td:first-child{text-align:left}"
    ".note{color:#b45309}.plots{display:flex;flex-wrap:wrap;gap:16px}svg{max-width:100%;height:auto}"
)


def render_page(report: Report) -> str:
    """The whole page."""
    parts = [
        f"<h1>memserve bench: {escape(report.setting.workload)}</h1>",
        f"<p>{escape(describe_setting(report))}</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in note_report(report)),
        render_table([entry.name for entry in report.entries], make_rows(report)),
        f'<div class="plots">{"".join(_plots(report))}</div>',
        _render_setting(report),
    ]
    return render_document("memserve bench", parts)


def render_document(title: str, parts: Iterable[str]) -> str:
    """A page of ``parts``, HTML each."""
    head = f'<meta charset="utf-8"/><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def render_table(columns: Iterable[str], lines: Iterable[Row]) -> str:
    """Figures by name, one column each for ``columns``."""
    names = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr><td>{escape(row.name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in row.cells)}</tr>"
        for row in lines
    )
    return f"<table><thead><tr><th></th>{names}</tr></thead><tbody>{rows}</tbody></table>"


def _plots(report: Report) -> Iterable[str]:
    for title, pick in _DISTRIBUTIONS:
        samples = [Series(entry.name, _collect(entry, pick)) for entry in report.entries]
        yield plot_distributions(title, "ms", samples)
    stacks = [
        Stack(entry.name, tuple(float(getattr(entry.figures.sources, name)) for name in SOURCES))
        for entry in report.entries
    ]
    yield plot_stacks("Where the prompts' KV came from", SOURCES, stacks)
    for entry in report.entries:
        yield plot_timeline(f"{entry.name}: sessions of the first round", _spans(entry))


def _collect(entry: Entry, pick: Callable[[Record], Iterable[float]]) -> tuple[float, ...]:
    answered = (record for one in entry.rounds for record in one.records if not record.error)
    return tuple(seconds * 1e3 for record in answered for seconds in pick(record))


def _spans(entry: Entry) -> list[Span]:
    return [
        Span(record.session, record.due, record.due + record.ttft, record.ended, bool(record.error))
        for record in entry.rounds[0].records
    ]


def _render_setting(report: Report) -> str:
    setting, machine = report.setting, report.machine
    lines = [
        f"{machine.processor}, {machine.cores} cores, {machine.system}, Python {machine.python}, "
        f"memserve {machine.memserve}",
        f"endpoint {setting.endpoint}, {'fixed' if setting.fixed else 'natural'} answer lengths, "
        f"{'given' if setting.real_answers else 'recorded'} answers in later prompts, salt {setting.salt!r}",
        *(f"{entry.name}: {entry.model} {' '.join(entry.options)}" for entry in report.entries),
    ]
    return "<h2>Setting</h2>" + "".join(f"<p>{escape(line)}</p>" for line in lines)


_DISTRIBUTIONS: tuple[tuple[str, Callable[[Record], Iterable[float]]], ...] = (
    ("Time to first token", lambda record: (record.ttft,)),
    ("Time between tokens", lambda record: record.gaps),
    ("Time to the answer's end", lambda record: (record.jct,)),
)
