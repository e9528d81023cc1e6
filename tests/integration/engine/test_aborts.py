"""However and wherever a request ends, both pools get every block back, and what they keep is right."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from integration.engine.pair import SPACE, D, Node, Pair, pair, prompt, run
from memserve.core.types import FinishReason, Tokens
from memserve.engine.overlap import Overlap
from memserve.engine.phases import PHASES
from memserve.mempool.stats import AbortCause

ALL = tuple(PHASES)
REUSING = ("pd-caching-1", "pd-caching-2", "pd-caching-3", "colocated")
HANDING_OVER = ("pd-basic", "pd-caching-1", "pd-caching-2", "pd-caching-3")
OVERLAPPING = ("pd-basic", "pd-caching-3")
FLOWING_BACK = ("pd-caching-3",)
PROMPT = prompt(40)
ANSWER = 30
NAMES = ("r", "other")
ENDS = (FinishReason.CANCELLED, FinishReason.STOP)

Cancel = Callable[[], None]
Situation = Callable[[Pair, Cancel], Awaitable[None]]


@dataclass(frozen=True)
class Case:
    """Brings request ``r`` somewhere, ends it there and lets everything go on."""

    name: str
    situation: Situation
    rows: tuple[str, ...] = ALL
    options: dict[str, Any] = field(default_factory=dict)


# --- on P ---------------------------------------------------------------------------------------------


async def queued(both: Pair, cancel: Cancel) -> None:
    both.p.runner.gate.close()
    both.ask("other", prompt(20, 9), 3)
    await both.spin(lambda: both.p.runner.gate.held == 1)
    both.ask("r", PROMPT, ANSWER)
    assert unplaced(both.p)
    cancel()
    both.p.runner.gate.open()


async def prefilling(both: Pair, cancel: Cancel) -> None:
    both.p.runner.gate.close()
    both.ask("r", PROMPT, ANSWER)
    await both.spin(lambda: both.p.runner.gate.held == 1)
    cancel()
    both.p.runner.gate.open()


async def prefilling_the_second_chunk(both: Pair, cancel: Cancel) -> None:
    both.p.runner.gate.close()
    both.ask("r", PROMPT, ANSWER)
    await both.spin(lambda: both.p.runner.gate.held == 1)
    both.p.runner.gate.let_one_pass()
    await both.spin(lambda: both.p.runner.gate.held == 2)
    found = both.p.find("r")
    assert found is not None
    assert 0 < found.computed < len(PROMPT)
    cancel()
    both.p.runner.gate.open()


async def waiting_for_blocks(both: Pair, cancel: Cancel) -> None:
    hog = both.p.pool.alloc_mem(both.p.pool.stats().free)
    both.ask("r", PROMPT, ANSWER)
    await both.spin(lambda: both.p.engine._starved)
    assert unplaced(both.p)
    cancel()
    both.p.pool.free_mem(hog)


async def waiting_for_kv_on_its_way(both: Pair, cancel: Cancel) -> None:
    both.p.pool.begin_incoming("t", D, SPACE, PROMPT[:32], 2, 30.0)
    both.ask("r", PROMPT, ANSWER)
    await both.spin(lambda: (found := both.p.find("r")) is not None and found.patience is not None)
    assert unplaced(both.p)
    cancel()
    both.p.pool.abort_incoming("t", AbortCause.SENDER_LOST, "it was never real")


async def waiting_for_another_prefill(both: Pair, cancel: Cancel) -> None:
    both.p.runner.gate.close()
    both.ask("other", np.concatenate([PROMPT, prompt(100, 7)]), 3)
    await both.spin(lambda: both.p.runner.gate.held == 1)
    both.ask("r", PROMPT, ANSWER)
    both.p.runner.gate.let_one_pass()
    await both.spin(lambda: both.p.runner.gate.held == 2)
    found = both.p.find("r")
    assert found is not None
    assert found.leader_patience is not None
    assert unplaced(both.p)
    cancel()
    both.p.runner.gate.open()


# --- between P and D ----------------------------------------------------------------------------------


async def waiting_for_room_on_d(both: Pair, cancel: Cancel) -> None:
    hog = both.d.pool.alloc_mem(both.d.pool.stats().free)
    both.ask("r", PROMPT, ANSWER)
    await both.until(lambda: bool(both.answer("r")))
    cancel()
    await both.closed("r")
    both.p.check_idle()
    both.d.pool.free_mem(hog)


async def handing_over(both: Pair, cancel: Cancel, step: str) -> None:
    at_step(both.p, step, cancel)
    both.ask("r", PROMPT, ANSWER)
    await both.closed("r")
    assert not both.p.on_step, "the step was never reached"


async def copying_to_d(both: Pair, cancel: Cancel) -> None:
    both.p.copying.close()
    both.ask("r", PROMPT, ANSWER)
    await both.spin(lambda: both.p.copying.held == 1)
    cancel()
    both.p.copying.open()


# --- on D ---------------------------------------------------------------------------------------------


async def queued_on_d(both: Pair, cancel: Cancel) -> None:
    both.d.runner.gate.close()
    both.ask("other", prompt(20, 9), 3)
    await both.spin(lambda: both.d.runner.gate.held == 1)
    both.ask("r", PROMPT, ANSWER)
    await both.spin(lambda: both.d.find("r") is not None)
    assert both.d.engine.batcher.waiting == 1
    cancel()
    both.d.runner.gate.open()


async def decoding(both: Pair, cancel: Cancel) -> None:
    await hold_decoding(both)
    cancel()
    both.decoder.runner.gate.open()


async def preempted(both: Pair, cancel: Cancel) -> None:
    await hold_decoding(both)
    stats = both.decoder.pool.stats()
    hog = both.decoder.pool.alloc_mem(stats.free + stats.historical)
    both.decoder.runner.gate.open()
    await both.spin(lambda: unplaced(both.decoder))
    counters = both.decoder.engine.counters()
    assert counters["preempted_swap"] + counters["preempted_recompute"] == 1
    cancel()
    both.decoder.pool.free_mem(hog)


# --- between D and P ----------------------------------------------------------------------------------


async def sending_back(both: Pair, cancel: Cancel, step: str) -> None:
    at_step(both.d, step, cancel)
    both.ask("r", PROMPT, ANSWER)
    await both.closed("r")
    assert not both.d.on_step, "the step was never reached"


async def copying_to_p(both: Pair, cancel: Cancel) -> None:
    both.d.copying.close()
    both.ask("r", PROMPT, ANSWER)
    await both.spin(lambda: both.d.copying.held == 1)
    cancel()
    both.d.copying.open()


async def sending_a_piece_back(both: Pair, cancel: Cancel, step: str) -> None:
    at_step(both.d, step, cancel)
    both.ask("r", PROMPT, 100)
    await both.closed("r")
    assert not both.d.on_step, "the step was never reached"
    assert len(both.answer("r")) < 100, "it had ended before"


STEPS = ("reserved", "copied", "published")
CASES = (
    Case("queued on P", queued),
    Case("prefilling", prefilling),
    Case("prefilling the second chunk", prefilling_the_second_chunk, ALL, {"step_tokens": 16}),
    Case("waiting for blocks", waiting_for_blocks),
    Case("waiting for KV on its way", waiting_for_kv_on_its_way, REUSING),
    Case("waiting for another prefill", waiting_for_another_prefill, REUSING, {"step_tokens": 16}),
    Case("waiting for room on D", waiting_for_room_on_d, HANDING_OVER, {"timeout": 1000.0}),
    *(
        Case(
            f"handing over with overlap {overlap}, {step}",
            functools.partial(handing_over, step=step),
            HANDING_OVER if overlap is Overlap.NONE else OVERLAPPING,
            {"overlap": overlap, "step_tokens": 16 if overlap is Overlap.CHUNKS else 64},
        )
        for overlap in (Overlap.NONE, Overlap.WHOLE, Overlap.LAYERS, Overlap.CHUNKS)
        for step in STEPS
    ),
    *(
        Case(
            f"copying to D with overlap {overlap}",
            copying_to_d,
            HANDING_OVER if overlap is Overlap.NONE else OVERLAPPING,
            {"overlap": overlap, "step_tokens": 16},
        )
        for overlap in (Overlap.NONE, Overlap.LAYERS, Overlap.CHUNKS)
    ),
    Case("queued on D", queued_on_d, HANDING_OVER, {"max_running": 1}),
    Case("decoding", decoding),
    Case("preempted", preempted),
    Case("preempted above a host tier", preempted, ALL, {"host_blocks": 64}),
    *(
        Case(f"sending back, {step}", functools.partial(sending_back, step=step), FLOWING_BACK)
        for step in STEPS
    ),
    *(
        Case(
            f"sending a piece back, {step}",
            functools.partial(sending_a_piece_back, step=step),
            FLOWING_BACK,
            {"backflow_tokens": 16},
        )
        for step in STEPS
    ),
    Case("copying to P", copying_to_p, FLOWING_BACK),
)


def endings() -> Iterator[Any]:
    """Every case in every row, stopped and cancelled; where both instances know of it, in either order."""
    for case in CASES:
        orders = [False, True] if set(case.rows) <= set(HANDING_OVER) else [False]
        for row, reason, d_first in itertools.product(case.rows, ENDS, orders):
            text = f"{case.name}-{row}-{reason}{'-d-first' * d_first}"
            yield pytest.param(case, row, reason, d_first, id=text)


@pytest.mark.parametrize(("case", "phases", "reason", "d_first"), list(endings()))
def test_an_end_from_outside_gives_all_blocks_back(
    case: Case, phases: str, reason: FinishReason, d_first: bool
) -> None:
    async def scenario() -> None:
        async with pair(phases, **case.options) as both:
            nodes = (both.d, both.p) if d_first else (both.p, both.d)
            await case.situation(both, lambda: both.cancel("r", reason, nodes))
            await both.closed("r")
            await settle(both)
            await check_what_is_kept(both)

    run(scenario())


@pytest.mark.parametrize("phases", ALL)
@pytest.mark.parametrize("end", ["max_tokens at once", "max_tokens", "stop token at once", "stop token"])
def test_an_end_by_itself_gives_all_blocks_back(phases: str, end: str) -> None:
    async def scenario() -> None:
        expected = await answer_alone(PROMPT)
        new = (at for at in range(5, ANSWER) if expected[at] not in expected[:at])
        at = 0 if end.endswith("at once") else next(new)
        async with pair(phases) as both:
            stop = (expected[at],) if end.startswith("stop") else ()
            both.ask("r", PROMPT, ANSWER if stop else at + 1, stop)
            await both.closed("r")
            assert both.answer("r") == expected[: at + 1]
            await settle(both)
            await check_what_is_kept(both)

    run(scenario())


def test_blocks_that_were_on_their_way_when_their_owner_was_preempted_are_not_published() -> None:
    long = prompt(150)

    async def scenario() -> None:
        async with pair(p_blocks=12, step_tokens=16, overlap=Overlap.CHUNKS) as both:
            # The first hand-over opens the link, so that the next ones begin at once.
            both.ask("warm", prompt(20, 8), 2)
            await both.closed("warm")
            # "other" decodes on P and needs its third block while "r" is being computed and sent ahead.
            both.decode_on = None
            both.ask("other", prompt(26, 9), 12)
            await both.until(lambda: bool(both.answer("other")))
            both.decode_on = D
            both.p.copying.close()
            both.ask("r", long, ANSWER)
            await both.spin(lambda: both.p.copying.held >= 1 and unplaced(both.p))
            overwrite_what_is_free(both.p)
            both.p.copying.open()
            await both.closed("r")
            assert both.answer("r") == await answer_alone(long)
            await settle(both)

    run(scenario())


def overwrite_what_is_free(node: Node) -> None:
    stats = node.pool.stats()
    taken = node.pool.alloc_mem(stats.free + stats.historical)
    for pointer in node.pool.pointers(taken).tolist():
        ctypes.memset(pointer, 0x3C, node.pool.layout.block_bytes)
    node.pool.free_mem(taken)


def unplaced(node: Node) -> bool:
    """Whether ``r`` is there, but has no blocks."""
    found = node.find("r")
    return found is not None and found.addrs is None


def at_step(node: Node, wanted: str, act: Callable[[], None]) -> None:
    """Act in the very moment in which the node's next transfer has come to a step."""

    def listen(step: str) -> None:
        if step == wanted:
            node.on_step.remove(listen)
            act()

    node.on_step.append(listen)


async def hold_decoding(both: Pair) -> None:
    both.ask("r", PROMPT, 150)
    await both.until(lambda: len(both.answer("r")) >= 3)
    both.decoder.runner.gate.close()
    await both.spin(lambda: both.decoder.runner.gate.held == 1)
    found = both.decoder.find("r")
    assert found is not None
    assert found.pending == 1
    assert found.sampled >= 3


async def settle(both: Pair) -> None:
    """Until everybody has heard of the end; then nobody may hold anything."""
    for name in NAMES:
        if any(getattr(message, "request", None) == name for message in both.said):
            await both.closed(name)
    await both.spin(lambda: both.p.held() + both.d.held() == 0)
    both.p.check_idle()
    both.d.check_idle()


async def check_what_is_kept(both: Pair) -> None:
    """What was kept of an ended request makes no other answer, of the same prompt or of its next turn."""
    expected = await answer_alone(PROMPT)
    follow_up = np.concatenate([PROMPT, np.array(expected[:25], np.int32), prompt(5, 3)])
    for name, tokens in (("again", PROMPT), ("next", follow_up)):
        both.ask(name, tokens, ANSWER)
        await both.closed(name)
        assert both.answer(name) == await answer_alone(tokens)
        assert both.ledger(name).prompt == len(tokens)
        await settle(both)


async def answer_alone(tokens: Tokens) -> list[int]:
    """The answer where nothing is ever kept or moved."""
    key = tokens.tobytes()
    if key not in _ANSWERS:
        async with pair("pd-basic") as both:
            both.decode_on = None
            both.ask("r", tokens, ANSWER)
            await both.closed("r")
            _ANSWERS[key] = both.answer("r")
    return _ANSWERS[key]


_ANSWERS: dict[bytes, list[int]] = {}
