"""Believed against found, token by token."""

from __future__ import annotations

import pytest

from memserve.core.clock import VirtualClock
from memserve.core.types import RequestId
from memserve.scheduler.accuracy import TreeAccuracy
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.service import GlobalScheduler


def test_what_was_believed_and_not_found_is_stale_the_opposite_missed() -> None:
    accuracy = TreeAccuracy()
    accuracy.learn(prompt=100, believed=64, promised=16, found=48)
    accuracy.learn(prompt=50, believed=0, promised=0, found=32)
    assert accuracy == TreeAccuracy(2, 150, believed=64, promised=16, stale=16, missed=32)
    assert accuracy.stale_rate == pytest.approx(0.25)


def test_the_last_token_is_computed_in_any_case() -> None:
    accuracy = TreeAccuracy()
    accuracy.learn(prompt=64, believed=64, promised=0, found=63)
    assert (accuracy.believed, accuracy.stale, accuracy.missed) == (63, 0, 0)


def test_nothing_believed_is_no_stale_rate() -> None:
    assert TreeAccuracy().stale_rate == 0.0


def test_the_first_token_of_a_routed_request_is_counted_once(cluster) -> None:
    scheduler = GlobalScheduler(policy_by_name("prompt-tree"), VirtualClock())
    scheduler.member_ready(cluster.member("c0"), cluster.ready("c0"))
    scheduler.on_pool_events(cluster.events("c0", 0, cluster.stored(0, 3)))
    scheduler.route(cluster.request("a", blocks=5))
    scheduler.first_token(RequestId("a"), cached=16)
    scheduler.first_token(RequestId("nobody"), cached=16)
    assert scheduler.state.accuracy == TreeAccuracy(1, 80, believed=48, stale=32)


def test_a_promise_that_was_believed_is_told_apart(cluster) -> None:
    scheduler = GlobalScheduler(policy_by_name("prompt-tree"), VirtualClock())
    scheduler.member_ready(cluster.member("c0"), cluster.ready("c0"))
    scheduler.on_pool_events(cluster.events("c0", 0, cluster.stored(0, 1)))
    scheduler.route(cluster.request("a", blocks=5))
    second = scheduler.route(cluster.request("b", blocks=5))
    assert (second.matched_prefill, second.promised_prefill) == (80, 64)
    scheduler.first_token(RequestId("b"), cached=64)
    assert scheduler.state.accuracy == TreeAccuracy(1, 80, believed=79, promised=64, stale=15)
