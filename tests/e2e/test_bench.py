"""``memserve bench --compare`` with the real model: configurations in turns, and their figures agree."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.serving import wait_for

pytestmark = [pytest.mark.processes, pytest.mark.model]

SECONDS = 110
LOAD = (
    "--sessions",
    "2",
    "--turns",
    "2",
    "--prompt-tokens",
    "128",
    "--turn-tokens",
    "32",
    "--output-tokens",
    "8",
)


def test_configurations_are_compared(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "memserve.cli", "bench", "--compare", "disagg,disagg-cache", *LOAD]
    command += ["--think", "0", "--serve", "--kv-memory 64MiB --threads 1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    plain, cached = json.loads(file.read_text())["entries"]
    for entry in (plain, cached):
        assert (entry["figures"]["turns"], entry["figures"]["failed"], entry["figures"]["inexact"]) == (
            4,
            0,
            0,
        )
        assert entry["figures"]["sent_bytes"] > 0
    assert plain["figures"]["sources"]["computed"] == sum(plain["figures"]["sources"].values())
    assert cached["figures"]["sources"]["local"] > 0
    # Caching and sending back change nothing in what is answered.
    assert cached["against_first"]["equal_answers"] == 1.0
    # Only a configuration that sends answers back moves anything from decode to prefill.
    assert [sent["role"] for sent in cached["rounds"][0]["sent"] if sent["bytes"]] == ["decode", "prefill"]
    assert [sent["role"] for sent in plain["rounds"][0]["sent"] if sent["bytes"]] == ["prefill"]


def test_a_killed_benchmark_leaves_no_server() -> None:
    command = [sys.executable, "-m", "memserve.cli", "bench", "--compare", "colocated-cache", *LOAD]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_for(lambda: bool(instances_of(children)), "no instance was started")
            (server,) = pids(children)
            everybody = [server, *instances_of(children)]
        finally:
            process.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(is_alive(pid) for pid in everybody), "a process was left behind")


def instances_of(children: Path) -> list[int]:
    """Pids of the instances that the one child in ``children`` has started."""
    return [pid for server in pids(children) for pid in pids(Path(f"/proc/{server}/task/{server}/children"))]


def pids(children: Path) -> list[int]:
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
