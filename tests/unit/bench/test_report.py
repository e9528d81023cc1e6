"""The report in all its forms: complete, parseable, escaped."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from memserve.bench.comparison import Plan, Result
from memserve.bench.page import render_page
from memserve.bench.records import ClientLoad, Record, Round, Sent, Sources
from memserve.bench.report import Report, encode_report, make_report
from memserve.bench.statistics import Slo
from memserve.bench.svg import (
    Series,
    Span,
    Stack,
    plot_distributions,
    plot_stacks,
    plot_timeline,
    round_ticks,
)
from memserve.bench.table import make_rows, note_report
from memserve.bench.target import Target
from memserve.bench.timeline import Pace
from unit.bench.conftest import make_chats

EVIL = "<script>alert('x')</script>&\""


def record(session: int, turn: int, slow: float, **more: object) -> Record:
    arrivals = tuple(slow * (1 + at) for at in range(4))
    given = {
        "output_tokens": 4,
        "prompt_tokens": 20,
        "sources": Sources(8, 4, 3, 2, 1, 2),
        "answer": "a",
    } | more
    return Record(session, turn, 0.0, 0.0, arrivals[-1], arrivals, **given)  # type: ignore[arg-type]


def make(*, interrupted: bool = False, error: str = "") -> Report:
    def rounds(slow: float) -> tuple[Round, ...]:
        return tuple(
            Round(
                number,
                4.0,
                tuple(record(at, 0, slow * (1 + at + number), error=error) for at in range(3)),
                unfinished=1,
                client=ClientLoad(0.001, 0.1, 0.0, 0.9 if error else 0.1),
                sent=(Sent("prefill", 3 << 20),),
            )
            for number in range(2)
        )

    plan = Plan(make_chats(), 512, Pace(rate=2.0), rounds=2)
    results = (
        Result(Target("base", "http://x"), "tiny", rounds(0.2)),
        Result(Target(EVIL), "tiny", rounds(0.1)),
    )
    return make_report(results, plan, Slo(ttft=0.5), interrupted=interrupted)


def test_figures_are_side_by_side_and_relative_to_the_first() -> None:
    rows = {row.name: row.cells for row in make_rows(make())}
    assert rows["turns answered, failed"] == ("6, 0", "6, 0")
    assert rows["TTFT mean, × base"] == ("1", "0.50")
    assert rows["answers equal to base's"] == ("", "100%")
    assert rows["prompt tokens computed"] == ("48 (40%)", "48 (40%)")
    assert rows["KV moved, MiB"] == ("prefill 6.0", "prefill 6.0")
    # 0.2, 0.4, 0.6 and 0.4, 0.6, 0.8 s to the first token; three of six within 0.5 s, in 8 s.
    assert rows["goodput, turns/s"] == ("0.38", "0.75")
    assert rows["TTFT p50, ms"][0] == "500.0"


def test_a_reader_is_told_what_not_to_believe() -> None:
    notes = note_report(make(interrupted=True, error="status 500: no"))
    assert notes[0].startswith("interrupted")
    assert "base: 6 failed: status 500: no" in notes
    assert "base: 2 turns cut off, 0 never sent" in notes
    assert any("the client itself took 90%" in note for note in notes)


def test_json_holds_everything() -> None:
    body = json.loads(encode_report(make()))
    assert body["setting"]["pace"]["rate"] == 2.0
    assert body["entries"][0]["figures"]["ttft"]["count"] == 6
    assert len(body["entries"][1]["rounds"][1]["records"]) == 3
    assert body["entries"][1]["against_first"]["ttft"]["median"] == pytest.approx(0.5)
    assert body["machine"]["cores"] >= 1


@pytest.mark.parametrize("error", ["", EVIL])
def test_the_page_is_whole_escaped_and_needs_nothing_else(error: str) -> None:
    page = render_page(make(error=error))
    assert page.startswith("<!DOCTYPE html>")
    tree = ElementTree.fromstring(page.partition("\n")[2])
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}svg"))) == 6
    assert not list(tree.iter("script"))
    assert "<script" not in page
    assert EVIL in "".join(tree.itertext())
    # Nothing is fetched: the only address is the name of SVG's vocabulary.
    assert set(re.findall(r"https?://[^\"<\s]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=", page)


def test_plots_of_nothing_are_plots() -> None:
    for plot in (
        plot_distributions("none", "ms", [Series("empty", ()), Series("zero", (0.0,))]),
        plot_timeline("none", []),
        plot_stacks("none", ("a",), [Stack("x", (0.0,))]),
        plot_distributions(EVIL, EVIL, [Series(EVIL, (1.0, 2.0))]),
        plot_timeline(EVIL, [Span(0, 0.0, 1.0, 2.0, failed=True)]),
        plot_stacks(EVIL, (EVIL,), [Stack(EVIL, (1.0,))]),
    ):
        assert ElementTree.fromstring(plot).tag.endswith("svg")
        assert "nan" not in plot


def test_a_distributions_curve_ends_at_its_greatest_value() -> None:
    plot = plot_distributions("t", "ms", [Series("s", tuple(float(at) for at in range(1, 1001)))])
    (line,) = ElementTree.fromstring(plot).iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) == 200
    assert points == sorted(points, key=lambda point: (point[0], -point[1]))
    assert points[-1] == (544.0, 30.0)


@pytest.mark.parametrize(
    ("top", "ticks"), [(10.0, [0, 2, 4, 6, 8, 10]), (0.7, [0, 0.2, 0.4, 0.6]), (3e5, None)]
)
def test_ticks_are_round(top: float, ticks: list[float] | None) -> None:
    made = round_ticks(top)
    assert made[-1] <= top
    assert 3 <= len(made) <= 7
    assert ticks is None or made == ticks
