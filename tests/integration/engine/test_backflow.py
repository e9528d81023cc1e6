"""KV of an answer goes back to P while it is decoded; however that ends, P has what it should and no more."""

from __future__ import annotations

import numpy as np
import pytest

from integration.engine.pair import BLOCK_BYTES, Pair, pair, prompt, run
from memserve.core.messages import RequestClosed
from memserve.core.types import FinishReason, Ledger

PROMPT = prompt(40)
ANSWER = 100


def pieces(both: Pair) -> int:
    return int(both.d.engine.counters()["backflow_pieces"])


async def answered(both: Pair, name: str) -> RequestClosed:
    await both.closed(name)
    await both.spin(lambda: both.p.held() + both.d.held() == 0)
    both.p.check_idle()
    both.d.check_idle()
    return next(m for m in both.said if isinstance(m, RequestClosed) and m.request == name)


def test_pieces_go_early_and_nothing_goes_twice() -> None:
    async def scenario() -> None:
        async with pair(backflow_tokens=32) as both:
            both.ask("r", PROMPT, ANSWER)
            closed = await answered(both, "r")
            counters = both.d.engine.counters()
            # 40 + 99 tokens make 8 blocks, of which P has computed 2.
            assert closed.backflow_bytes == 6 * BLOCK_BYTES == both.d.pool.stats().sent_bytes
            assert 2 <= counters["backflow_pieces"] <= 3
            assert counters["backflow_early_bytes"] + counters["backflow_late_bytes"] == 6 * BLOCK_BYTES
            assert counters["backflow_late_bytes"] <= 3 * BLOCK_BYTES
            turn = np.concatenate([PROMPT, np.array(both.answer("r"), np.int32)])
            both.ask("next", turn, 3)
            await answered(both, "next")
            assert both.ledger("next") == Ledger(computed=140 - 128, local=32, backflow=96)

    run(scenario())


@pytest.mark.parametrize(("phases", "tokens"), [("pd-caching-3", 0), ("pd-caching-2", 32)])
def test_nothing_goes_early_where_that_is_not_wanted(phases: str, tokens: int) -> None:
    async def scenario() -> None:
        async with pair(phases, backflow_tokens=tokens) as both:
            both.ask("r", PROMPT, ANSWER)
            await answered(both, "r")
            assert pieces(both) == 0

    run(scenario())


def test_one_piece_at_a_time() -> None:
    async def scenario() -> None:
        async with pair(backflow_tokens=16) as both:
            await hold_a_piece(both, "a")
            both.ask("b", prompt(40, 1), ANSWER)
            await both.until(lambda: len(both.answer("b")) >= 60)
            assert both.d.copying.held == 1, "the piece of one answer is under way, and no other"
            both.d.copying.open()
            await answered(both, "a")
            await answered(both, "b")
            assert pieces(both) > 1

    run(scenario())


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.STOP])
def test_an_end_while_a_piece_is_under_way(reason: FinishReason) -> None:
    async def scenario() -> None:
        async with pair(backflow_tokens=32) as both:
            await hold_a_piece(both, "r")
            both.cancel("r", reason, (both.p, both.d))
            both.cancel("r", FinishReason.CANCELLED, (both.p, both.d))
            both.d.copying.open()
            await answered(both, "r")
            both.ask("again", PROMPT, ANSWER)
            await answered(both, "again")
            assert both.answer("again")[: len(both.answer("r"))] == both.answer("r")

    run(scenario())


def test_an_answer_that_ends_waits_for_its_piece_and_sends_the_rest() -> None:
    async def scenario() -> None:
        async with pair(backflow_tokens=32) as both:
            await hold_a_piece(both, "r", ANSWER)
            await both.until(lambda: len(both.answer("r")) == ANSWER)
            assert not any(isinstance(message, RequestClosed) for message in both.said)
            both.d.copying.open()
            closed = await answered(both, "r")
            assert closed.backflow_bytes == 6 * BLOCK_BYTES == both.d.pool.stats().sent_bytes

    run(scenario())


def test_preempted_while_a_piece_is_under_way() -> None:
    """The piece holds on to its blocks, and what is computed anew later is the same."""

    async def scenario() -> None:
        async with pair(backflow_tokens=32) as both:
            await hold_a_piece(both, "r", ANSWER)
            stats = both.d.pool.stats()
            hog = both.d.pool.alloc_mem(stats.free + stats.historical)
            await both.spin(lambda: (found := both.d.find("r")) is not None and found.addrs is None)
            both.d.copying.open()
            await both.spin(lambda: pieces(both) == 1)
            both.d.pool.free_mem(hog)
            await answered(both, "r")
            turn = np.concatenate([PROMPT, np.array(both.answer("r"), np.int32)])
            both.ask("next", turn, 20)
            await answered(both, "next")
            assert both.ledger("next").backflow == 96
            found = both.answer("r"), both.answer("next")
        async with pair("pd-basic") as plain:
            plain.ask("r", PROMPT, ANSWER)
            await answered(plain, "r")
            plain.ask("next", turn, 20)
            await answered(plain, "next")
            assert found == (plain.answer("r"), plain.answer("next"))

    run(scenario())


def test_a_p_that_is_gone_is_asked_once_early_and_once_in_the_end() -> None:
    async def scenario() -> None:
        async with pair(backflow_tokens=16) as both:
            both.ask("r", PROMPT, ANSWER)
            await both.until(lambda: both.d.find("r") is not None)
            both.d.carrier.set_members((both.d.member,))
            await answered(both, "r")
            assert len(both.answer("r")) == ANSWER
            assert pieces(both) == 0

    run(scenario())


async def hold_a_piece(both: Pair, name: str, tokens: int = 150) -> None:
    """Ask, and hold the first piece of the answer on its way."""
    both.d.copying.close()
    both.ask(name, PROMPT, tokens)
    await both.spin(lambda: both.d.copying.held == 1)
    assert both.d.find(name) is not None, "it has ended already"
