"""The part of the configuration that says who may wait, how long, and on whose account."""

from __future__ import annotations

import pytest

from memserve.core.config import parse_config
from memserve.core.errors import ConfigError
from memserve.server.serve import line_limits


def test_no_limit_of_time_by_default_and_what_a_file_says() -> None:
    assert parse_config("").server.slo_ttft == 0
    config = parse_config(
        """
        [engine]
        max_running = 8
        [server]
        slo_ttft = 3.5
        max_waiting = 10
        max_waiting_tokens = 2000
        tenant_max_waiting = 5
        tenant_max_waiting_tokens = 1000
        [[server.tenants]]
        name = "search"
        weight = 3
        api_key = "k"
        [[server.tenants]]
        name = "batch"
        """
    )
    assert config.server.slo_ttft == 3.5
    assert [(one.name, one.weight, one.api_key) for one in config.server.tenants] == [
        ("search", 3.0, "k"),
        ("batch", 1.0, None),
    ]
    limits = line_limits(config)
    assert (limits.requests, limits.tokens) == (10, 2000)
    assert (limits.tenant_requests, limits.tenant_tokens, limits.max_running) == (5, 1000, 8)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_waiting = 0", r"server\.max_waiting is 0"),
        ("tenant_max_waiting_tokens = 0", r"server\.tenant_max_waiting_tokens is 0"),
        ("slo_ttft = -1", r"server\.slo_ttft is -1"),
        ("tenants = [{name = 'a', weight = 0}]", r"server\.tenants \(a\) weight is 0"),
        ("tenants = [{name = 'a'}, {name = 'a'}]", r"server\.tenants\.name"),
        ("tenants = [{name = ''}]", r"server\.tenants\.name"),
        (
            "tenants = [{name = 'a', api_key = 'k9'}, {name = 'b', api_key = 'k9'}]",
            r"server\.tenants\.api_key",
        ),
        ("api_key = 'k9'\ntenants = [{name = 'a', api_key = 'k9'}]", r"server\.tenants \(a\) api_key"),
        ("tenants = [{name = 'a', colour = 1}]", "colour"),
    ],
)
def test_what_makes_no_sense_is_refused_without_showing_keys(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        parse_config(f"[server]\n{text}")
    assert "k9" not in str(raised.value)
