"""The examples run as their docstrings say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.serving import serving

pytestmark = [pytest.mark.processes, pytest.mark.model]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_two_turns() -> None:
    with serving() as served:
        command = [sys.executable, str(EXAMPLES / "two_turns.py"), served.url]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    cached = [int(found) for found in re.findall(r"\[(\d+) of \d+ prompt tokens", ran.stdout)]
    assert cached[0] == 0
    assert cached[1] > 40
