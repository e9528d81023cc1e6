"""The cheaper way of handing over is taken once it has been measured, and the other is tried again."""

from __future__ import annotations

import pytest

from memserve.core.config import OVERLAPS
from memserve.engine.overlap import SHORT_SECONDS, HandoffCosts, Overlap

MIB = 1 << 20
STEP = 0.3


def hand_over(costs: HandoffCosts, tails: dict[Overlap, float], turns: int, size: int) -> list[Overlap]:
    """What was chosen, turn by turn, where each way's tail is what ``tails`` says (seconds)."""
    chosen = []
    for _ in range(turns):
        chosen.append(costs.choose(size, STEP))
        costs.learn(chosen[-1], size, tail=tails[chosen[-1]], work=0.01)
    return chosen


def test_the_configuration_has_a_name_for_each_way() -> None:
    assert set(OVERLAPS) == {way.value for way in Overlap}


@pytest.mark.parametrize("best", [Overlap.WHOLE, Overlap.LAYERS])
def test_what_has_been_cheaper_is_taken(best: Overlap) -> None:
    tails = {way: 0.001 if way is best else 0.008 for way in (Overlap.WHOLE, Overlap.LAYERS)}
    chosen = hand_over(HandoffCosts(), tails, 200, 32 * MIB)
    assert chosen[100:].count(best) >= 95


def test_what_was_slow_once_is_tried_again_and_taken_when_it_has_become_quick() -> None:
    costs = HandoffCosts()
    hand_over(costs, {Overlap.WHOLE: 0.002, Overlap.LAYERS: 0.006}, 50, 32 * MIB)
    chosen = hand_over(costs, {Overlap.WHOLE: 0.002, Overlap.LAYERS: 0.0005}, 400, 32 * MIB)
    assert chosen[0] is Overlap.WHOLE
    assert chosen[-50:].count(Overlap.LAYERS) >= 45


def test_a_short_transfer_goes_whole_whatever_the_tails() -> None:
    costs = HandoffCosts()
    for _ in range(20):
        costs.learn(Overlap.WHOLE, MIB, tail=0.05, work=SHORT_SECONDS / 2)
    assert costs.choose(MIB, STEP) is Overlap.WHOLE


def test_layers_that_a_short_step_cannot_hide_count_as_late() -> None:
    costs = HandoffCosts()
    for _ in range(20):
        costs.learn(Overlap.LAYERS, 32 * MIB, tail=0.001, work=0.1)
        costs.learn(Overlap.WHOLE, 32 * MIB, tail=0.05, work=0.05)
    assert costs.choose(32 * MIB, 0.3) is Overlap.LAYERS
    assert costs.choose(32 * MIB, 0.01) is Overlap.WHOLE


def test_blocks_go_ahead_when_what_is_left_could_not_hide_them() -> None:
    costs = HandoffCosts()
    for _ in range(50):
        costs.learn_ahead(100 * MIB, 0.02)
    assert costs.pays_ahead(100 * MIB, 0.0)
    assert costs.pays_ahead(100 * MIB, 0.02)
    assert not costs.pays_ahead(100 * MIB, 0.06)
    assert not costs.pays_ahead(MIB // 4, 0.0), "too little to be worth messages of its own"
