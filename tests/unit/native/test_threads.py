"""A model's threads: on the cores they were given, asleep when idle, and all at work for one long request."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from memserve.core.errors import ConfigError
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.runners.base import ForwardBatch
from memserve.engine.runners.native import NativeRunner

CORES = sorted(os.sched_getaffinity(0))
PATIENCE = 60.0

needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="this process may use one core only")


def tasks() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


@contextmanager
def running(cores: list[int], threads: int = 2, **shape: int) -> Iterator[tuple[NativeRunner, set[int]]]:
    """A runner, and the ids of its worker threads."""
    context = shape.pop("context", 64)
    before = tasks()
    runner = NativeRunner(tiny_weights(1, **shape), threads=threads, context=context, cores=cores)  # type: ignore[arg-type]
    try:
        yield runner, tasks() - before
    finally:
        runner.close()
    # A thread that has been joined is listed a little longer.
    wait_until(lambda: tasks() <= before, os.sched_yield)


def last_token(runner: NativeRunner, length: int) -> tuple[ForwardBatch, object]:
    """One row at the end of ``length`` tokens whose KV is zeros, and the memory that must be kept for it."""
    size, count = runner.layout.block_bytes, runner.layout.blocks_for(length)
    memory = np.zeros(count * size, np.uint8)
    blocks = np.uint64(memory.ctypes.data) + np.arange(count, dtype=np.uint64)[None] * np.uint64(size)
    one, end = np.zeros(1, np.int32), np.array([0, 1], np.int32)
    return ForwardBatch(one, one + np.int32(length - 1), end, blocks, one), memory


def wait_until(condition: Callable[[], bool], step: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        step()


def state_of(task: int) -> str:
    return Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()[0]


def worked(task: int) -> int:
    """Nanoseconds on a processor."""
    return int(Path(f"/proc/self/task/{task}/schedstat").read_text().split()[0])


@needs_two_cores
def test_workers_stay_where_they_are_told() -> None:
    here = os.sched_getaffinity(0)
    for cores in (CORES[:2], CORES[1::-1]):
        with running(cores) as (_, workers):
            assert [os.sched_getaffinity(worker) for worker in workers] == [{cores[1]}]
    with running([]) as (_, workers):
        assert [os.sched_getaffinity(worker) for worker in workers] == [here]
    assert os.sched_getaffinity(0) == here, "the calling thread is nobody's to move"


@pytest.mark.parametrize(
    ("cores", "message"),
    [
        ([CORES[0], CORES[0]], "is there twice"),
        ([CORES[0], max(CORES) + 1], "is none that this process may use"),
        ([CORES[0]], "1 cores for 2 threads"),
    ],
)
@needs_two_cores
def test_cores_that_are_not_there(cores: list[int], message: str) -> None:
    before = tasks()
    with pytest.raises(ConfigError, match=message):
        NativeRunner(tiny_weights(1), threads=2, context=64, cores=cores)
    wait_until(lambda: tasks() == before, os.sched_yield)


@needs_two_cores
def test_idle_workers_sleep() -> None:
    with running([]) as (runner, workers):
        batch, memory = last_token(runner, 40)
        for _ in range(50):
            runner.forward(batch)
        wait_until(lambda: all(state_of(worker) == "S" for worker in workers), os.sched_yield)
        rest = {worker: worked(worker) for worker in workers}
        deadline = time.monotonic() + 0.2
        wait_until(lambda: time.monotonic() > deadline, os.sched_yield)
        assert {worker: worked(worker) for worker in workers} == rest
        del memory


@needs_two_cores
def test_one_long_request_uses_all_threads() -> None:
    """Attention of one row and one KV head, which is nearly all there is to do, is split over the context."""
    shape = {"layers": 1, "hidden": 32, "heads": 1, "kv_heads": 1, "head_dim": 256, "vocabulary": 32}
    with running([], context=8192, **shape) as (runner, workers):
        batch, memory = last_token(runner, 8192)
        (worker,) = workers
        caller = threading.get_native_id()
        begun = {task: worked(task) for task in (caller, worker)}

        def share() -> float:
            return (worked(worker) - begun[worker]) / max(1, worked(caller) - begun[caller])

        def step() -> None:
            for _ in range(100):
                runner.forward(batch)

        step()
        wait_until(lambda: share() > 0.5, step)
        del memory


def test_python_runs_while_a_model_computes() -> None:
    with running([], threads=1, hidden=512, layers=4, context=512) as (runner, _):
        rows = np.arange(400, dtype=np.int32)
        batch, memory = last_token(runner, 512)
        batch = ForwardBatch(rows % 256, rows, np.array([0, 400], np.int32), batch.blocks, rows[:1])
        window: list[float] = []

        def compute() -> None:
            window.append(time.monotonic())
            runner.forward(batch)
            window.append(time.monotonic())

        computing = threading.Thread(target=compute)
        ticks: list[float] = []
        computing.start()
        while computing.is_alive():
            ticks.append(time.monotonic())
        computing.join(PATIENCE)
        begin, end = window
        quarter = (end - begin) / 4
        assert [tick for tick in ticks if begin + quarter < tick < end - quarter]
        del memory
