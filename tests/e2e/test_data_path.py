"""One traced request passes the rooms of docs/data-path.md in their order."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from e2e.serving import serving, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.model]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data-path.md"


def documented_rooms() -> list[str]:
    """The room column of the table."""
    return re.findall(r"^\| \d+ \| `([a-z.]+)` \|", PAGE.read_text(), re.MULTILINE)


def test_a_traced_request_passes_every_room_in_order() -> None:
    rooms = documented_rooms()
    assert len(rooms) == 10
    with serving() as served:
        body = {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": "What is the capital of France? Tell me about it."}],
            "max_tokens": 30,
            "temperature": 0,
        }
        headers = {"x-memserve-trace": "1"}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200
        request = answer.json()["id"]

        def seen() -> list[str]:
            trace = served.get(f"/v1/traces/{request}")["entries"]
            return list(dict.fromkeys(entry["room"] for entry in trace))

        wait_for(lambda: len(seen()) >= len(rooms), f"not all rooms were passed: {rooms}")
        assert seen() == rooms
