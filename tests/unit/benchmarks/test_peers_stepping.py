"""What is timed, on an engine with a virtual clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.protocol import Decode, Mixed, Prefill
from peers.stepping import Bench, quantile

ROW = 0.001
PASS = 0.01


class TimedEngine:
    """A pass takes PASS seconds and ROW more per row; prompts are prefilled whole, one in each pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.prompts: list[tuple[int, ...]] = []
        self.prepared: list[tuple[int, int]] = []
        self._left: dict[int, int] = {}
        self._waiting: list[int] = []

    def prepare(self, streams: int, longest: int) -> None:
        self.now += 100.0
        self.prepared.append((streams, longest))

    def add(self, prompt: Sequence[int], max_tokens: int) -> int:
        self.prompts.append(tuple(prompt))
        number = len(self.prompts)
        self._left[number] = max_tokens
        self._waiting.append(number)
        return number

    def step(self) -> Iterable[int]:
        rows = [number for number in self._left if number not in self._waiting]
        self.now += PASS + ROW * len(rows)
        if self._waiting:
            first = self._waiting.pop(0)
            self.now += ROW * len(self.prompts[first - 1])
            rows.append(first)
        for number in rows:
            self._left[number] -= 1
            if not self._left[number]:
                del self._left[number]
        return rows

    def cancel(self, requests: Sequence[int]) -> None:
        self.now += 100.0
        for number in requests:
            self._left.pop(number, None)

    @property
    def idle(self) -> bool:
        return not self._left


def make_bench() -> tuple[TimedEngine, Bench]:
    engine = TimedEngine()
    return engine, Bench(engine, 49152, clock=lambda: engine.now)


def test_prefill_is_timed_to_the_first_token_and_no_prompt_comes_twice() -> None:
    engine, bench = make_bench()
    timed = bench.prefill(Prefill(100, repeats=3))
    assert timed.tokens == 100
    assert timed.seconds == pytest.approx([PASS + 100 * ROW] * 3)
    assert {len(prompt) for prompt in engine.prompts} == {100}
    assert len(set(engine.prompts)) == 3
    assert engine.idle


def test_decode_leaves_prefill_and_preparations_out() -> None:
    engine, bench = make_bench()
    timed = bench.decode(Decode(streams=4, context=50, steps=10))
    assert timed.tokens == 40
    assert timed.seconds == pytest.approx([10 * (PASS + 4 * ROW)])
    assert engine.prepared[0][0] == 4
    assert engine.prepared[0][1] >= 60
    assert engine.idle


def test_mixed_load_takes_the_gaps_with_and_without_prompts() -> None:
    engine, bench = make_bench()
    timed = bench.mixed(Mixed(streams=2, stream_prompt=10, prompts=3, prompt_tokens=200, idle_tokens=5))
    idle, busy = PASS + 2 * ROW, PASS + 202 * ROW
    assert timed.idle_p50 == pytest.approx(idle)
    assert timed.idle_p99 == pytest.approx(idle)
    assert timed.mixed_p50 == pytest.approx(busy)
    assert timed.alone_seconds == pytest.approx(3 * (PASS + 200 * ROW))
    assert timed.mixed_seconds == pytest.approx(3 * busy)
    assert engine.idle


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_splits_the_values(values: list[float], fraction: float) -> None:
    found = quantile(values, fraction)
    assert min(values) <= found <= max(values)
    assert sum(value < found for value in values) <= fraction * (len(values) - 1) + 1
    assert quantile(values, 0.0) == min(values)
    assert quantile(values, 1.0) == max(values)
