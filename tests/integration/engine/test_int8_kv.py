"""KV in int8: the same tokens colocated, in chunks, from the cache and handed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from integration.engine.pair import (
    CONTEXT,
    WEIGHTS,
    GatedNative,
    GatedReference,
    GatedRunner,
    Pair,
    pair,
    prompt,
    run,
)
from memserve.core.types import Ledger


def native_int8() -> GatedRunner:
    return GatedNative(WEIGHTS, threads=1, context=CONTEXT, kv_dtype="int8")


def reference_int8() -> GatedRunner:
    return GatedReference(WEIGHTS, layout_dtype="int8")


@pytest.mark.parametrize("make_runner", [native_int8, reference_int8])
def test_int8_kv_gives_the_same_tokens_everywhere(
    make_runner: Callable[[], GatedRunner],
) -> None:
    """Two turns: each on an instance of its own; in chunks beside others, from the cache; P to D and back."""

    async def scenario() -> None:
        expected = []
        history = prompt(70)
        for _ in range(2):
            async with pair("colocated", step_tokens=4096, make_runner=make_runner) as fresh:
                fresh.ask("only", history, 30)
                await fresh.closed("only")
                expected.append(fresh.answer("only"))
                history = np.concatenate([history, np.array(expected[-1], np.int32), prompt(10, seed=5)])
        async with pair("colocated", step_tokens=16, make_runner=make_runner) as chunked:
            answers, ledgers = await two_turns(chunked, (33, 17))
            assert (answers, ledgers[1].local) == (expected, 96)
        async with pair(make_runner=make_runner) as both:
            answers, ledgers = await two_turns(both, ())
            assert (answers, ledgers[1].backflow) == (expected, 32)
            assert both.d.pool.stats().received > 0

    run(scenario())


async def two_turns(there: Pair, beside: Sequence[int]) -> tuple[list[list[int]], list[Ledger]]:
    """Answers and ledgers of two turns of a chat, each with other prompts ``beside`` it."""
    history, answers, ledgers = prompt(70), [], []
    for turn in ("one", "two"):
        for mate in beside:
            there.ask(f"{turn} beside {mate}", prompt(mate, seed=mate), 20)
        there.ask(turn, history, 30)
        for name in (turn, *(f"{turn} beside {mate}" for mate in beside)):
            await there.closed(name)
        answers.append(there.answer(turn))
        ledgers.append(there.ledger(turn))
        history = np.concatenate([history, np.array(answers[-1], np.int32), prompt(10, seed=5)])
    return answers, ledgers
