"""Plots as SVG text: distributions, timelines, stacked bars. Pure; every name is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 560, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 30, 40
_POINTS = 200
"""Points of a curve: more cannot be seen."""

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2", "#ca8a04", "#dc2626", "#64748b")


@dataclass(frozen=True, slots=True)
class Series:
    """A named sample."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """Named values at given times, s."""

    name: str
    at: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A bar of a timeline, on ``row``: waiting from ``begin`` to ``middle``, then answering until ``end``."""

    row: int
    begin: float
    middle: float
    end: float
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    """A named bar of parts; equal positions mean the same part in all bars of a plot."""

    name: str
    parts: tuple[float, ...]


def plot_distributions(title: str, unit: str, samples: Sequence[Series]) -> str:
    """Cumulative distributions: which share of a sample is at most x."""
    top = max((max(one.values) for one in samples if one.values), default=0.0) or 1.0
    parts = [_axis_x(top, unit), *(_label_y(share, f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0))]
    for at, one in enumerate(samples):
        if not one.values:
            continue
        shares = np.linspace(0.0, 1.0, min(_POINTS, len(one.values) + 1))
        values = np.quantile(np.array(one.values), shares)
        points = " ".join(
            f"{_x(value / top):.1f},{_y(share):.1f}"
            for value, share in zip(values.tolist(), shares.tolist(), strict=True)
        )
        colour = COLOURS[at % len(COLOURS)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
    return _frame(title, "".join(parts) + _legend([one.name for one in samples]), HEIGHT)


def plot_lines(title: str, unit: str, lines: Sequence[Line]) -> str:
    """Values over time, in seconds; all lines share one scale from 0, in ``unit``."""
    right = max((max(one.at) for one in lines if one.at), default=0.0) or 1.0
    top = max((max(one.values) for one in lines if one.values), default=0.0) or 1.0
    parts = [_axis_x(right, "s"), *(_label_y(tick / top, f"{tick:g}") for tick in round_ticks(top))]
    parts.append(_text(_LEFT - 6, _TOP - 6, unit, "end"))
    for number, one in enumerate(lines):
        pairs = zip(one.at, one.values, strict=True)
        points = " ".join(f"{_x(at / right):.1f},{_y(value / top):.1f}" for at, value in pairs)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>')
    return _frame(title, "".join(parts) + _legend([one.name for one in lines]), HEIGHT)


def plot_timeline(title: str, spans: Sequence[Span]) -> str:
    """One row per session, one bar per turn: waiting pale, answering dark, failed red."""
    rows = max((span.row for span in spans), default=0) + 1
    step = max(2.0, min(12.0, 400.0 / rows))
    height = int(_TOP + rows * step + _BOTTOM)
    top = max((span.end for span in spans), default=0.0) or 1.0
    bars = "".join(_bar(span, step, top) for span in spans)
    return _frame(title, _axis_x(top, "s", height) + bars, height)


def plot_stacks(title: str, names: Sequence[str], stacks: Sequence[Stack]) -> str:
    """Horizontal bars of the same length, divided by shares; ``names`` of the parts."""
    step, height = 30, _TOP + 30 * len(stacks) + 56
    used = [at for at in range(len(names)) if any(stack.parts[at] for stack in stacks)]
    rows = []
    for row, stack in enumerate(stacks):
        total, left = sum(stack.parts) or 1.0, 0.0
        top = _TOP + row * step
        rows.append(_text(_LEFT + 84, top + 15, stack.name, "end"))
        for at in used:
            share = stack.parts[at] / total
            rows.append(_part(left, share, top, names[at], COLOURS[at % len(COLOURS)]))
            left += share
    legend = _legend([names[at] for at in used], [COLOURS[at % len(COLOURS)] for at in used], height - 30)
    return _frame(title, "".join(rows) + legend, height)


def _part(left: float, share: float, top: float, name: str, colour: str) -> str:
    begin, room = _LEFT + 92, WIDTH - _LEFT - 92 - _RIGHT
    shape = (
        f'<rect x="{begin + left * room:.1f}" y="{top}" width="{share * room:.1f}" height="20" '
        f'fill="{colour}"><title>{escape(name)}: {share:.1%}</title></rect>'
    )
    if share < 0.08:
        return shape
    middle = begin + (left + share / 2) * room
    return (
        shape + f'<text x="{middle:.1f}" y="{top + 14}" text-anchor="middle" fill="#fff">{share:.0%}</text>'
    )


def _bar(span: Span, step: float, top: float) -> str:
    y, height = _TOP + span.row * step, step * 0.8
    edges = [_x(at / top) for at in (span.begin, span.middle, span.end)]
    colours = ("#fca5a5", "#dc2626") if span.failed else ("#bfdbfe", "#2563eb")
    return "".join(
        f'<rect x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}" height="{height:.1f}" fill="{colour}"/>'
        for (left, right), colour in zip(pairwise(edges), colours, strict=True)
    )


def _axis_x(top: float, unit: str, height: int = HEIGHT) -> str:
    base = height - _BOTTOM
    ticks = "".join(
        f'<line x1="{_x(at / top):.1f}" y1="{_TOP}" x2="{_x(at / top):.1f}" y2="{base}" stroke="#e2e8f0"/>'
        + _text(_x(at / top), base + 15, f"{at:g}")
        for at in round_ticks(top)
    )
    return ticks + _text(WIDTH - _RIGHT, base + 30, unit, "end")


def round_ticks(top: float) -> list[float]:
    """About five round numbers from 0 to ``top``."""
    rough = top / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    return [round(at * step, 12) for at in range(int(top / step + 1e-9) + 1)]


def _label_y(share: float, label: str) -> str:
    y = _y(share)
    line = f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#e2e8f0"/>'
    return line + _text(_LEFT - 6, y + 4, label, "end")


def _legend(names: Sequence[str], colours: Sequence[str] = COLOURS, y: int = HEIGHT - 10) -> str:
    parts, x = [], float(_LEFT)
    for at, name in enumerate(names):
        parts.append(
            f'<rect x="{x:.0f}" y="{y - 9}" width="10" height="10" fill="{colours[at % len(colours)]}"/>'
        )
        parts.append(_text(x + 14, y, name, "start"))
        x += 26 + 6.5 * len(name)
    return "".join(parts)


def _frame(title: str, body: str, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" font-family="system-ui, sans-serif" font-size="11">'
        f'<text x="{_LEFT}" y="18" font-size="13" font-weight="600">{escape(title)}</text>{body}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#475569">{escape(text)}</text>'


def _x(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)
