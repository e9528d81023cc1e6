"""Flow control: never more than the limit, nobody overtaken, nobody forgotten."""

from __future__ import annotations

import asyncio

from memserve.mempool.transfer.window import Window


def test_the_limit_holds_and_the_order_too() -> None:
    async def scenario() -> None:
        window, begun, most = Window(10), [], 0

        async def move(number: int, size: int) -> None:
            nonlocal most
            async with window.room(size):
                begun.append(number)
                most = max(most, window.used)
                await asyncio.sleep(0)

        await asyncio.gather(*(move(number, size) for number, size in enumerate([4, 4, 4, 1, 9, 2])))
        assert begun == [0, 1, 2, 3, 4, 5]
        assert most <= 10
        assert window.used == 0

    asyncio.run(scenario())


def test_something_larger_than_the_limit_goes_alone() -> None:
    async def scenario() -> None:
        window = Window(10)
        async with window.room(3):
            large = asyncio.ensure_future(hold(window, 25))
            await asyncio.sleep(0)
            assert window.used == 3
        assert await large == 25
        assert window.used == 0

    asyncio.run(scenario())


def test_the_cancelled_leave_no_room_taken_and_nobody_stuck() -> None:
    async def scenario() -> None:
        window = Window(10)
        async with window.room(8):
            waiting = [asyncio.ensure_future(hold(window, size)) for size in (9, 9, 2)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            waiting[1].cancel()
            # With the large ones gone the small one fits beside the first.
            assert await waiting[2] == 10
        admitted = asyncio.ensure_future(hold(window, 1))
        async with window.room(10):
            late = asyncio.ensure_future(hold(window, 1))
            await asyncio.sleep(0)
        late.cancel()
        await asyncio.gather(admitted, late, *waiting, return_exceptions=True)
        assert window.used == 0

    asyncio.run(scenario())


async def hold(window: Window, size: int) -> int:
    async with window.room(size):
        return window.used
