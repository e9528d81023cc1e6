"""``memserve bench`` as other benchmarks call it: a process of its own, and the rows of its report."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE = 3600.0


@dataclass(frozen=True, slots=True)
class Row:
    """One server under one workload; seconds, ``output_per_second`` in tokens per second."""

    workload: str
    server: str
    turns: int
    failed: int
    ttft: float
    ttft_p99: float
    jct: float
    jct_p99: float
    itl_p99: float
    output_per_second: float
    cached_share: float


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


def row_of(workload: str, entry: Mapping[str, Any]) -> Row:
    figures = entry["figures"]
    sources: dict[str, int] = figures["sources"]
    cached = sum(count for name, count in sources.items() if name not in ("computed", "unknown"))
    return Row(
        workload=workload,
        server=entry["name"],
        turns=figures["turns"],
        failed=figures["failed"] + figures["unfinished"] + figures["never_sent"],
        ttft=figures["ttft"]["mean"],
        ttft_p99=figures["ttft"]["p99"],
        jct=figures["jct"]["mean"],
        jct_p99=figures["jct"]["p99"],
        itl_p99=figures["itl"]["p99"],
        output_per_second=figures["output_per_second"],
        cached_share=cached / max(sum(sources.values()), 1),
    )


def table_of(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| workload | server | turns (failed) | TTFT mean / p99 s | JCT mean / p99 s "
        "| ITL p99 ms | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.workload} | {row.server} | {row.turns} ({row.failed}) "
            f"| {row.ttft:.3f} / {row.ttft_p99:.3f} | {row.jct:.2f} / {row.jct_p99:.2f} "
            f"| {1e3 * row.itl_p99:.0f} | {row.output_per_second:.0f} |"
        )
    return "\n".join(lines)
