"""The fewest instances that keep a service level: which clusters to try, given how others did. Pure.

Assumes that more instances of a role never make it worse; then halving finds the fewest, by few trials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memserve.bench.records import Record
from memserve.bench.statistics import Slo, Summary
from memserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """Instances by role."""

    prefill: int = 0
    decode: int = 0
    colocated: int = 0

    @property
    def size(self) -> int:
        """All of them."""
        return self.prefill + self.decode + self.colocated


@dataclass(frozen=True, slots=True)
class Goal:
    """A share of all turns, 0 to 1, is to keep ``slo`` on at most ``most`` instances."""

    slo: Slo
    share: float
    most: int

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"--share is {self.share:g}; accepted: more than 0, at most 1")
        if self.most < 1:
            raise ConfigError(f"--max-instances is {self.most}; accepted: at least 1")


@dataclass(frozen=True, slots=True)
class Tried:
    """How a cluster did. ``kept``: share of all turns that kept the level, at most that where the trial was
    ``stopped`` because it could not succeed any more.

    ``late``, ``slow``: turns whose first token came too late, and whose others came too slowly.
    """

    shape: Shape
    met: bool
    kept: float
    stopped: bool
    late: int
    slow: int
    ttft: Summary
    tpot: Summary
    utilization: float


Try = Callable[[Shape], Tried]


@dataclass(frozen=True, slots=True)
class Search:
    """Every cluster that was tried, in order, and the smallest that met the goal."""

    tried: tuple[Tried, ...]
    best: Tried | None


def search(goal: Goal, attempt: Try) -> Search:
    """Colocated instances alone, then prefill with decode instances where these could be fewer."""
    tried: list[Tried] = []

    def note(shape: Shape) -> Tried:
        tried.append(attempt(shape))
        return tried[-1]

    best = _fewest(1, goal.most, lambda count: note(Shape(colocated=count)))
    most = goal.most if best is None else best.shape.size - 1
    split = _fewest(2, most, lambda count: _best_split(count, note))
    return Search(tuple(tried), split or best)


def _fewest(least: int, most: int, attempt: Callable[[int], Tried]) -> Tried | None:
    """The smallest count that meets the goal: doubling until one does, then halving between."""
    if least > most:
        return None
    count, failed = least, least - 1
    best = attempt(count)
    while not best.met:
        if count == most:
            return None
        failed, count = count, min(2 * count, most)
        best = attempt(count)
    while count - failed > 1:
        middle = (count + failed) // 2
        one = attempt(middle)
        if one.met:
            best, count = one, middle
        else:
            failed = middle
    return best


def _best_split(count: int, attempt: Try) -> Tried:
    """Of ``count`` instances as many prefill as first tokens need, if enough are left to decode."""
    low, high = 1, count - 1
    while True:
        prefill = (low + high) // 2
        one = attempt(Shape(prefill, count - prefill))
        if one.met:
            return one
        low, high = (prefill + 1, high) if one.late >= one.slow else (low, prefill - 1)
        if low > high:
            return one


class Tally:
    """Counts turns that broke ``goal`` as they end, and says when it cannot be met any more."""

    def __init__(self, goal: Goal, turns: int) -> None:
        self._slo = goal.slo
        self._turns = turns
        self._allowed = int(turns * (1 - goal.share) + 1e-9)
        self._bad = 0
        self.late = 0
        self.slow = 0

    @property
    def hopeless(self) -> bool:
        """Whether more turns were bad than may be."""
        return self._bad > self._allowed

    @property
    def kept(self) -> float:
        """Share of all turns that are not known to be bad."""
        return 1 - self._bad / max(self._turns, 1)

    def count(self, record: Record) -> None:
        """A turn has ended."""
        self._bad += not self._slo.kept_by(record)
        self.late += bool(record.error) or not Slo(ttft=self._slo.ttft).kept_by(record)
        self.slow += not record.error and not Slo(itl=self._slo.itl).kept_by(record)
