"""The record of a comparison as text: for a terminal and for the documentation. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peers.figures import Row, Spread

REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Setting:
    """All figures of one kind of weights at one number of threads.

    ``limits``: tokens/s that nothing exceeds, by metric. ``refusals``: by engine, then figure ("" for all).
    ``behaviour``: by engine, lines for people.
    """

    weights: str
    threads: int
    engines: tuple[str, ...]
    rows: tuple[Row, ...]
    limits: dict[str, Spread]
    refusals: dict[str, dict[str, str]]
    behaviour: dict[str, dict[str, str]]

    @property
    def title(self) -> str:
        return f"{self.weights} weights, {self.threads} thread{'s' if self.threads > 1 else ''}"


def number(value: float) -> str:
    """Three figures or so."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(value: Spread) -> str:
    """``median (low..high)``."""
    if value.rounds == 1:
        return number(value.median)
    return f"{number(value.median)} ({number(value.low)}..{number(value.high)})"


def cells(setting: Setting, row: Row) -> list[str]:
    """Metric, each engine's figure, ours to the best peer's, share of the limit that ours reaches."""
    texts = [row.metric]
    for engine in setting.engines:
        figure = row.figures.get(engine)
        texts.append(spread(figure) if figure else REFUSED)
    texts.append(spread(row.to_best) if row.to_best else "–")
    limit, own = setting.limits.get(row.metric), row.figures.get(setting.engines[0])
    texts.append(f"{number(limit.median)} ({own.median / limit.median:.2f})" if limit and own else "–")
    return texts


def refusal(setting: Setting, engine: str, metric: str) -> str:
    """Why an engine has no figure for a metric."""
    reasons = setting.refusals.get(engine, {})
    return reasons.get(metric.split(":")[0]) or reasons.get("") or "not measured"


def header(setting: Setting) -> list[str]:
    return ["figure", *setting.engines, "ours to the best peer", "limit (ours of it)"]


def refusals(setting: Setting) -> list[str]:
    """One line for each refusal; the reasons behind the table's ``refused``."""
    return [
        f"{engine}, {figure or 'all figures'}: refused: {reason}"
        for engine, reasons in setting.refusals.items()
        for figure, reason in reasons.items()
    ]


def as_text(setting: Setting) -> str:
    """For a terminal."""
    table = [header(setting), *(cells(setting, row) for row in setting.rows)]
    widths = [max(len(line[at]) for line in table) for at in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join([f"\n{setting.title}", *lines, *refusals(setting), *behaviours(setting)])


def as_markdown(model: str, settings: Sequence[Setting]) -> str:
    """For the documentation: a table for each setting, and what is to be said about it."""
    parts = [f"### {model}"]
    for setting in settings:
        parts += ["", f"**{setting.title}**", ""]
        parts += [_line(header(setting)), _line(["---"] * len(header(setting)))]
        parts += [_line(cells(setting, row)) for row in setting.rows]
        notes = [*refusals(setting), *behaviours(setting)]
        parts += ["", *(f"- {note}" for note in notes)]
    return "\n".join(parts) + "\n"


def behaviours(setting: Setting) -> list[str]:
    return [
        f"{engine}: {', '.join(f'{name} {value}' for name, value in lines.items())}"
        for engine, lines in setting.behaviour.items()
    ]


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
