"""The forecast of a line: in order, out of order, late, given up."""

from __future__ import annotations

import pytest

from memserve.core.types import RequestId
from memserve.scheduler.line import PrefillLine

A, B, C = (RequestId(name) for name in "abc")


def test_line_is_served_in_order() -> None:
    line = PrefillLine()
    assert line.join(A, 10.0, 2.0) == 12.0
    assert line.join(B, 11.0, 3.0) == 15.0
    line.leave(A, 12.0)
    line.leave(B, 15.0)
    assert line.free_at == 15.0
    assert line.join(C, 20.0, 1.0) == 21.0


def test_a_late_first_delays_those_behind() -> None:
    line = PrefillLine()
    line.join(A, 0.0, 2.0)
    line.join(B, 0.0, 3.0)
    line.leave(A, 4.0)
    assert line.free_at == 7.0


def test_an_early_first_lets_the_line_end_earlier() -> None:
    line = PrefillLine()
    line.join(A, 0.0, 2.0)
    line.join(B, 0.0, 3.0)
    line.leave(A, 1.0)
    assert line.free_at == 4.0


def test_one_that_overtakes_takes_nothing_from_the_whole() -> None:
    line = PrefillLine()
    line.join(A, 0.0, 10.0)
    line.join(B, 0.0, 1.0)
    line.leave(B, 2.0)
    assert line.free_at == 11.0
    line.leave(A, 11.0)
    assert line.free_at == 11.0


@pytest.mark.parametrize("now", [0.0, 5.0])
def test_an_empty_line_is_free_now(now: float) -> None:
    line = PrefillLine()
    line.join(A, 0.0, 4.0)
    line.leave(A, now)
    line.leave(A, now)
    assert (line.free_at, line.last) == (now, None)


def test_an_overdue_line_is_not_free_before_now() -> None:
    line = PrefillLine()
    line.join(A, 0.0, 1.0)
    line.join(B, 0.0, 1.0)
    line.leave(B, 9.0)
    assert line.free_at == 9.0
    assert line.last == A
