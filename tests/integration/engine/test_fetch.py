"""A peer sends what it holds of a prompt before that is computed; however that ends, the request goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from integration.engine.pair import SPACE, D, Node, P, Pair, pair, prompt, run
from memserve.core.messages import Fetch, Message, PrefixSent, SendPrefix, Submit
from memserve.core.types import FinishReason, InstanceId, Ledger, RequestId, SamplingParams, pack_tokens
from memserve.engine.prefix_sender import PrefixSender

PROMPT = prompt(100)
PATIENCE = 20.0


@asynccontextmanager
async def lending(**options: object) -> AsyncIterator[tuple[Pair, PrefixSender]]:
    """Two colocated instances of which the first has computed ``PROMPT``, and what sends from it."""
    async with pair("colocated", **options) as both:  # type: ignore[arg-type]
        both.ask("first", PROMPT, 4)
        await both.closed("first")

        def emit(message: Message) -> None:
            both.said.append(message)
            both.heard.set()

        sender = PrefixSender(P, both.p.pool, emit)
        try:
            yield both, sender
        finally:
            await sender.close()


def send(sender: PrefixSender, tokens: int = 100, to: InstanceId = D) -> None:
    sender.send(SendPrefix(RequestId("r"), SPACE, pack_tokens(PROMPT[:tokens]), to))


def ask(node: Node, fetch: Fetch | None) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    node.engine.submit(Submit(RequestId("r"), SPACE, pack_tokens(PROMPT), sampling, None, False, fetch))


async def sent(both: Pair) -> PrefixSent:
    def heard() -> list[PrefixSent]:
        return [message for message in both.said if isinstance(message, PrefixSent)]

    await both.until(lambda: bool(heard()))
    return heard()[0]


async def idle(both: Pair) -> None:
    await both.spin(lambda: both.p.held() + both.d.held() == 0)
    both.p.check_idle()
    both.d.check_idle()


@pytest.mark.parametrize("first", ["prefix", "request"])
def test_what_a_peer_sends_is_not_computed(first: str) -> None:
    async def scenario() -> None:
        async with lending() as (both, sender):
            steps: list[Callable[[], None]] = [
                lambda: send(sender),
                lambda: ask(both.d, Fetch(100, PATIENCE)),
            ]
            for step in steps if first == "prefix" else reversed(steps):
                step()
                await asyncio.sleep(0)
            await both.closed("r")
            assert both.ledger("r") == Ledger(computed=100 - 96, peer=96)
            assert both.answer("r") == both.answer("first")
            done = await sent(both)
            assert (done.tokens, done.error) == (96, "")
            assert done.bytes == 6 * both.p.pool.layout.block_bytes
            await idle(both)

    run(scenario())


def test_what_the_peer_has_already_is_not_sent_again() -> None:
    async def scenario() -> None:
        async with lending() as (both, sender):
            send(sender, 64)
            assert (await sent(both)).bytes == 4 * both.p.pool.layout.block_bytes
            both.said.clear()
            send(sender)
            assert (await sent(both)).bytes == 2 * both.p.pool.layout.block_bytes
            await idle(both)

    run(scenario())


def test_a_prefix_that_never_comes_is_computed() -> None:
    async def scenario() -> None:
        async with lending() as (both, _):
            ask(both.d, Fetch(100, 0.05))
            await both.closed("r")
            assert both.ledger("r") == Ledger(computed=100)
            assert both.answer("r") == both.answer("first")
            await idle(both)

    run(scenario())


def test_others_go_ahead_of_one_that_waits() -> None:
    async def scenario() -> None:
        async with lending() as (both, sender):
            ask(both.d, Fetch(100, PATIENCE))
            other = Submit(
                RequestId("other"), SPACE, pack_tokens(prompt(40, 7)), SamplingParams(max_tokens=4)
            )
            both.d.engine.submit(other)
            await both.closed("other")
            assert both.answer("r") == []
            send(sender)
            await both.closed("r")
            await idle(both)

    run(scenario())


@pytest.mark.parametrize("why", ["nothing cached", "unknown peer", "peer is full"])
def test_a_prefix_that_cannot_be_sent_is_told(why: str) -> None:
    async def scenario() -> None:
        async with lending() as (both, sender):
            taken = None
            if why == "nothing cached":
                both.p.pool.delete(PROMPT[:16], SPACE)
            elif why == "peer is full":
                taken = both.d.pool.alloc_mem(both.d.pool.blocks)
            send(sender, to=InstanceId("nobody") if why == "unknown peer" else D)
            done = await sent(both)
            assert (done.tokens, done.bytes) == (0, 0)
            assert done.error
            if taken is not None:
                both.d.pool.free_mem(taken)
            await idle(both)

    run(scenario())


def test_only_what_lies_on_the_device_is_sent() -> None:
    async def scenario() -> None:
        async with lending(host_blocks=16) as (both, sender):
            assert both.p.pool.swap_out(4) == 4
            send(sender)
            assert (await sent(both)).tokens == 32
            await idle(both)

    run(scenario())


def test_a_cancelled_request_leaves_while_it_waits() -> None:
    async def scenario() -> None:
        async with lending() as (both, _):
            ask(both.d, Fetch(100, PATIENCE))
            await both.spin(lambda: (found := both.d.find("r")) is not None and found.fetch is not None)
            both.d.engine.cancel(RequestId("r"), FinishReason.CANCELLED)
            await both.closed("r")
            await idle(both)

    run(scenario())


def test_closing_ends_what_is_under_way() -> None:
    async def scenario() -> None:
        async with lending() as (both, sender):
            both.p.copying.close()
            send(sender)
            await both.spin(lambda: both.d.held() > 0)
            closing = asyncio.create_task(sender.close())
            await asyncio.sleep(0)
            both.p.copying.open()
            await closing
            await idle(both)

    run(scenario())
