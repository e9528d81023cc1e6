"""``memserve bench`` as other benchmarks call it: a process of its own, and its report."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEADLINE = 3600.0


def run_bench(*options: str) -> dict[str, Any]:
    """The report of ``memserve bench`` with these options; exits with its complaint if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "memserve.cli", "bench", *options, "--json", str(file)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
        if ended.returncode:
            sys.exit(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
        report: dict[str, Any] = json.loads(file.read_text())
        return report
