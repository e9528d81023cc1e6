"""Speed and bytes of KV in int8 beside bf16, on SmolLM2-135M's shape, and the time to move its blocks.

Every round runs each workload with both, the order changing; ratios pair times of one round. Weights are
random: values do not change speed. ``transfer`` is the copy with checksums that transfers within a host make.

    python benchmarks/kv_dtype.py [--rounds N] [--threads 1,2] [--weights stored|bf16] [--isa NAME]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from memserve import _native
from memserve.engine.runners.base import ForwardBatch
from memserve.engine.runners.native import NativeRunner
from memserve.mempool import KVLayout
from native_speed import SMOLLM2, quartiles, random_stored, random_weights
from recording import describe_commit, describe_machine

RESULTS = Path(__file__).parent / "results" / "kv_dtype.json"
DTYPES = ("bf16", "int8")
CONTEXT = 8192
TRANSFER_BLOCKS = 64

Times = dict[str, list[tuple[float, float]]]
"""Seconds of the clock and of processors, of each dtype in each round."""


@dataclass(frozen=True, slots=True)
class Workload:
    """``prefill``: a prompt of ``context`` tokens; ``decode``: a token for each of ``rows`` conversations."""

    kind: str
    rows: int
    context: int

    @property
    def name(self) -> str:
        batch = "" if self.kind == "prefill" else f" b{self.rows} at"
        return f"{self.kind}{batch} {self.context}"

    @property
    def blocks(self) -> int:
        each = -(-(self.context + (self.kind == "decode")) // 16)
        return each * (self.rows if self.kind == "decode" else 1)


WORKLOADS = [
    *(Workload("prefill", n, n) for n in (512, 2048)),
    Workload("decode", 1, 512),
    Workload("decode", 1, 4096),
    Workload("decode", 8, 512),
    Workload("decode", 8, 4096),
]


@dataclass(frozen=True, slots=True)
class Figure:
    """Medians and quartiles; ratios are bf16's time divided by int8's in the same round: above 1, int8 wins.

    ``cpu_ratio`` is that of processor time, which neighbours on the cores disturb less.
    """

    threads: int
    workload: str
    seconds_bf16: float
    seconds_int8: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    cpu_ratio: float
    cpu_ratio_quartiles: tuple[float, float]


class Side:
    """A runner with KV of one dtype, and blocks in scattered order."""

    def __init__(self, dtype: str, threads: int, weights: str, isa: str | None) -> None:
        floats = random_weights(SMOLLM2)
        kept = random_stored(floats) if weights == "stored" else floats
        self.runner = NativeRunner(
            kept, threads=threads, context=CONTEXT, isa=isa, keep=weights, kv_dtype=dtype
        )
        self.block_bytes = self.runner.layout.block_bytes
        count = max(workload.blocks for workload in WORKLOADS)
        self._memory, ordered = _aligned_blocks(count, self.block_bytes)
        self.blocks = np.random.default_rng(5).permutation(ordered)
        self._spare, self._targets = _aligned_blocks(TRANSFER_BLOCKS, self.block_bytes)

    def pass_of(self, workload: Workload) -> Callable[[], object]:
        batch = _make_batch(workload, self.blocks)
        return lambda: self.runner.forward(batch)

    def transfer(self) -> object:
        return _native.copy_blocks(self._targets, self.blocks[:TRANSFER_BLOCKS], self.block_bytes)


def _aligned_blocks(count: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    memory = np.zeros(count * block_bytes + 64, np.uint8)
    memory[:] = 1
    first = np.uint64(-(-memory.ctypes.data // 64) * 64)
    return memory, first + np.arange(count, dtype=np.uint64) * np.uint64(block_bytes)


def _make_batch(workload: Workload, blocks: np.ndarray) -> ForwardBatch:
    rows = workload.rows
    tokens = np.random.default_rng(1).integers(0, SMOLLM2.vocabulary, rows).astype(np.int32)
    used = blocks[: workload.blocks].copy()
    each = np.arange(rows, dtype=np.int32)
    if workload.kind == "prefill":
        return ForwardBatch(tokens, each, np.array([0, rows], np.int32), used[None], each[-1:])
    positions = np.full(rows, workload.context, np.int32)
    return ForwardBatch(tokens, positions, np.arange(rows + 1, dtype=np.int32), used.reshape(rows, -1), each)


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of processors."""
    wall, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - used


def measure(threads: int, weights: str, isa: str | None, rounds: int) -> list[Figure]:
    sides = {dtype: Side(dtype, threads, weights, isa) for dtype in DTYPES}
    work: dict[str, dict[str, Callable[[], object]]] = {
        workload.name: {dtype: side.pass_of(workload) for dtype, side in sides.items()}
        for workload in WORKLOADS
    }
    work[f"transfer of {TRANSFER_BLOCKS} blocks"] = {dtype: side.transfer for dtype, side in sides.items()}
    times: dict[str, Times] = {name: {dtype: [] for dtype in DTYPES} for name in work}
    for each in work.values():
        for dtype in DTYPES:
            each[dtype]()
    for number in range(rounds):
        for name, each in work.items():
            for dtype in DTYPES[:: 1 if number % 2 else -1]:
                times[name][dtype].append(seconds_of(each[dtype]))
    for side in sides.values():
        side.runner.close()
    return [figure_of(threads, name, taken) for name, taken in times.items()]


def figure_of(threads: int, name: str, taken: Times) -> Figure:
    pairs = list(zip(taken["bf16"], taken["int8"], strict=True))
    ratios, cpu_ratios = ([a[clock] / b[clock] for a, b in pairs] for clock in (0, 1))
    bf16, int8 = (statistics.median(wall for wall, _ in taken[dtype]) for dtype in DTYPES)
    figure = Figure(
        threads,
        name,
        bf16,
        int8,
        statistics.median(ratios),
        quartiles(ratios),
        statistics.median(cpu_ratios),
        quartiles(cpu_ratios),
    )
    low, high = figure.ratio_quartiles
    print(
        f"{threads} threads  {name:<24} bf16 {bf16 * 1e3:9.2f} ms  int8 {int8 * 1e3:9.2f} ms  "
        f"bf16 / int8 {figure.ratio:5.2f} ({low:.2f}-{high:.2f}), processor time {figure.cpu_ratio:5.2f}",
        flush=True,
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", default="1,2", help="thread counts, separated by commas")
    parser.add_argument("--weights", choices=("stored", "bf16"), default="stored")
    parser.add_argument("--isa", choices=_native.supported_isas())
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    counts = [int(threads) for threads in arguments.threads.split(",")]
    figures = [
        f for threads in counts for f in measure(threads, arguments.weights, arguments.isa, arguments.rounds)
    ]
    report = {
        "machine": describe_machine(),
        "commit": describe_commit(),
        "isa": arguments.isa or _native.isa(),
        "model": SMOLLM2.identity,
        "weights": arguments.weights,
        "rounds": arguments.rounds,
        "kv_bytes_per_token": {dtype: _bytes_per_token(dtype) for dtype in DTYPES},
        "figures": [asdict(figure) for figure in figures],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def _bytes_per_token(dtype: str) -> float:
    layout = KVLayout("", SMOLLM2.layers, SMOLLM2.kv_heads, SMOLLM2.head_dim, dtype=dtype)
    return layout.block_bytes / layout.block_tokens


if __name__ == "__main__":
    main()
