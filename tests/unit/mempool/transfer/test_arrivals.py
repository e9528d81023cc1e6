"""Arrivals: verified piece by piece, and not stopped while somebody writes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from memserve._native import checksum_blocks
from memserve.core.errors import ProtocolError, TransferAborted
from memserve.mempool.arena import Arena
from memserve.mempool.transfer.arrivals import SharedArrival, StreamedArrival

BYTES, BLOCKS = 512, 6
NOTHING = np.empty(0, np.int64)


def new_arena() -> Arena:
    arena = Arena.allocate(BYTES, BLOCKS, "arrivals")
    for number in range(BLOCKS):
        arena.block_memory(number)[:] = number + 1
    return arena


def expected(arena: Arena) -> np.ndarray:
    return checksum_blocks(arena.pointers(np.arange(BLOCKS)), BYTES)


@pytest.mark.parametrize(
    "parts",
    [[], [(0, 2), (2, 3)], [(0, 6)], [(2, 2)], [(0, 2), (0, 2)], [(0, 7)], [(0, 0)]],
    ids=["none", "most", "all", "late", "doubled", "too many", "empty"],
)
def test_shared_memory_is_verified_whatever_the_sender_tells(parts: list[tuple[int, int]]) -> None:
    async def scenario() -> None:
        arena = new_arena()
        with ThreadPoolExecutor(1) as workers:
            arrival = SharedArrival(arena.pointers(np.arange(BLOCKS)), BYTES, workers)
            for first, blocks in parts:
                arrival.written(first, blocks)
            assert np.array_equal(await arrival.checksums(), expected(arena))

    asyncio.run(scenario())


def test_a_stream_fills_the_blocks_in_order() -> None:
    async def scenario() -> None:
        arena = new_arena()
        arrival = streamed(arena)
        waiting = asyncio.ensure_future(arrival.checksums())
        for first, blocks in ((0, 4), (4, 2)):
            views = arrival.begin(first, blocks, BYTES)
            assert views is not None
            for view in views:
                view[:] = bytes([9]) * len(view)
            assert not waiting.done()
            arrival.finish(blocks)
            assert arrival.take_progress()
            assert not arrival.take_progress()
        assert np.array_equal(await waiting, expected(arena))
        assert (arena.block_memory(5) == 9).all()

    asyncio.run(scenario())


@pytest.mark.parametrize(("first", "blocks"), [(1, 1), (0, 7), (0, 0)])
def test_a_stream_cannot_write_elsewhere(first: int, blocks: int) -> None:
    async def scenario() -> None:
        with pytest.raises(ProtocolError, match="of 6 had"):
            streamed(new_arena()).begin(first, blocks, BYTES)

    asyncio.run(scenario())


def test_blocks_are_let_go_only_when_the_stream_has_stopped_writing() -> None:
    async def scenario() -> None:
        arrival = streamed(new_arena())
        freed: list[str] = []
        arrival.begin(0, 2, BYTES)
        waiting = asyncio.ensure_future(arrival.checksums())
        await asyncio.sleep(0)
        arrival.stop(TransferAborted("told to"), lambda: freed.append("first"))
        arrival.stop(TransferAborted("again"), lambda: freed.append("second"))
        with pytest.raises(TransferAborted, match="told to"):
            await waiting
        assert not freed
        arrival.finish(0)
        await asyncio.sleep(0)
        assert freed == ["first"]
        assert arrival.begin(0, 2, BYTES) is None

    asyncio.run(scenario())


def test_an_idle_arrival_stops_at_once() -> None:
    async def scenario() -> None:
        freed: list[str] = []
        streamed(new_arena()).stop(TransferAborted("x"), lambda: freed.append("streamed"))
        with ThreadPoolExecutor(1) as workers:
            shared = SharedArrival(np.empty(0, np.uint64), BYTES, workers)
            shared.stop(TransferAborted("x"), lambda: freed.append("shared"))
            shared.stop(TransferAborted("x"), lambda: freed.append("again"))
        assert freed == ["streamed", "shared"]

    asyncio.run(scenario())


def test_nothing_to_send_has_arrived() -> None:
    async def scenario() -> None:
        assert len(await StreamedArrival(new_arena().units(NOTHING, NOTHING, BYTES)).checksums()) == 0

    asyncio.run(scenario())


def streamed(arena: Arena) -> StreamedArrival:
    return StreamedArrival(arena.units(np.arange(BLOCKS), np.zeros(BLOCKS, np.int64), BYTES))
