"""The paper's table: three workloads, each at three loads, on four configurations of two instances.

    python benchmarks/paper_table.py --data DIR [--workloads sharegpt,loogle,react] [--loads 0.3,0.6,0.9]
                                     [--context 2048] [--think S] [--seconds 40] [--rounds 1] [--out FILE]

Caching or not, colocated or disaggregated (Hu et al., MemServe, 2024, figures 8 and 9). A load of 1 is what
the colocated configuration without caching gets done: it is measured first, with sessions in a closed loop.
At each load sessions begin as a Poisson process, the same for all four, which take turns. The paper's own
effects stand beside ours; its machine had eight GPUs, so only what is relative can be compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_command import Row, row_of, run_bench
from recording import write_result

NAMES = ("colocated", "colocated-cache", "disagg", "disagg-cache")
PAPER = {"sharegpt": (0.58, 0.17), "loogle": (0.56, 0.27), "react": (0.78, 0.27)}
"""Share of mean TTFT and of mean JCT that caching on top of disaggregation saved in the paper."""
CAPACITY_SESSIONS = 16
CAPACITY_CONCURRENCY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(Row):
    """One configuration, the ``server``, under one load."""

    load: float
    rate: float
    ttft_later: float
    moved_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data sets")
    parser.add_argument("--workloads", default="sharegpt,loogle,react")
    parser.add_argument("--loads", default="0.3,0.6,0.9", help="shares of the colocated configuration's rate")
    parser.add_argument(
        "--context", type=int, default=2048, help="tokens that prompts and answers are cut to"
    )
    parser.add_argument("--think", type=float, help="mean seconds between turns; default: the workload's")
    parser.add_argument("--seconds", type=float, default=40.0, help="in which sessions arrive, per cell")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/paper_table.json")
    options = parser.parse_args()
    cells: list[Cell] = []
    capacities: dict[str, float] = {}
    for workload in options.workloads.split(","):
        capacity = capacities[workload] = measure_capacity(workload, options)
        print(f"{workload}: {capacity:.3f} sessions/s without caching", flush=True)
        for load in (float(text) for text in options.loads.split(",")):
            cells += measure(workload, options, load, load * capacity)
            print(table(cells[-len(NAMES) :]), flush=True)
            figures = {
                "context": options.context,
                "sessions_per_second": capacities,
                "cells": [asdict(cell) for cell in cells],
            }
            write_result("paper_table", {**figures, "effects": effects(cells)}, options.out)
    print(table(cells))
    print(table_of_effects(cells))


def measure_capacity(workload: str, options: argparse.Namespace) -> float:
    """Sessions per second of the colocated configuration without caching when it is never idle."""
    report = run_bench(
        "--compare", NAMES[0], "--workload", workload, "--data", str(options.data), "--think", "0",
        "--context", str(options.context),
        "--sessions", str(CAPACITY_SESSIONS), "--concurrency", str(CAPACITY_CONCURRENCY),
    )  # fmt: skip
    return CAPACITY_SESSIONS / report["entries"][0]["figures"]["seconds"]


def measure(workload: str, options: argparse.Namespace, load: float, rate: float) -> list[Cell]:
    """All configurations under one load, in turns."""
    report = run_bench(
        "--compare", ",".join(NAMES), "--workload", workload, "--data", str(options.data),
        "--context", str(options.context), "--rate", f"{rate:.4f}", "--rounds", str(options.rounds),
        "--sessions", str(max(4, round(rate * options.seconds))),
        *(() if options.think is None else ("--think", str(options.think))),
    )  # fmt: skip
    return [cell_of(workload, load, rate, entry) for entry in report["entries"]]


def cell_of(workload: str, load: float, rate: float, entry: Mapping[str, Any]) -> Cell:
    figures = entry["figures"]
    return Cell(
        **asdict(row_of(workload, entry)),
        load=load,
        rate=rate,
        ttft_later=figures["ttft_later"]["mean"],
        moved_bytes=figures["sent_bytes"] or 0,
    )


def effects(cells: Sequence[Cell]) -> list[dict[str, str | float]]:
    """What caching saves on top of disaggregation, per workload and load, as shares."""
    found: list[dict[str, str | float]] = []
    by_key = {(cell.workload, cell.load, cell.server): cell for cell in cells}
    for (workload, load, name), with_cache in by_key.items():
        without = by_key.get((workload, load, "disagg"))
        if name == "disagg-cache" and without is not None:
            ttft, jct = 1 - with_cache.ttft / without.ttft, 1 - with_cache.jct / without.jct
            paper = PAPER[workload]
            found.append(
                {"workload": workload, "load": load, "ttft_saved": ttft, "jct_saved": jct,
                 "paper_ttft_saved": paper[0], "paper_jct_saved": paper[1]}
            )  # fmt: skip
    return found


def table(cells: Sequence[Cell]) -> str:
    """Markdown."""
    lines = [
        "| workload | load | configuration | turns (failed) | TTFT mean / p99 s | later turns "
        "| JCT mean / p99 s | ITL p99 ms | cached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        lines.append(
            f"| {cell.workload} | {cell.load:g} | {cell.server} | {cell.turns} ({cell.failed}) "
            f"| {cell.ttft:.3f} / {cell.ttft_p99:.3f} | {cell.ttft_later:.3f} "
            f"| {cell.jct:.2f} / {cell.jct_p99:.2f} | {1e3 * cell.itl_p99:.0f} | {cell.cached_share:.0%} |"
        )
    return "\n".join(lines)


def table_of_effects(cells: Sequence[Cell]) -> str:
    """Markdown."""
    lines = ["| workload | load | TTFT saved (paper) | JCT saved (paper) |", "|---|---|---|---|"]
    for one in effects(cells):
        lines.append(
            f"| {one['workload']} | {one['load']:g} "
            f"| {one['ttft_saved']:.0%} ({one['paper_ttft_saved']:.0%}) "
            f"| {one['jct_saved']:.0%} ({one['paper_jct_saved']:.0%}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
