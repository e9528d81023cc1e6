"""Errors of predictions, and what the cost policy does when they are large."""

from __future__ import annotations

import random

import pytest

from memserve.scheduler.decision import decide, decide_recorded
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.predictions import Correction, Forecast, Predictions


def test_a_few_predictions_say_nothing_yet() -> None:
    predictions = Predictions()
    for _ in range(31):
        predictions.learn(3.0, 1.0)
    assert predictions.typical == 0.0
    assert predictions.quantile(0.5) == pytest.approx(2.0)
    predictions.learn(3.0, 1.0)
    assert predictions.typical == pytest.approx(2.0)


def test_old_errors_are_forgotten() -> None:
    predictions = Predictions()
    for actual in [1.0] * 100 + [2.0] * 300:
        predictions.learn(2.0, actual)
    assert predictions.typical == predictions.quantile(1.0) == 0.0


def test_nothing_foreseen_is_no_error() -> None:
    predictions = Predictions()
    predictions.learn(0.0, 1.0)
    assert predictions.quantile(0.9) == 0.0


def test_bad_predictions_make_the_cost_policy_fall_back(cluster) -> None:
    cluster.add("c0", "c1")
    request = cluster.request("r", blocks=4)
    cost = policy_by_name("cost")
    _, record = decide_recorded(request, cluster.state, cost, 0.0)
    assert record.prefill_candidates()[0].total is not None
    for _ in range(64):
        cluster.state.predictions.learn(9.0, 1.0)
    fallen, record = decide_recorded(request, cluster.state, cost, 0.0)
    assert record.prefill_candidates()[0].total is None
    assert fallen.reason.startswith("predictions are off by 800%, so as prompt-tree: prefill on c0")
    assert fallen.prefill == decide(request, cluster.state, policy_by_name("prompt-tree"), 0.0).prefill


def test_what_steps_leave_out_is_learnt() -> None:
    correction, generator = Correction(), random.Random(3)
    for _ in range(300):
        forecast = Forecast(generator.uniform(0.01, 2.0), generator.choice([0.0, 0.1, 0.2]))
        correction.learn(forecast, 0.03 + 0.9 * forecast.step + 1.2 * forecast.served)
    for forecast in (Forecast(0.05, 0.0), Forecast(0.5, 0.2), Forecast(2.0, 0.1)):
        actual = 0.03 + 0.9 * forecast.step + 1.2 * forecast.served
        assert correction.seconds(forecast) == pytest.approx(actual, rel=0.05)


def test_what_has_changed_is_learnt_again() -> None:
    correction = Correction()
    for factor in (1.0, 2.0):
        for _ in range(200):
            correction.learn(Forecast(0.5, 0.0), 0.5 * factor)
        assert correction.seconds(Forecast(0.5, 0.0)) == pytest.approx(0.5 * factor, rel=0.05)


def test_one_stall_teaches_little() -> None:
    correction = Correction()
    for _ in range(100):
        correction.learn(Forecast(0.5, 0.0), 0.5)
    correction.learn(Forecast(0.5, 0.0), 500.0)
    assert correction.seconds(Forecast(0.5, 0.0)) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("forecast", [Forecast(), Forecast(0.0, 0.1), Forecast(1e-6, 0.0)])
def test_a_correction_is_never_negative(forecast: Forecast) -> None:
    correction = Correction()
    for _ in range(100):
        correction.learn(Forecast(1.0, 1.0), 0.01)
        correction.learn(forecast, 1e-6)
        assert correction.seconds(forecast) >= 0
