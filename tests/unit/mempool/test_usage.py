"""The past of an edge: runs that split, grow and merge, against a list with one entry per block."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memserve.mempool.usage import Run, Usage


def past_of(usage: Usage) -> list[tuple[int, float]]:
    runs = [usage.run_at(end) for end in range(1, usage.blocks + 1)]
    return [(run.uses, run.stamp) for run in runs]


@given(st.integers(1, 8), st.lists(st.tuples(st.integers(1, 8), st.integers(0, 1)), max_size=6))
def test_uses_reach_as_far_as_they_say(blocks: int, uses: list[tuple[int, int]]) -> None:
    usage, model = Usage(blocks, [Run(0, 1, 0.0)]), [(1, 0.0)] * blocks
    for stamp, (upto, times) in enumerate(uses, start=1):
        upto = min(upto, blocks)
        usage.use(upto, float(stamp), times)
        model[:upto] = [(count + times, float(stamp)) for count, _ in model[:upto]]
        usage.check(blocks)
        assert past_of(usage) == model


@given(st.lists(st.integers(1, 9), max_size=7), st.integers(1, 9))
def test_a_split_keeps_the_past_of_every_block(uses: list[int], at: int) -> None:
    usage = Usage(10, [Run(0, 1, 0.0, 3)])
    for stamp, upto in enumerate(uses, start=1):
        usage.use(upto, float(stamp))
    before = past_of(usage)
    lower = usage.split(at)
    usage.check(at)
    lower.check(10 - at)
    assert past_of(usage) + past_of(lower) == before
    assert lower.runs[0].follows == 3
    usage.append(lower)
    assert past_of(usage) == before


def test_lengths_cover_what_was_asked_for() -> None:
    usage = Usage(10, [Run(0, 3, 2.0), Run(4, 2, 2.0), Run(7, 1, 1.0)])
    assert [(run.uses, blocks) for run, blocks in usage.lengths(8)] == [(1, 1), (2, 3), (3, 4)]


def test_what_was_used_alike_is_one_run() -> None:
    usage = Usage(4, [Run(0, 1, 5.0)])
    usage.append(Usage(4, [Run(0, 1, 5.0)]))
    assert usage.runs == [Run(0, 1, 5.0)]


def test_a_long_session_has_a_short_past() -> None:
    usage = Usage(1, [Run(0, 1, 0.0)])
    for turn in range(1, 1000):
        usage.use(usage.blocks, float(turn))
        usage.append(Usage(1, [Run(0, 1, float(turn))]))
    usage.check(1000)
    assert usage.run_at(1000).uses == 1
    assert usage.run_at(999).uses == 2
    assert usage.runs[0].uses == len(usage.runs)
