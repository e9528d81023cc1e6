"""Sampling: exact filters against brute force, frequencies against probabilities, streams that resume."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from memserve.core.errors import RequestFailed
from memserve.core.types import SamplingParams
from memserve.engine.sampling import draw_uniform, report_logprobs, sample_row

LOGITS = arrays.arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -np.inf]),
).filter(lambda row: bool(np.isfinite(row.max())))


def params(**changes: float) -> SamplingParams:
    return SamplingParams(max_tokens=10, **changes)  # type: ignore[arg-type]


def probabilities(logits: np.ndarray, chosen: SamplingParams) -> np.ndarray:
    """The definition, in float64: scale, keep the top k (with ties), keep the fewest that reach top_p."""
    scaled = logits.astype(np.float64) / chosen.temperature
    masses = np.exp(scaled - scaled.max())
    if 0 < chosen.top_k < len(masses):
        masses[masses < np.sort(masses)[-chosen.top_k]] = 0
    masses /= masses.sum()
    order = sorted(range(len(masses)), key=lambda token: (-masses[token], token))
    before = 0.0
    for token in order:
        if before >= chosen.top_p:
            masses[token] = 0
        else:
            before += masses[token]
    return masses / masses.sum()


def frequencies(logits: np.ndarray, chosen: SamplingParams, draws: int) -> np.ndarray:
    counts = np.zeros(len(logits))
    for index in range(draws):
        counts[sample_row(logits, chosen, index).token] += 1
    return counts / draws


@pytest.mark.parametrize(
    "chosen",
    [
        params(),
        params(temperature=0.5),
        params(temperature=2.0, top_k=5),
        params(top_p=0.7),
        params(temperature=1.5, top_k=12, top_p=0.8, seed=9),
        params(top_p=0.01),
        params(top_k=1),
    ],
)
def test_frequencies_follow_the_probabilities(chosen: SamplingParams) -> None:
    logits = np.random.default_rng(3).normal(0, 2, 20).astype(np.float32)
    expected = probabilities(logits, chosen)
    found = frequencies(logits, chosen, 8000)
    assert not found[expected == 0].any()
    deviation = np.sqrt(expected * (1 - expected) / 8000)
    assert (np.abs(found - expected) <= 4.5 * deviation).all()


@given(logits=LOGITS, seed=st.integers(-(2**63), 2**64), index=st.integers(0, 10_000))
def test_only_possible_tokens_are_drawn(logits: np.ndarray, seed: int, index: int) -> None:
    chosen = SamplingParams(max_tokens=1, temperature=0.8, top_k=7, top_p=0.9, seed=seed)
    token = sample_row(logits, chosen, index).token
    # A mass that reaches top_p only by a rounding error may fall on either side.
    loose = SamplingParams(max_tokens=1, temperature=0.8, top_k=7, top_p=0.9 + 1e-5)
    assert probabilities(logits, loose)[token] > 0


@given(logits=LOGITS)
def test_greedy_takes_the_first_of_the_largest(logits: np.ndarray) -> None:
    best = min(token for token in range(len(logits)) if logits[token] == logits.max())
    assert sample_row(logits, params(temperature=0), 0).token == best
    assert sample_row(logits, params(temperature=1e-9), 0).token == best
    if (logits == logits.max()).sum() == 1:
        assert sample_row(logits, params(top_k=1), 5).token == best


@given(logits=LOGITS, count=st.integers(0, 20))
def test_logprobs_are_those_of_the_model(logits: np.ndarray, count: int) -> None:
    chosen = SamplingParams(max_tokens=1, temperature=0.3, top_p=0.5, logprobs=count)
    reported = sample_row(logits, chosen, 1).logprob
    assert reported is not None
    wide = logits.astype(np.float64)
    expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    assert reported.logprob == pytest.approx(expected[reported.token], abs=1e-5)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:count]
    assert [token for token, _ in reported.top] == order
    assert [value for _, value in reported.top] == pytest.approx(expected[order], abs=1e-5)


def test_no_logprobs_unless_asked() -> None:
    assert sample_row(np.zeros(4, np.float32), params(), 0).logprob is None
    certain = report_logprobs(np.array([-np.inf, 3.0], np.float32), 1, 0)
    assert (certain.logprob, certain.top) == (0.0, ())


def test_wide_nucleus_over_a_flat_distribution() -> None:
    """More candidates than the first partition holds, and ties at its edge."""
    logits = np.zeros(50_000, np.float32)
    logits[7] = 1
    tokens = [sample_row(logits, params(top_p=0.5), index).token for index in range(200)]
    assert max(tokens) <= 25_001
    assert len(set(tokens)) > 190
    assert sample_row(logits, params(top_p=0.0), 3).token == 7
    assert sample_row(np.zeros(50, np.float32), params(top_p=0.0), 3).token == 0


def test_a_stream_resumes_anywhere() -> None:
    logits = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    whole = [sample_row(logits, params(seed=4), index).token for index in range(20)]
    assert [sample_row(logits, params(seed=4), index).token for index in range(12, 20)] == whole[12:]
    assert [sample_row(logits, params(seed=5), index).token for index in range(20)] != whole


def test_random_numbers_are_fixed_for_ever() -> None:
    """Instances of different machines and versions must agree."""
    drawn = [draw_uniform(0, 0), draw_uniform(0, 1), draw_uniform(123, 0), draw_uniform(-1, 0)]
    assert drawn == [0.011546754286331562, 0.5023796042735054, 0.5170052385149787, 0.23494158814525556]
    spread = np.array([draw_uniform(1, index) for index in range(2000)])
    assert abs(spread.mean() - 0.5) < 0.03
    assert len(set(spread.tolist())) == 2000


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = np.zeros(10, np.float32)
    logits[3] = bad
    with pytest.raises(RequestFailed, match="not numbers"):
        sample_row(logits, params(temperature=temperature), 0)
    with pytest.raises(RequestFailed, match="not numbers"):
        sample_row(np.full(5, -np.inf, np.float32), params(temperature=temperature), 0)


@example(logits=np.array([-1.2e-38, 0.0], np.float32), share=0.0)
@given(logits=LOGITS, share=st.sampled_from([0.0, 1e-6, 0.5, 0.9, 0.9999999, 1 - 1e-12]))
def test_any_top_p_leaves_a_token(logits: np.ndarray, share: float) -> None:
    token = sample_row(logits, params(top_p=share), 0).token
    assert logits[token] > -np.inf
    if share == 0:
        # Or one that is as likely: logits may differ by less than their probabilities can.
        assert np.exp(logits[token] - logits.max()) == 1


def test_a_continuation_goes_on_with_the_random_numbers_of_what_it_continues() -> None:
    chooser = np.random.default_rng(3)
    rows = chooser.normal(size=(12, 40)).astype(np.float32)
    whole = [sample_row(row, params(seed=4), index).token for index, row in enumerate(rows)]
    rest = [sample_row(row, params(seed=4, first_index=5), index).token for index, row in enumerate(rows[5:])]
    assert rest == whole[5:]
