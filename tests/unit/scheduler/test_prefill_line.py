"""The forecast of a line: in order, out of order, late, given up."""

from __future__ import annotations

import math
from itertools import count, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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
    assert (line.free_at, line.mark().at) == (now, -math.inf)


def test_an_overdue_line_is_not_free_before_now() -> None:
    line = PrefillLine()
    line.join(A, 0.0, 1.0)
    line.join(B, 0.0, 1.0)
    line.leave(B, 9.0)
    assert line.free_at == 9.0
    assert line.mark().at is None, "A is still there"


def stepwise(lefts: list[float], tick: float) -> float:
    """When the last of ``lefts``, in order of arrival, is done: a tick at a time, half and half."""
    lefts, new = list(lefts), len(lefts) - 1
    for ticks in count(1):
        alive = [at for at, left in enumerate(lefts) if left > 0]
        shortest = min(alive, key=lambda at: lefts[at])
        for at in (alive[0], shortest):
            lefts[at] -= tick / 2
        if lefts[new] <= 0:
            return ticks * tick
    raise AssertionError("unreachable")


@given(st.lists(st.floats(0.1, 5.0), max_size=5), st.floats(0.1, 5.0))
def test_forecast_is_what_half_and_half_comes_to(ahead: list[float], seconds: float) -> None:
    tick = 0.01
    # Who is the shortest of equals, rounding decides in the one or the other.
    ordered = sorted([*ahead, seconds])
    assume(all(longer - shorter > tick for shorter, longer in pairwise(ordered)))
    line = PrefillLine()
    for n, each in enumerate(ahead):
        line.join(RequestId(str(n)), 7.0, each)
    assert line.forecast(7.0, seconds) == pytest.approx(
        stepwise([*ahead, seconds], tick), abs=(len(ahead) + 2) * tick
    )
    assert line.forecast(7.0, seconds) <= sum(ahead) + seconds + 1e-9


def test_a_forecast_knows_what_has_been_done() -> None:
    line = PrefillLine()
    line.join(A, 0.0, 10.0)
    line.join(B, 0.0, 1.0)
    assert line.forecast(1.0, 2.0) == pytest.approx(5.0), (
        "half a second more of B, at half speed, then two of its own"
    )


def test_one_that_is_overdue_lets_nobody_pass_who_is_longer() -> None:
    line = PrefillLine()
    line.join(A, 0.0, 1.0)
    line.join(B, 0.0, 2.0)
    assert line.forecast(5.0, 3.0) == pytest.approx(5.0), "A is done at any moment, B has not begun"


def test_who_comes_later_delays_all_but_those_in_the_running_step() -> None:
    line, step = PrefillLine(), 1.0
    assert line.count_delayed(step) == 0
    line.join(RequestId("computed"), 0.0, 0.4)
    assert line.count_delayed(step) == 0, "it is done with its step"
    line.join(RequestId("short"), 0.1, 0.2)
    line.join(RequestId("long"), 0.2, 3.0)
    assert line.count_delayed(step) == 2, "both get into the next step"
    line.leave(RequestId("computed"), 0.4)
    assert line.count_delayed(step) == 1, "the long one takes more than the step that has begun"
    line.join(RequestId("next"), 0.5, 0.2)
    assert line.count_delayed(step) == 2
    line.leave(RequestId("short"), 0.6)
    line.leave(RequestId("long"), 3.6)
    assert line.count_delayed(step) == 0
