"""A runner for commands, and a server for those that talk to one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from memserve.core.config import ServerConfig
from stand_in_server import Server, running_server


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server(ServerConfig(api_key="key"), 512) as running:
        yield running
