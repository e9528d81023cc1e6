"""What steps cost on this machine before there has been one: measured in a moment, and kept for later starts.

Engines correct it by their own steps; what they have learnt replaces the file when they end.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.cluster.host import processor_name
from memserve.core.types import StepPrices
from memserve.engine.pace import Work
from memserve.engine.runners.base import ForwardBatch, Runner
from memserve.mempool.pool import MemPool

log = logging.getLogger(__name__)

SECONDS = 1.0
"""No pass begins later than so long after the first."""
_PULL = 0.01
"""What the usual proportions of prices count beside a measured pass: they decide where no pass does."""
_LEAST = 0.01
"""No price is less than this part of what the usual proportions say."""
_VERSION = 1
SETTLED = 200
"""After so many steps what an engine has learnt is better than what was measured at its start."""


@dataclass(frozen=True, slots=True)
class Trial:
    """``streams`` sequences of ``rows`` new tokens each, with ``computed`` tokens behind them.

    ``proposed`` of the rows are speculated ones.
    """

    streams: int
    rows: int
    computed: int
    proposed: int = 0

    @property
    def work(self) -> Work:
        work = Work()
        for _ in range(self.streams):
            if self.rows > 1 + self.proposed:
                work = work.prefill(self.computed, self.rows)
            else:
                work = work.decode(self.computed)
                work = work.speculate(self.computed, self.proposed) if self.proposed else work
        return work


def trials_within(context: int, step_tokens: int) -> Iterator[Trial]:
    """Passes that tell the prices apart, small ones first."""
    near, far = 64, min(1024, context // 2)
    for trial in (
        Trial(1, 1, near),
        Trial(8, 1, near),
        Trial(1, 5, near, proposed=4),
        Trial(1, 64, 0),
        Trial(1, 1, far),
        Trial(8, 1, far),
        Trial(1, 128, far),
        Trial(1, step_tokens, 0),
    ):
        if trial.computed + trial.rows <= context and trial.streams * trial.rows <= step_tokens:
            yield trial


class ProfileStore:
    """Prices in ``folder``, one file per ``key``. A cache only: what goes wrong is said in one line."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        self._path = folder / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.prices"

    def find(self) -> StepPrices | None:
        """What was kept; None if there is nothing that can be used."""
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=StepPrices)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("%s: %s; measuring again", self._path, error)
            return None
        return found if all(0 < price < float("inf") for price in msgspec.structs.astuple(found)) else None

    def keep(self, prices: StepPrices) -> None:
        """A file appears complete or not at all."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(".tmp", ".prices-", self._folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(msgspec.json.encode(prices))
                os.replace(name, self._path)
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
                raise
        except OSError as error:
            log.warning("what steps cost is not kept in %s: %s", self._folder, error)


def profile_key(runner: Runner, weights: str, threads: int) -> str:
    """What prices depend on. The layout names model and numerics, but not how ``weights`` are kept."""
    return f"{_VERSION}|{runner.layout.fingerprint}|{weights}|{runner.isa}|{threads}|{processor_name()}"


def measure_prices(
    runner: Runner, pool: MemPool, *, context: int, step_tokens: int, seconds: float = SECONDS
) -> StepPrices | None:
    """Run a few passes on blocks of ``pool``, which are free again afterwards. None if it has too few."""
    trials = list(trials_within(context, step_tokens))
    need = max(pool.layout.blocks_for(trial.computed + trial.rows) for trial in trials) + 8
    if need > pool.stats().free:
        return None
    addrs = pool.alloc_mem(need)
    try:
        blocks = pool.pointers(addrs)
        runner.forward(make_batch(trials[0], blocks, pool.layout.block_tokens))
        return fit_prices(list(_measure(runner, trials, blocks, pool.layout.block_tokens, seconds)))
    finally:
        pool.free_mem(addrs)


def fit_prices(measured: Sequence[tuple[Trial, float]]) -> StepPrices:
    """Least squares of relative errors over positive prices; at least one trial with its seconds."""
    amounts = np.array([trial.work.amounts for trial, _ in measured], np.float64)
    seconds = np.array([taken for _, taken in measured])
    usual = np.array(msgspec.structs.astuple(StepPrices()))
    usual *= np.median(seconds / (amounts @ usual))
    rows = np.vstack([amounts * usual / seconds[:, None], _PULL * np.eye(len(usual))])
    wanted = np.concatenate([np.ones(len(seconds)), np.full(len(usual), _PULL)])
    prices = np.full(len(usual), _LEAST)
    free = np.ones(len(usual), bool)
    while free.any():
        rest = wanted - rows[:, ~free] @ prices[~free]
        prices[free] = np.linalg.lstsq(rows[:, free], rest, rcond=None)[0]
        low = free & (prices < _LEAST)
        if not low.any():
            break
        prices[low] = _LEAST
        free &= ~low
    return StepPrices(*(prices * usual).tolist())


def make_batch(trial: Trial, blocks: NDArray[np.uint64], block_tokens: int) -> ForwardBatch:
    """Its streams share the blocks behind them and have their last ones for themselves."""
    rows, first = trial.rows, trial.computed
    width = -(-(first + rows) // block_tokens)
    table = np.tile(blocks[:width], (trial.streams, 1))
    table[:, -1] = blocks[width : width + trial.streams] if trial.streams > 1 else blocks[width - 1]
    positions = np.tile(np.arange(first, first + rows, dtype=np.int32), trial.streams)
    starts = np.arange(trial.streams + 1, dtype=np.int32) * rows
    wanted = starts[1:] - 1 if not trial.proposed else np.arange(rows, dtype=np.int32)
    return ForwardBatch(np.ones(len(positions), np.int32), positions, starts, table, wanted)


def _measure(
    runner: Runner, trials: list[Trial], blocks: NDArray[np.uint64], block_tokens: int, seconds: float
) -> Iterator[tuple[Trial, float]]:
    """Each trial's time: the quicker one of two, while there is time."""
    begun = time.perf_counter()
    for trial in trials:
        batch = make_batch(trial, blocks, block_tokens)
        taken = []
        for _ in range(2):
            if time.perf_counter() - begun > seconds:
                break
            before = time.perf_counter()
            runner.forward(batch)
            taken.append(time.perf_counter() - before)
        if taken:
            yield trial, min(taken)
