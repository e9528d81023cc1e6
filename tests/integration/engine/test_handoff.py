"""Two engines, two pools, real transfers: P to D and back in every phase, and when that cannot be done."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from integration.engine.pair import BLOCK_BYTES, pair, prompt, run
from memserve.core.types import FinishReason, Ledger, RequestId


def turns(phases: str) -> tuple[list[list[int]], list[Ledger], tuple[int, int], int]:
    """Two turns of a chat: answers, ledgers, historical blocks on P and D, bytes that went P to D."""
    result: list[tuple[list[list[int]], list[Ledger], tuple[int, int], int]] = []

    async def scenario() -> None:
        async with pair(phases) as both:
            history = prompt(40)
            answers, ledgers = [], []
            for turn in ("one", "two"):
                both.ask(turn, history, 30)
                await both.closed(turn)
                answers.append(both.answer(turn))
                ledgers.append(both.ledger(turn))
                history = np.concatenate([history, np.array(answers[-1], np.int32), prompt(10, seed=5)])
            kept = (both.p.pool.stats().historical, both.d.pool.stats().historical)
            result.append((answers, ledgers, kept, both.p.pool.stats().sent_bytes))

    run(scenario())
    return result[0]


@pytest.mark.parametrize(
    ("phases", "second", "kept", "sent_blocks"),
    [
        # Turn one: 40 tokens in 3 blocks, 30 sampled, KV of 69. Turn two: 80 in 5 blocks, KV of 109.
        ("pd-basic", Ledger(computed=80), (0, 0), 3 + 5),
        ("pd-caching-1", Ledger(computed=48, local=32), (5, 0), 3 + 5),
        ("pd-caching-2", Ledger(computed=48, local=32), (5, 6), 3 + 1),
        ("pd-caching-3", Ledger(computed=16, local=32, backflow=32), (6, 6), 3 + 1),
    ],
)
def test_each_phase_moves_and_keeps_what_the_table_says(
    phases: str, second: Ledger, kept: tuple[int, int], sent_blocks: int
) -> None:
    answers, ledgers, found, sent = turns(phases)
    assert answers == turns("pd-basic")[0], "the answer does not depend on the phases"
    assert ledgers == [Ledger(computed=40), second]
    assert found == kept
    assert sent == sent_blocks * BLOCK_BYTES


def test_a_request_that_ends_with_its_first_token_is_not_handed_over() -> None:
    async def scenario() -> None:
        async with pair() as both:
            both.ask("short", prompt(20), 1)
            await both.closed("short")
            assert len(both.answer("short")) == 1
            assert both.d.pool.stats().received == 0

    run(scenario())


def test_p_waits_for_room_on_d() -> None:
    async def scenario() -> None:
        async with pair(d_blocks=4) as both:
            hog = both.d.pool.alloc_mem(4)
            both.ask("patient", prompt(40))
            await both.until(lambda: bool(both.answer("patient")))
            await asyncio.sleep(0.1)
            assert len(both.answer("patient")) == 1
            both.d.pool.free_mem(hog)
            await both.closed("patient")
            assert len(both.answer("patient")) == 8

    run(scenario())


def test_p_gives_up_when_d_stays_full_and_keeps_the_prompt() -> None:
    async def scenario() -> None:
        async with pair(d_blocks=4, timeout=0.1) as both:
            hog = both.d.pool.alloc_mem(4)
            both.ask("unlucky", prompt(40))
            await both.closed("unlucky")
            assert both.error("unlucky").kind == "Overloaded"
            assert "decode-0 had no room" in both.error("unlucky").message
            assert both.p.pool.stats().historical == 2
            both.d.pool.free_mem(hog)

    run(scenario())


def test_a_cancel_that_overtakes_the_handover_stops_it_on_d() -> None:
    async def scenario() -> None:
        async with pair() as both:
            both.d.engine.cancel(RequestId("gone"), FinishReason.CANCELLED)
            both.ask("gone", prompt(40))
            await both.closed("gone")
            assert "cancelled before" in both.error("gone").message
            assert both.d.pool.stats().active == 0

    run(scenario())


def test_a_cancel_during_the_handover_frees_both_sides() -> None:
    async def scenario() -> None:
        async with pair(d_blocks=4) as both:
            hog = both.d.pool.alloc_mem(4)
            both.ask("left", prompt(40))
            await both.until(lambda: bool(both.answer("left")))
            both.p.engine.cancel(RequestId("left"), FinishReason.CANCELLED)
            await both.closed("left")
            assert both.p.pool.stats().active == 0
            both.d.pool.free_mem(hog)

    run(scenario())


def test_a_lost_d_fails_the_request_and_a_lost_p_only_the_backflow() -> None:
    async def scenario() -> None:
        async with pair() as both:
            both.p.carrier.set_members((both.p.member,))
            both.ask("no d", prompt(40))
            await both.closed("no d")
            assert both.error("no d").kind == "PeerLost"
            both.p.carrier.set_members((both.p.member, both.d.member))
            both.d.carrier.set_members((both.d.member,))
            both.ask("no p", prompt(40), 30)
            await both.closed("no p")
            assert len(both.answer("no p")) == 30
            assert both.p.pool.stats().received == 0

    run(scenario())


def test_decode_preempts_and_recovers_when_its_pool_is_small() -> None:
    async def scenario() -> None:
        async with pair(d_blocks=12) as both:
            for at in range(4):
                both.ask(f"r{at}", prompt(40, seed=at), 100)
            for at in range(4):
                await both.closed(f"r{at}")
            found = [both.answer(f"r{at}") for at in range(4)]
        async with pair() as roomy:
            for at in range(4):
                roomy.ask(f"r{at}", prompt(40, seed=at), 100)
                await roomy.closed(f"r{at}")
            assert found == [roomy.answer(f"r{at}") for at in range(4)]

    run(scenario())
