"""The table says what the paper says."""

from __future__ import annotations

from memserve.core.config import PHASES as NAMES
from memserve.engine.phases import PHASES, Handoff


def test_every_configurable_name_has_a_row() -> None:
    assert tuple(PHASES) == NAMES
    assert all(name == row.name for name, row in PHASES.items())


def test_each_milestone_adds_one_flow() -> None:
    basic, one, two, three = (PHASES[name] for name in NAMES[:4])
    assert not basic.reuses
    assert one.insert_after_prefill
    assert one.handoff is Handoff.TRANSFER
    assert two.handoff is Handoff.TRANSFER_WITH_INSERT
    assert two.insert_after_decode
    assert not two.backflow
    assert three.backflow
    assert PHASES["colocated"].handoff is Handoff.NONE
