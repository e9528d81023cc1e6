"""Learned costs come to what is true, whatever the prior, noise and outliers; silence changes nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.engine.cost import LinearCost

PRIOR = (1e-2, 1e-3, 1e-3)
PRICES = st.tuples(st.floats(1e-3, 0.1), st.floats(1e-4, 1e-2), st.floats(5e-4, 1e-2))


def observed(cost: LinearCost, truth: tuple[float, ...], steps: int, seed: int, noise: float = 0.0) -> None:
    rng = random.Random(seed)
    for _ in range(steps):
        amounts = (1, rng.randint(0, 16), rng.choice((0, 16, 64, 200)))
        seconds = LinearCost(truth).predict(amounts)
        cost.learn(amounts, seconds * rng.uniform(1 - noise, 1 + noise))


@given(truth=PRICES, seed=st.integers(0, 1000))
@settings(deadline=None)
def test_what_is_measured_is_predicted(truth: tuple[float, ...], seed: int) -> None:
    cost = LinearCost(PRIOR)
    observed(cost, truth, 1500, seed)
    for amounts in ((1, 8, 0), (1, 8, 64), (1, 0, 200)):
        assert cost.predict(amounts) == pytest.approx(LinearCost(truth).predict(amounts), rel=0.25)


@given(truth=PRICES, seed=st.integers(0, 1000))
@settings(deadline=None)
def test_noise_and_outliers_move_it_little(truth: tuple[float, ...], seed: int) -> None:
    cost = LinearCost(PRIOR)
    observed(cost, truth, 1500, seed, noise=0.2)
    before = cost.predict((1, 8, 64))
    assert before == pytest.approx(LinearCost(truth).predict((1, 8, 64)), rel=0.3)
    cost.learn((1, 8, 64), before * 1000)
    assert cost.predict((1, 8, 64)) == pytest.approx(before * 1.05, rel=0.01)


def test_a_machine_that_becomes_slower_is_followed() -> None:
    cost, truth = LinearCost(PRIOR), (0.02, 0.002, 0.001)
    observed(cost, truth, 300, 0)
    slower = tuple(3 * price for price in truth)
    observed(cost, slower, 100, 1)
    assert cost.predict((1, 8, 64)) == pytest.approx(LinearCost(slower).predict((1, 8, 64)), rel=0.2)


def test_the_first_measurement_scales_everything() -> None:
    cost = LinearCost(PRIOR)
    cost.learn((1, 0, 0), 1.0)
    assert cost.prices == pytest.approx((1.0, 0.1, 0.1))


def test_a_term_that_was_not_measured_keeps_its_price() -> None:
    cost = LinearCost(PRIOR)
    observed(cost, (0.02, 0.002, 0.001), 200, 0)
    known = cost.prices[2]
    for _ in range(1000):
        cost.learn((1, 8, 0), 0.5)
    assert cost.prices[2] == known
    assert cost.predict((1, 8, 0)) == pytest.approx(0.5)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 500), st.floats(0, 1e6)), max_size=60))
def test_prices_stay_positive_whatever_is_measured(measured: list[tuple[int, int, float]]) -> None:
    cost = LinearCost(PRIOR)
    for rows, tokens, seconds in measured:
        cost.learn((1, rows, tokens), seconds)
    assert all(0 < price < float("inf") for price in cost.prices)
