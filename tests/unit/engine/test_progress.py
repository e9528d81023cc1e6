"""A pass tells how many layers it has done, exactly, whoever listens and whenever; nobody has to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from memserve.engine.models.tiny import tiny_weights
from memserve.engine.progress import LayerListener
from memserve.engine.runners.base import ForwardBatch, LayerSignal, Runner
from memserve.engine.runners.native import NativeRunner
from memserve.engine.runners.reference import ReferenceRunner

LAYERS = 5
WEIGHTS = tiny_weights(1, layers=LAYERS, context=1300)
SECONDS = 30.0


def native() -> Runner:
    return NativeRunner(WEIGHTS, threads=1, context=1300)


def reference() -> Runner:
    return ReferenceRunner(WEIGHTS)


@pytest.fixture(params=[native, reference])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    make: Callable[[], Runner] = request.param
    runner = make()
    yield runner
    runner.close()


@pytest.fixture
def counter() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


class Prompt:
    """One sequence of ``rows`` tokens and the memory of its blocks. Keep it while a batch of it is in use."""

    def __init__(self, runner: Runner, rows: int) -> None:
        layout, self.rows = runner.layout, rows
        count = layout.blocks_for(rows)
        self.memory = np.zeros(count * layout.block_bytes, np.uint8)
        start = np.uint64(self.memory.ctypes.data)
        self.blocks = start + np.arange(count, dtype=np.uint64)[None] * np.uint64(layout.block_bytes)

    @property
    def batch(self) -> ForwardBatch:
        numbers = np.arange(self.rows, dtype=np.int32)
        starts, last = np.array([0, self.rows], np.int32), np.array([self.rows - 1], np.int32)
        return ForwardBatch(numbers % 97, numbers, starts, self.blocks, last)


def tiles(runner: Runner, rows: int) -> int:
    return -(-rows // runner.tile_rows)


@pytest.mark.parametrize("every", [1, 2, 3, LAYERS, 7])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_sum_is_the_layers_of_all_tiles(runner: Runner, counter: int, rows: int, every: int) -> None:
    prompt = Prompt(runner, rows)
    quiet = runner.forward(prompt.batch).copy()
    told = runner.forward(prompt.batch, LayerSignal(counter, every))
    assert os.eventfd_read(counter) == LAYERS * tiles(runner, rows)
    np.testing.assert_array_equal(told, quiet)


def test_each_tile_tells_of_its_layers(counter: int) -> None:
    runner = native()
    rows = 2 * runner.tile_rows + 100
    prompt = Prompt(runner, rows)
    runner.forward(prompt.batch, LayerSignal(counter, 2))
    assert os.eventfd_read(counter) == 3 * LAYERS
    runner.close()


def test_an_impossible_stride_is_refused_before_anything_is_computed(counter: int) -> None:
    runner = native()
    prompt = Prompt(runner, 3)
    with pytest.raises(ValueError, match="at least 1 layer"):
        runner.forward(prompt.batch, LayerSignal(counter, 0))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(counter)
    runner.close()


def test_what_was_told_of_is_there(counter: int) -> None:
    """Written by the time the loop hears of it: the KV of a layer, in a pass that is still running."""

    class Watched(ReferenceRunner):
        def _feed_forward(self, layer, hidden):  # type: ignore[no-untyped-def]
            index = next(at for at, one in enumerate(self._weights.layers) if one is layer)
            halves = prompt.memory.reshape(LAYERS, -1) if len(prompt.blocks[0]) == 1 else None
            assert halves is not None
            seen.append(bool(halves[index].any()) and not halves[index + 1 :].any())
            return super()._feed_forward(layer, hidden)

    seen: list[bool] = []
    runner = Watched(WEIGHTS)
    prompt = Prompt(runner, 16)
    runner.forward(prompt.batch, LayerSignal(counter))
    assert seen == [True] * LAYERS
    assert os.eventfd_read(counter) == LAYERS


def test_a_listener_hears_every_layer_of_each_pass(runner: Runner) -> None:
    async def scenario() -> None:
        loop, listener = asyncio.get_running_loop(), LayerListener()
        prompt = Prompt(runner, 30)
        for _ in range(3):
            heard: list[int] = []
            complete = asyncio.Event()

            def hear(layers: int, heard: list[int] = heard, complete: asyncio.Event = complete) -> None:
                heard.append(layers)
                if layers == LAYERS:
                    complete.set()

            signal = listener.start(1, hear)
            await loop.run_in_executor(None, runner.forward, prompt.batch, signal)
            async with asyncio.timeout(SECONDS):
                await complete.wait()
            listener.stop()
            assert heard == sorted(set(heard))
        listener.close()

    asyncio.run(scenario())


def test_what_nobody_heard_of_one_pass_does_not_count_for_the_next() -> None:
    async def scenario() -> None:
        listener, heard = LayerListener(), list[int]()
        first = listener.start(1, heard.append)
        os.eventfd_write(first.fd, 3)
        listener.stop()
        second = listener.start(1, heard.append)
        os.eventfd_write(second.fd, 2)
        async with asyncio.timeout(SECONDS):
            while not heard:
                await asyncio.sleep(0)
        assert heard == [2]
        listener.close()
        listener.close()

    asyncio.run(scenario())
