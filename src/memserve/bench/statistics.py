"""From records to figures: means and percentiles, throughput, goodput, ratios between targets. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from memserve.bench.records import Record, Round, Sources


@dataclass(frozen=True, slots=True)
class Summary:
    """A sample's mean and percentiles, in the sample's unit; ``count`` 0 means there is none."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0


@dataclass(frozen=True, slots=True)
class Slo:
    """What a turn must keep to count as good, s: time to first token, and mean time per further token."""

    ttft: float | None = None
    itl: float | None = None

    @property
    def given(self) -> bool:
        return self.ttft is not None or self.itl is not None

    def kept_by(self, record: Record) -> bool:
        """Whether an answered turn was good."""
        slow_start = self.ttft is not None and record.ttft > self.ttft
        slow_going = self.itl is not None and (record.tpot or 0.0) > self.itl
        return not record.error and not slow_start and not slow_going


@dataclass(frozen=True, slots=True)
class Figures:
    """What one target did in one round, or in all of them.

    ``ttft``, ``ttft_later`` (turns after a session's first), ``itl``, ``tpot`` and ``jct`` in seconds, of
    turns answered in full; throughputs and ``goodput`` (turns that kept the SLO) per second.
    ``inexact``: turns whose sources do not add up to the prompt.
    """

    turns: int
    failed: int
    unfinished: int
    never_sent: int
    seconds: float
    ttft: Summary
    ttft_later: Summary
    itl: Summary
    tpot: Summary
    jct: Summary
    turns_per_second: float
    output_per_second: float
    goodput: float | None
    sources: Sources
    inexact: int
    sent_bytes: int | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure divided by the first target's: median, least and greatest over the rounds."""

    median: float
    low: float
    high: float


def summarize(values: Iterable[float]) -> Summary:
    """Mean and percentiles (linear interpolation) of a sample."""
    sample = np.fromiter(values, np.float64)
    if not sample.size:
        return Summary()
    p50, p90, p99 = np.percentile(sample, (50, 90, 99)).tolist()
    return Summary(int(sample.size), float(sample.mean()), p50, p90, p99)


def compute_figures(rounds: Sequence[Round], slo: Slo) -> Figures:
    """The figures of some rounds taken together."""
    records = [record for one in rounds for record in one.records]
    answered = [record for record in records if not record.error]
    seconds = max(sum(one.seconds for one in rounds), 1e-9)
    good = sum(slo.kept_by(record) for record in answered)
    known = [sent.bytes for one in rounds for sent in one.sent or ()]
    return Figures(
        turns=len(answered),
        failed=len(records) - len(answered),
        unfinished=sum(one.unfinished for one in rounds),
        never_sent=sum(one.never_sent for one in rounds),
        seconds=seconds,
        ttft=summarize(record.ttft for record in answered),
        ttft_later=summarize(record.ttft for record in answered if record.turn > 0),
        itl=summarize(gap for record in answered for gap in record.gaps),
        tpot=summarize(tpot for record in answered if (tpot := record.tpot) is not None),
        jct=summarize(record.jct for record in answered),
        turns_per_second=len(answered) / seconds,
        output_per_second=sum(record.output_tokens for record in answered) / seconds,
        goodput=good / seconds if slo.given else None,
        sources=reduce(Sources.__add__, (record.sources for record in answered), Sources()),
        inexact=sum(not record.exact for record in answered),
        sent_bytes=sum(known) if all(one.sent is not None for one in rounds) else None,
    )


def compare_rounds(
    pick: Callable[[Figures], float], rounds: Sequence[Figures], first: Sequence[Figures]
) -> Ratio | None:
    """A figure relative to the first target's, round by round; None where there is nothing to compare."""
    pairs = [(pick(one), pick(other)) for one, other in zip(rounds, first, strict=False)]
    ratios = [mine / theirs for mine, theirs in pairs if mine > 0 and theirs > 0]
    if not ratios:
        return None
    return Ratio(float(np.median(ratios)), min(ratios), max(ratios))


def share_equal(records: Sequence[Round], first: Sequence[Round]) -> float | None:
    """Share of turns answered by both targets whose answers are the same; None if there are none."""
    answers = dict(_answers(first))
    equal = [answers[key] == answer for key, answer in _answers(records) if key in answers]
    return sum(equal) / len(equal) if equal else None


def _answers(rounds: Sequence[Round]) -> Iterable[tuple[tuple[int, int, int], str]]:
    for one in rounds:
        for record in one.records:
            if not record.error:
                yield (one.number, record.session, record.turn), record.answer
