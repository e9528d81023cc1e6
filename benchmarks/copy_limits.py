"""What copying KV blocks through shared memory costs at best: with checksums, and with a second look.

    python benchmarks/copy_limits.py [--rounds N] [--out FILE]

In one process, 64 blocks of 368,640 bytes between two segments, all sides in turns: glibc memcpy; a streaming
copy without checksums (C, compiled here); the pool's copy, which computes checksums as it goes; the checksum
alone; and the pool's copy while a second thread verifies what is there already, without any message in
between. The last one is what a transfer that lets its receiver verify every byte cannot exceed.
"""

from __future__ import annotations

import argparse
import ctypes
import queue
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from memserve import _native
from memserve.mempool.arena import Arena
from recording import write_result

BLOCK_BYTES = 368_640
BLOCKS = 64
STEP = 8
"""Blocks after which the verifying thread is told."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/copy_limits.json")
    options = parser.parse_args()
    own = Arena.allocate(BLOCK_BYTES, BLOCKS, "source")
    peer = Arena.allocate(BLOCK_BYTES, BLOCKS, "target")
    for number in range(BLOCKS):
        own.block_memory(number)[:] = number
        peer.block_memory(number)[:] = 0
    numbers = np.arange(BLOCKS, dtype=np.int64)
    taken = in_turns(sides(own.pointers(numbers), peer.pointers(numbers)), options.rounds)
    figures = {
        f"{name}_gb_per_s": spread([BLOCKS * BLOCK_BYTES / t / 1e9 for t in taken[name]]) for name in taken
    }
    for name in ("streaming", "copy", "copy_and_verify"):
        figures[f"{name}_to_memcpy"] = spread(ratios(taken["memcpy"], taken[name]))
    share = [1 - plain / summed for plain, summed in zip(taken["streaming"], taken["copy"], strict=True)]
    figures["checksum_share_of_copy"] = spread(share)
    write_result("copy_limits", {"isa": _native.isa(), "figures": figures}, options.out)
    for name, figure in figures.items():
        print(f"{name:28s}", "  ".join(f"{key} {value:.3f}" for key, value in figure.items()))


def sides(sources: np.ndarray, targets: np.ndarray) -> dict[str, Callable[[], None]]:
    pairs = list(zip(targets.tolist(), sources.tolist(), strict=True))
    stream = compiled().stream_blocks
    stream.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)

    def memcpy() -> None:
        for target, source in pairs:
            ctypes.memmove(target, source, BLOCK_BYTES)

    return {
        "memcpy": memcpy,
        "streaming": lambda: stream(targets.ctypes.data, sources.ctypes.data, BLOCKS, BLOCK_BYTES),
        "copy": lambda: _copy(targets, sources),
        "checksum": lambda: _verify(targets),
        "copy_and_verify": Verified(targets, sources),
    }


class Verified:
    """Copies in steps while a second thread reads what has been copied."""

    def __init__(self, targets: np.ndarray, sources: np.ndarray) -> None:
        self._targets, self._sources = targets, sources
        self._steps: queue.SimpleQueue[slice] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        threading.Thread(target=self._verify, daemon=True).start()

    def __call__(self) -> None:
        for first in range(0, BLOCKS, STEP):
            step = slice(first, first + STEP)
            _copy(self._targets[step], self._sources[step])
            self._steps.put(step)
        for _ in range(0, BLOCKS, STEP):
            self._done.get(timeout=10)

    def _verify(self) -> None:
        while True:
            _verify(self._targets[self._steps.get()])
            self._done.put(None)


def _copy(targets: np.ndarray, sources: np.ndarray) -> None:
    _native.copy_blocks(targets, sources, BLOCK_BYTES)


def _verify(targets: np.ndarray) -> None:
    _native.checksum_blocks(targets, BLOCK_BYTES)


def compiled() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "copy_limits.so"
        source = Path(__file__).with_suffix(".c")
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def in_turns(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        # Each starts from what another one has left in the caches, and not always the same one.
        random.Random(turn).shuffle(names)
        for name in names:
            started = time.perf_counter()
            sides[name]()
            taken[name].append(time.perf_counter() - started)
    return taken


def ratios(yardstick: list[float], measured: list[float]) -> list[float]:
    return [one / other for one, other in zip(yardstick, measured, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "p25": low, "p75": high}


if __name__ == "__main__":
    main()
