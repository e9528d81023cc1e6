"""A server with the stand-in backend, and small workloads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memserve.bench.content import Text
from memserve.bench.workload import Endpoint, Message, Session, Turn, Workload
from memserve.core.config import ServerConfig
from stand_in_server import Server, running_server

CONTEXT = 4096


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server(ServerConfig(), CONTEXT) as running:
        yield running


def make_chats(sessions: int = 2, turns: int = 2, think: float = 0.0, max_tokens: int = 4) -> Workload:
    """Chats whose texts say which session and turn they are."""
    made = tuple(
        Session(
            (Message("system", (Text("be brief"),)),),
            tuple(
                Turn(
                    (Message("user", (Text(f"q{one}.{turn}"),)),),
                    (Text(f"r{one}.{turn}"),),
                    max_tokens,
                    think,
                )
                for turn in range(turns)
            ),
        )
        for one in range(sessions)
    )
    return Workload("chats", made, Endpoint.CHAT, history=True, fixed=True)
