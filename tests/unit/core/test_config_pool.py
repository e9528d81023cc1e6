"""The pool's part of the configuration: tiers are wanted whole or not at all."""

from __future__ import annotations

import pytest

from memserve.core.config import parse_config
from memserve.core.errors import ConfigError


def test_tiers_are_off_by_default_and_read_from_a_file() -> None:
    assert parse_config("").pool.disk_path is None
    text = "[pool]\nhost_memory = 1048576\ndisk_path = '/kv'\ndisk_memory = 2097152"
    pool = parse_config(text).pool
    assert (pool.host_memory, pool.disk_path, pool.disk_memory) == (1 << 20, "/kv", 2 << 20)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("host_memory = -1", "pool.host_memory"),
        ("disk_memory = 2097152", "pool.disk_path"),
        ("disk_path = '/kv'", "pool.disk_memory"),
        ("disk_path = '/kv'\ndisk_memory = 10", "at least 1 MiB"),
        ("kv_cache_dtype = 'fp8'", r"pool.kv_cache_dtype is 'fp8'; accepted: one of auto, bf16, int8"),
    ],
)
def test_half_a_tier_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(f"[pool]\n{text}")
