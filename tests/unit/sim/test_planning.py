"""The search for the fewest instances, against clusters whose needs are known."""

from __future__ import annotations

import pytest

from memserve.bench.records import Record
from memserve.bench.statistics import Slo, Summary
from memserve.core.errors import ConfigError
from memserve.sim.planning import Goal, Search, Shape, Tally, Tried, search

SLO = Slo(1.0, 0.1)


def goal(most: int = 64) -> Goal:
    return Goal(SLO, 0.99, most)


def run(needs: tuple[int, int, int], most: int = 64) -> Search:
    """Where so many prefill and so many decode instances are enough, or so many colocated ones."""
    prefill, decode, colocated = needs

    def attempt(shape: Shape) -> Tried:
        late = 20 * (shape.prefill < prefill)
        slow = 10 * (shape.decode < decode)
        if shape.colocated:
            late, slow = 20 * (shape.colocated < colocated), 0
        return Tried(shape, not (late or slow), 0.9, True, late, slow, Summary(), Summary(), 0.5)

    return search(goal(most), attempt)


@pytest.mark.parametrize(
    ("needs", "best"),
    [
        ((99, 99, 1), Shape(colocated=1)),
        ((99, 99, 13), Shape(colocated=13)),
        ((6, 2, 9), Shape(6, 2)),
        ((1, 7, 9), Shape(1, 7)),
        ((6, 3, 9), Shape(colocated=9)),
        ((20, 43, 99), Shape(20, 43)),
        ((99, 99, 64), Shape(colocated=64)),
    ],
)
def test_the_smallest_that_is_enough_is_found(needs: tuple[int, int, int], best: Shape) -> None:
    found = run(needs)
    assert found.best is not None
    assert found.best.shape == best
    assert len({one.shape for one in found.tried}) == len(found.tried) < 60


def test_where_nothing_is_enough_nothing_is_found() -> None:
    found = run((5, 5, 12), most=9)
    assert found.best is None
    assert max(one.shape.size for one in found.tried) == 9


@pytest.mark.parametrize(("share", "most"), [(0.0, 4), (1.5, 4), (0.9, 0)])
def test_goals_that_make_no_sense_are_refused(share: float, most: int) -> None:
    with pytest.raises(ConfigError, match=r"--share|--max-instances"):
        Goal(SLO, share, most)


def turn(ttft: float, tpot: float, error: str = "") -> Record:
    return Record(0, 0, 0.0, 0.0, ttft + 10 * tpot, (ttft, ttft + 10 * tpot), 5, 11, error=error)


def test_turns_are_counted_by_what_they_broke() -> None:
    tally = Tally(Goal(SLO, 0.6, 4), turns=5)
    for record in (turn(0.5, 0.05), turn(2.0, 0.05)):
        tally.count(record)
    assert (tally.late, tally.slow, tally.hopeless) == (1, 0, False)
    tally.count(turn(0.5, 0.2))
    assert (tally.late, tally.slow, tally.hopeless) == (1, 1, False)
    tally.count(turn(0.5, 0.05, "lost"))
    assert (tally.late, tally.slow, tally.hopeless) == (2, 1, True)
    assert tally.kept == pytest.approx(0.4)
