"""The gate between a producer's thread and a transfer."""

from __future__ import annotations

import asyncio
import threading

import pytest

from memserve.core.errors import TransferAborted
from memserve.mempool import LayerGate

DEADLINE = 10.0


def test_layers_come_through_in_order_from_another_thread() -> None:
    async def scenario() -> None:
        gate, seen = LayerGate(), []

        async def follow() -> None:
            for layers in range(1, 5):
                await gate.wait(layers)
                seen.append((layers, gate.layers >= layers))

        def produce() -> None:
            for layers in range(1, 5):
                gate.open(layers)

        following = asyncio.ensure_future(follow())
        await asyncio.sleep(0)
        thread = threading.Thread(target=produce)
        thread.start()
        async with asyncio.timeout(DEADLINE):
            await following
        thread.join(DEADLINE)
        assert seen == [(layers, True) for layers in range(1, 5)]

    asyncio.run(scenario())


def test_what_was_opened_stays_open() -> None:
    async def scenario() -> None:
        gate = LayerGate()
        gate.open(3)
        gate.open(1)
        gate.fail("the step failed")
        async with asyncio.timeout(DEADLINE):
            await gate.wait(3)
            with pytest.raises(TransferAborted, match="layer 3 was not computed: the step failed"):
                await gate.wait(4)

    asyncio.run(scenario())


def test_a_failure_wakes_all_that_wait() -> None:
    async def scenario() -> None:
        gate = LayerGate()
        waiting = [asyncio.ensure_future(gate.wait(layers)) for layers in (1, 2)]
        await asyncio.sleep(0)
        threading.Thread(target=gate.fail, args=("out of memory",)).start()
        async with asyncio.timeout(DEADLINE):
            for error in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(error, TransferAborted)

    asyncio.run(scenario())


def test_who_has_stopped_waiting_is_forgotten() -> None:
    async def scenario() -> None:
        gate = LayerGate()
        waiting = asyncio.ensure_future(gate.wait(1))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not gate._waiting

    asyncio.run(scenario())
    # Nobody's loop runs any more: opening must not care.
    LayerGate().open(1)
