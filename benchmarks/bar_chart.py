"""Grouped bars on a logarithmic scale as one SVG file: enough for a claim, and no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BAR = 860, 300, 70, 46, 22


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars ``values[series][group]`` (positive), with a word on each in ``labels`` likewise."""

    title: str
    groups: Sequence[str]
    values: Mapping[str, Sequence[float]]
    labels: Mapping[str, Sequence[str]]


def write_chart(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write panels one below the other, each with a scale of its own."""
    body = [f'<text x="{_LEFT}" y="20" font-size="15">{escape(title)}</text>']
    for at, panel in enumerate(panels):
        body.append(f'<g transform="translate(0 {30 + at * _HEIGHT})">{_draw(panel)}</g>')
    height = 60 + len(panels) * _HEIGHT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif"'
    rows = [f'{head} font-size="10">', '<rect width="100%" height="100%" fill="white"/>', *body]
    rows.append(_legend(tuple(panels[0].values), height - 14))
    path.write_text("\n".join([*rows, "</svg>", ""]))


def _draw(panel: Panel) -> str:
    everything = [value for values in panel.values.values() for value in values]
    low, high = math.floor(math.log10(min(everything))), math.ceil(math.log10(max(everything)))
    bottom = _HEIGHT - 40

    def y(value: float) -> float:
        return bottom - (math.log10(value) - low) / max(high - low, 1) * (bottom - _TOP)

    parts = [f'<text x="{_LEFT}" y="30" font-size="13">{escape(panel.title)}</text>']
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 3:.1f}" text-anchor="end">{10.0**power:g}</text>')
    step = (_WIDTH - _LEFT - 20) / len(panel.groups)
    for group, name in enumerate(panel.groups):
        left = _LEFT + group * step + (step - len(panel.values) * 2 * _BAR) / 2
        parts.append(f'<text x="{left}" y="{bottom + 16}" font-size="12">{escape(name)}</text>')
        for at, (series, values) in enumerate(panel.values.items()):
            x, top = left + at * 2 * _BAR, y(values[group])
            colour = _COLOURS[at % len(_COLOURS)]
            size = f'width="{_BAR}" height="{max(bottom - top, 1):.1f}"'
            parts.append(f'<rect x="{x:.1f}" y="{top:.1f}" {size} fill="{colour}"/>')
            label = escape(panel.labels[series][group])
            middle = f'x="{x + _BAR / 2:.1f}" y="{top - 3:.1f}" text-anchor="middle"'
            parts.append(f"<text {middle}>{label}</text>")
    return "\n".join(parts)


def _legend(names: Sequence[str], y: float) -> str:
    parts = []
    for at, name in enumerate(names):
        x = _LEFT + at * 195
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{_COLOURS[at]}"/>')
        parts.append(f'<text x="{x + 15}" y="{y}" font-size="12">{escape(name)}</text>')
    return "\n".join(parts)
