"""Figures against another library's, and against what can be counted by hand."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.bench.records import Record, Round, Sent, Sources
from memserve.bench.statistics import (
    Slo,
    Summary,
    compare_rounds,
    compute_figures,
    share_equal,
    summarize,
)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=300))
def test_summaries_agree_with_the_standard_library(values: list[float]) -> None:
    summary = summarize(values)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert summary.count == len(values)
    assert summary.mean == pytest.approx(statistics.fmean(values))
    assert (summary.p50, summary.p90, summary.p99) == pytest.approx((cuts[49], cuts[89], cuts[98]))


def test_no_values_have_no_summary() -> None:
    assert summarize([]) == Summary()


def record(
    turn: int = 0, *, due: float = 0.0, first: float = 0.5, gap: float = 0.1, **more: object
) -> Record:
    """Three tokens: after ``first`` seconds, and every ``gap``."""
    arrivals = tuple(due + first + at * gap for at in range(3))
    given = {"prompt_tokens": 10, "output_tokens": 3, "sources": Sources(computed=4, local=6)} | more
    return Record(0, turn, due, due, arrivals[-1], arrivals, **given)  # type: ignore[arg-type]


def test_a_records_times() -> None:
    one = record(due=2.0)
    assert one.ttft == pytest.approx(0.5)
    assert one.jct == pytest.approx(0.7)
    assert one.tpot == pytest.approx(0.1)
    assert one.gaps == pytest.approx((0.1, 0.1))
    assert record(output_tokens=1).tpot is None


def test_figures_count_what_was_answered_only() -> None:
    records = (record(0), record(1, first=0.9), record(2, error="status 500: no"), record(3, exact=False))
    one = Round(0, 2.0, records, unfinished=1, never_sent=2, sent=(Sent("prefill", 7), Sent("decode", 5)))
    figures = compute_figures((one,), Slo(ttft=0.6))
    assert (figures.turns, figures.failed, figures.unfinished, figures.never_sent) == (3, 1, 1, 2)
    assert figures.ttft.mean == pytest.approx((0.5 + 0.9 + 0.5) / 3)
    assert figures.ttft_later.mean == pytest.approx(0.7)
    assert figures.turns_per_second == 1.5
    assert figures.output_per_second == 4.5
    assert figures.goodput == 1.0
    assert figures.sources == Sources(computed=12, local=18)
    assert figures.inexact == 1
    assert figures.sent_bytes == 12


def test_bytes_are_unknown_if_one_round_does_not_say_them() -> None:
    rounds = (Round(0, 1.0, (), sent=(Sent("prefill", 7),)), Round(1, 1.0, ()))
    assert compute_figures(rounds, Slo()).sent_bytes is None


def test_an_objective_is_kept_by_both_times() -> None:
    assert Slo(ttft=0.5, itl=0.11).kept_by(record(first=0.4))
    assert not Slo(ttft=0.3).kept_by(record(first=0.4))
    assert not Slo(itl=0.05).kept_by(record())
    assert not Slo(ttft=9.0).kept_by(record(error="x"))
    assert compute_figures((Round(0, 1.0, (record(),)),), Slo()).goodput is None


def test_ratios_are_taken_round_by_round() -> None:
    mine, theirs = (
        [compute_figures((Round(0, 1.0, (record(first=first),)),), Slo()) for first in firsts]
        for firsts in ((1.0, 3.0, 4.0), (2.0, 4.0, 4.0))
    )
    ratio = compare_rounds(lambda one: one.ttft.mean, mine, theirs)
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((0.75, 0.5, 1.0))
    assert compare_rounds(lambda one: 0.0, mine, theirs) is None


def test_equal_answers_are_counted_among_those_that_both_gave() -> None:
    first = (Round(0, 1.0, (record(0, answer="a"), record(1, answer="b"), record(2, error="x"))),)
    other = (Round(0, 1.0, (record(0, answer="a"), record(1, answer="c"), record(2, answer="d"))),)
    assert share_equal(other, first) == 0.5
    assert share_equal((), first) is None


def test_sources_add_up() -> None:
    both = Sources(computed=1, host=2) + Sources(computed=3, unknown=4)
    assert (both.total, both.reused) == (10, 2)
