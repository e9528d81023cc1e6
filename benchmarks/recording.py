"""What every benchmark records beside its figures: machine, versions, commit. Written as one JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def describe_machine() -> dict[str, str | int | None]:
    """Processor, cores, versions and the load that others put on the machine right now."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.open() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "load_average": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def describe_commit() -> str:
    """The commit measured; ``-dirty`` when the tree has changes that no commit has."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False)
    return found.stdout.strip() or "unknown"


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def write_result(name: str, figures: Mapping[str, object], output: Path | None = None) -> Path:
    """Write ``figures`` with machine and commit to ``results/NAME.json`` (or ``output``)."""
    path = output or RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    record = {"benchmark": name, "commit": describe_commit(), "machine": describe_machine(), **figures}
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
