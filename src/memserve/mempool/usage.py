"""How often, and when last, the blocks of an edge were asked for. Pure; knows neither tokens nor clocks.

Blocks with the same past form a run. A block is never used without those before it, so runs further down
an edge were used less often and longer ago.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_MAX_RUNS = 8
"""An edge's past is told in so many runs at most; beyond that the first ones, evicted last, are merged."""


class Run(NamedTuple):
    """Blocks from ``start`` to the next run: used ``uses`` times, the last time at ``stamp``.

    Publication is the first use. A stamp is what an eviction policy counts as time. ``follows`` is how often
    the block before them had been used when they were published; 0 for the beginning of a prompt.
    """

    start: int
    uses: int
    stamp: float
    follows: int = 0

    def at(self, start: int) -> Run:
        """The same run, beginning elsewhere."""
        return self if start == self.start else Run(start, self.uses, self.stamp, self.follows)


class Usage:
    """The past of an edge of ``blocks`` blocks, as ``runs`` in their order; the first starts at 0."""

    __slots__ = ("blocks", "runs")

    def __init__(self, blocks: int, runs: list[Run]) -> None:
        self.blocks = blocks
        self.runs = _merged(runs)

    def run_at(self, end: int) -> Run:
        """The run of the last of the first ``end`` blocks."""
        runs = self.runs
        at = len(runs) - 1
        while at and runs[at].start >= end:
            at -= 1
        return runs[at]

    def lengths(self, upto: int) -> Iterator[tuple[Run, int]]:
        """The runs that cover the first ``upto`` blocks, each with how many of those it covers."""
        end = upto
        for run in reversed(self.runs):
            if run.start < end:
                yield run, end - run.start
                end = run.start

    def use(self, upto: int, stamp: float, times: int = 1) -> None:
        """The first ``upto`` blocks were used at ``stamp``; with ``times`` 0 that does not count."""
        if len(self.runs) == 1 and upto == self.blocks:
            _, uses, _, follows = self.runs[0]
            self.runs = [Run(0, uses + times, stamp, follows)]
            return
        runs: list[Run] = []
        end = self.blocks
        for run in reversed(self.runs):
            if end > upto:
                runs.append(run if run.start >= upto else run.at(upto))
            if run.start < upto:
                runs.append(Run(run.start, run.uses + times, stamp, run.follows))
            end = run.start
        runs.reverse()
        self.runs = _merged(runs)

    def split(self, at: int) -> Usage:
        """Keep the first ``at`` blocks and return the rest."""
        if len(self.runs) == 1:
            rest = Usage(self.blocks - at, self.runs)
            self.blocks = at
            return rest
        above = [run for run in self.runs if run.start < at]
        below = [run for run in self.runs if run.start > at]
        last = self.run_at(at + 1)
        rest = Usage(self.blocks - at, [last.at(0)] + [run.at(run.start - at) for run in below])
        self.blocks, self.runs = at, above
        return rest

    def shorten(self, at: int) -> None:
        """Keep the first ``at`` blocks only."""
        self.blocks = at
        if len(self.runs) > 1:
            self.runs = [run for run in self.runs if run.start < at]

    def append(self, tail: Usage) -> None:
        """The edge grows by the blocks of ``tail``."""
        first = self.blocks
        self.blocks += tail.blocks
        self.runs = _merged(self.runs + [run.at(first + run.start) for run in tail.runs])

    def check(self, blocks: int) -> None:
        """Assert every invariant; the edge has ``blocks`` blocks."""
        assert self.blocks == blocks, f"an edge of {blocks} blocks has a past of {self.blocks}"
        starts = [run.start for run in self.runs]
        assert starts[0] == 0, "an edge's past has no beginning"
        assert starts == sorted(set(starts)), "runs are out of order"
        assert starts[-1] < self.blocks, "a run begins beyond its edge"
        assert len(starts) <= _MAX_RUNS, "an edge has too many runs"


def _merged(runs: list[Run]) -> list[Run]:
    if len(runs) == 1:
        return runs
    kept = runs[:1]
    for run in runs[1:]:
        if run[1:] != kept[-1][1:]:
            kept.append(run)
    while len(kept) > _MAX_RUNS:
        kept[:2] = [kept[1].at(0)]
    return kept
