"""A prompt handed over while it is computed: the same answers, and nothing lost, whatever happens then."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from integration.engine.pair import P, Pair, pair, prompt, run
from integration.mempool.message_proxy import line_to
from memserve.core.messages import RequestError, Trace
from memserve.engine.overlap import Overlap
from memserve.mempool import TransferMode

WAYS = tuple(Overlap)
EARLY = tuple(way for way in Overlap if way is not Overlap.NONE)
FORCED = (Overlap.WHOLE, Overlap.LAYERS, Overlap.CHUNKS)
each_way = pytest.mark.parametrize("way", WAYS)
each_early_way = pytest.mark.parametrize("way", EARLY)
LONG = prompt(200)
BLOCKS = 13
"""Of ``LONG``; it takes four steps."""
PATIENCE = 0.3


async def settle(both: Pair) -> None:
    await both.spin(lambda: both.p.held() + both.d.held() == 0)
    both.p.check_idle()
    both.d.check_idle()


async def hold_last_chunk(both: Pair, name: str, *, chunks: int = 4) -> None:
    """Until the pass over the last chunk of ``LONG`` is about to begin, and D has reserved what it lacks."""
    gate = both.p.runner.gate
    gate.close()
    both.ask(name, LONG)
    for chunk in range(1, chunks + 1):
        await both.spin(lambda chunk=chunk: gate.held == chunk)  # type: ignore[misc]
        if chunk < chunks:
            gate.let_one_pass()
    await both.spin(lambda: both.d.pool.stats().free == 64 - BLOCKS)


def blocks_sent(both: Pair) -> int:
    return both.p.pool.stats().sent_bytes // both.p.pool.layout.block_bytes


_ANSWERS: dict[bytes, list[int]] = {}


async def answer_alone(tokens: NDArray[np.int32], count: int = 8) -> list[int]:
    """What one instance says that computes everything itself."""
    key = tokens.tobytes()
    if key not in _ANSWERS:
        async with pair("pd-basic") as both:
            both.decode_on = None
            both.ask("alone", tokens, 30)
            await both.closed("alone")
            _ANSWERS[key] = both.answer("alone")
    return _ANSWERS[key][:count]


# --- what it is for -----------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("phases", ["pd-basic", "pd-caching-1", "pd-caching-3"])
def test_the_answer_is_that_of_one_instance_alone(way: Overlap, phases: str) -> None:
    """Two turns of a chat, the first of four chunks; each block goes once where D keeps blocks."""

    async def scenario() -> None:
        async with pair(phases, overlap=way) as both:
            both.ask("one", LONG, 30)
            await both.closed("one")
            assert both.answer("one") == await answer_alone(LONG, 30)
            assert blocks_sent(both) == BLOCKS
            follow_up = np.concatenate([LONG, np.array(both.answer("one")[:10], np.int32)])
            both.ask("two", follow_up, 8)
            await both.closed("two")
            assert both.answer("two") == await answer_alone(follow_up)
            await settle(both)

    run(scenario())


@pytest.mark.parametrize(
    ("way", "mode"),
    [
        (Overlap.NONE, TransferMode.BY_REQUEST_AGGREGATED),
        (Overlap.WHOLE, TransferMode.BY_REQUEST_AGGREGATED),
        (Overlap.LAYERS, TransferMode.BY_LAYER),
    ],
)
def test_the_way_is_recorded(way: Overlap, mode: TransferMode) -> None:
    async def scenario() -> None:
        async with pair(overlap=way) as both:
            both.ask("r", LONG, 8, trace=True)
            await both.closed("r")
            (told,) = (m.event for m in both.said if isinstance(m, Trace) and m.room == "mempool.transfer")
            assert f"overlap {way.value}, 0 blocks ahead, then 13 of 13 blocks {mode.value} over shm" in told
            assert both.p.engine.counters()[f"handoffs_{way.value}"] == 1
            (traffic,) = both.p.pool.stats().traffic
            assert (traffic.mode, traffic.transfers) == (mode, 1)

    run(scenario())


@each_early_way
def test_d_has_reserved_before_the_last_chunk_is_computed(way: Overlap) -> None:
    async def scenario() -> None:
        async with pair(overlap=way) as both:
            await hold_last_chunk(both, "r")
            assert both.answer("r") == []
            assert both.d.pool.stats().incoming > 0
            both.p.runner.gate.open()
            await both.closed("r")
            assert both.answer("r") == await answer_alone(LONG)
            await settle(both)

    run(scenario())


def test_finished_chunks_are_published_while_the_next_is_computed() -> None:
    async def scenario() -> None:
        async with pair(overlap=Overlap.CHUNKS) as both:
            gate = both.p.runner.gate
            gate.close()
            both.ask("r", LONG)
            await both.spin(lambda: gate.held == 1)
            assert both.d.pool.stats().historical == 0
            gate.let_one_pass()
            await both.spin(lambda: both.d.pool.stats().historical == 4)
            assert gate.held == 2
            gate.open()
            await both.closed("r")
            assert both.answer("r") == await answer_alone(LONG)
            assert both.p.engine.counters()["handoff_blocks_ahead"] >= 4
            assert blocks_sent(both) == BLOCKS

    run(scenario())


# --- room on D ----------------------------------------------------------------------------------------


@each_way
def test_a_full_d_gets_the_prompt_once_it_has_room(way: Overlap) -> None:
    async def scenario() -> None:
        async with pair(overlap=way) as both:
            hog = both.d.pool.alloc_mem(64)
            both.ask("r", LONG)
            await both.until(lambda: bool(both.answer("r")))
            both.d.pool.free_mem(hog)
            await both.closed("r")
            assert both.answer("r") == await answer_alone(LONG)
            assert blocks_sent(both) == BLOCKS
            await settle(both)

    run(scenario())


@pytest.mark.parametrize("held", [True, False], ids=["kept", "evicted"])
def test_a_d_that_fills_up_in_the_middle_gets_the_rest_later(held: bool) -> None:
    """What had gone ahead is used if it is still there, and sent again if it is not."""

    async def scenario() -> None:
        async with pair(overlap=Overlap.CHUNKS) as both:
            gate, pool = both.p.runner.gate, both.d.pool
            gate.close()
            both.ask("r", LONG)
            await both.spin(lambda: gate.held == 1)
            gate.let_one_pass()
            await both.spin(lambda: pool.stats().historical == 4)
            hog = pool.alloc_mem(60 if held else 64)
            assert pool.stats().historical == (4 if held else 0)
            gate.open()
            await both.until(lambda: bool(both.answer("r")))
            pool.free_mem(hog)
            await both.closed("r")
            assert both.answer("r") == await answer_alone(LONG)
            assert both.p.engine.counters()["handoffs_none"] == 1
            assert blocks_sent(both) == (BLOCKS if held else BLOCKS + 4)
            await settle(both)

    run(scenario())


# --- the end of somebody ------------------------------------------------------------------------------


@each_early_way
def test_a_d_that_dies_in_the_middle_fails_the_request_when_it_is_computed(way: Overlap) -> None:
    async def scenario() -> None:
        async with pair(overlap=way) as both:
            await hold_last_chunk(both, "r")
            both.p.carrier.set_members((both.p.member,))
            await both.spin(lambda: both.d.pool.stats().incoming == 0)
            both.p.runner.gate.open()
            await both.closed("r")
            assert both.error("r").kind == "PeerLost"
            assert len(both.answer("r")) == 1
            await settle(both)
            both.p.carrier.set_members((both.p.member, both.d.member))
            both.ask("again", LONG)
            await both.closed("again")
            assert both.answer("again") == await answer_alone(LONG)
            await settle(both)

    run(scenario())


@each_early_way
def test_a_lost_connection_in_the_middle_costs_the_head_start_only(way: Overlap) -> None:
    async def scenario() -> None:
        async with pair(overlap=way) as both:
            await hold_last_chunk(both, "r")
            both.d.endpoint.drop_peer(P, "it is said to be dead")
            assert both.d.pool.stats().incoming == 0
            await both.spin(lambda: not both.p.endpoint.links())
            both.p.runner.gate.open()
            await both.closed("r")
            assert both.answer("r") == await answer_alone(LONG)
            assert both.p.engine.counters()["handoffs_none"] == 1
            await settle(both)

    run(scenario())


@each_early_way
def test_a_step_that_takes_longer_than_d_waits_costs_the_head_start_only(way: Overlap) -> None:
    async def scenario() -> None:
        async with pair(overlap=way, limits={"reserve_seconds": PATIENCE}) as both:
            await hold_last_chunk(both, "r")
            await both.spin(lambda: both.d.pool.stats().incoming == 0)
            both.p.runner.gate.open()
            await both.closed("r")
            assert both.answer("r") == await answer_alone(LONG)
            await settle(both)

    run(scenario())


@each_early_way
def test_a_failing_step_takes_its_hand_over_with_it(way: Overlap) -> None:
    async def scenario() -> None:
        async with pair(overlap=way) as both:
            await hold_last_chunk(both, "r")
            both.p.runner.fails = True
            both.p.runner.gate.open()
            await both.closed("r")
            assert both.error("r").kind == "RequestFailed"
            await settle(both)

    run(scenario())


@each_early_way
def test_a_prompt_whose_first_token_ends_it_is_not_adopted(way: Overlap) -> None:
    async def scenario() -> None:
        first = (await answer_alone(LONG))[0]
        async with pair(overlap=way) as both:
            both.ask("r", LONG, 8, stop=(first,))
            await both.closed("r")
            assert both.answer("r") == [first]
            await settle(both)
            assert both.d.engine.counters()["steps"] == 0

    run(scenario())


# --- messages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", FORCED)
@pytest.mark.parametrize("message", ["Reserve", "Reserved", "Copied", "Publish", "Published"])
@pytest.mark.parametrize("fault", ["lose", "late", "double", "overtaken"])
def test_a_lost_late_doubled_or_overtaken_message_leaks_nothing(
    way: Overlap, message: str, fault: str
) -> None:
    """The answer is right or the request has failed; it is adopted at most once."""

    async def scenario() -> None:
        limits = {"call_seconds": PATIENCE} if fault != "double" else {}
        async with pair(overlap=way, limits=limits) as both, line_to(both.d.member.peer_address) as line:
            there = msgspec.structs.replace(both.d.member, peer_address=line.address)
            both.p.carrier.set_members((both.p.member, there))
            line.fault, line.strikes = fault, message
            both.ask("r", LONG)
            await both.closed("r")
            assert line.struck.is_set()
            line.release.set()
            await settle(both)
            failed = [m for m in both.said if isinstance(m, RequestError)]
            assert [error.kind for error in failed] in ([], ["PeerLost"])
            expected = await answer_alone(LONG)
            if not failed:
                assert both.answer("r") == expected
            assert both.answer("r") == expected[: len(both.answer("r"))]
            both.ask("next", LONG)
            await both.closed("next")
            assert both.answer("next") == expected
            await settle(both)

    run(scenario())
