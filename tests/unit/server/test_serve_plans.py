"""What ``serve`` decides before it starts anything."""

from __future__ import annotations

import os

import pytest

from memserve.core.config import Config, EngineConfig, SchedulerConfig, TreeSource
from memserve.core.errors import ConfigError
from memserve.scheduler.prompt_trees import TreeOptions
from memserve.server import serve
from memserve.server.serve import plan_cores, plan_threads, tree_options


def test_threads_are_cores_divided_by_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "count_cores", lambda: 8)
    assert [plan_threads(0, instances) for instances in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
    assert plan_threads(3, 2) == 3
    with pytest.raises(ConfigError, match=r"engine\.threads is 5 .* on 8 cores; accepted: at most 4"):
        plan_threads(5, 2)
    with pytest.raises(ConfigError, match=r"at most 1"):
        plan_threads(2, 9)


def test_instances_that_take_all_cores_get_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 2, 3, 5})
    assert plan_cores(True, 2, 2) == ((2, 3), (5, 7))
    assert plan_cores(True, 4, 1) == ((2, 3, 5, 7),)
    assert plan_cores(True, 1, 3) == ((), (), ())
    assert plan_cores(True, 1, 8) == ((),) * 8
    assert plan_cores(False, 2, 2) == ((), ())


def test_trees_believe_what_is_configured_and_what_the_phases_keep() -> None:
    assert tree_options(Config()) == TreeOptions(memory=1 << 30)
    told = SchedulerConfig(
        trees=TreeSource.TTL, ttl_seconds=9.0, speculative=False, speculative_seconds=5.0, tree_memory=1 << 20
    )
    assert tree_options(Config(engine=EngineConfig(phases="pd-caching-2"), scheduler=told)) == TreeOptions(
        TreeSource.TTL, 9.0, False, 5.0, 1 << 20, answers_return=False
    )
    basic = tree_options(Config(engine=EngineConfig(phases="pd-basic")))
    assert (basic.prompts_kept, basic.answers_kept, basic.answers_return) == (False, False, False)
