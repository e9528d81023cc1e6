"""Errors of predictions, and what the cost policy does when they are large."""

from __future__ import annotations

import pytest

from memserve.scheduler.decision import decide, decide_recorded
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.predictions import Predictions


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
