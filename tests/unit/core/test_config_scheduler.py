"""The scheduler's part of the configuration."""

from __future__ import annotations

import pytest

from memserve.core.config import TreeSource, parse_config
from memserve.core.errors import ConfigError


def test_events_and_speculation_by_default_and_what_a_file_says() -> None:
    default = parse_config("").scheduler
    assert (default.trees, default.speculative) == (TreeSource.EVENTS, True)
    said = parse_config("[scheduler]\ntrees = 'ttl'\nttl_seconds = 60\nspeculative = false").scheduler
    assert (said.trees, said.ttl_seconds, said.speculative) == (TreeSource.TTL, 60, False)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("trees = 'guess'", "trees|TreeSource|guess"),
        ("ttl_seconds = 0", r"scheduler\.ttl_seconds is 0"),
        ("speculative_seconds = -1", r"scheduler\.speculative_seconds is -1"),
        ("tree_memory = 5", r"scheduler\.tree_memory is 5; accepted: at least 1 MiB"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(f"[scheduler]\n{text}")
