"""Which units to move where, in steps. Pure: block numbers in, block numbers out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from memserve.mempool.address import Addresses, BlockNumbers, numbers_of
from memserve.mempool.modes import Cut
from memserve.mempool.segments import Parts

STEP_BYTES = 8 << 20
"""Bytes between two looks at whether to go on: about a millisecond of copying."""
LAST_STEP_BYTES = 768 << 10
"""Steps are verified while the next one is copied; nothing hides the last one's verification."""


@dataclass(frozen=True, slots=True)
class Step:
    """Move units: parts ``parts`` of the sender's blocks ``src`` to those of the receiver's ``dst``.

    int64[n] each, in this order. ``layers``: how many layers of these blocks must have been computed before.
    """

    src: BlockNumbers
    dst: BlockNumbers
    parts: Parts
    layers: int


def plan_steps(
    src: Addresses, dst: Addresses, cut: Cut, *, layerwise: bool = False, step_bytes: int = STEP_BYTES
) -> list[Step]:
    """Split the transfer of ``src`` to ``dst`` (as many) into steps of at most ``step_bytes`` or one unit.

    If there are several, the last one has at most ``LAST_STEP_BYTES`` or one unit. With ``layerwise`` no step
    has units of two layers. How units lie, and which of them touch, is for ``SegmentMap`` to say.
    """
    assert len(src) == len(dst), f"{len(src)} blocks cannot be moved to {len(dst)}"
    source, parts = spread_units(numbers_of(src.packed), cut)
    target, _ = spread_units(numbers_of(dst.packed), cut)
    most, last = max(1, step_bytes // cut.unit_bytes), max(1, LAST_STEP_BYTES // cut.unit_bytes)
    stages = cut.layers if layerwise and cut.parts > 1 else 1
    steps = []
    for stage in range(stages):
        begin, end = stage * len(source) // stages, (stage + 1) * len(source) // stages
        layers = (stage + 1) * cut.layers // stages
        steps += [
            Step(source[a:b], target[a:b], parts[a:b], layers) for a, b in _split(begin, end, most, last)
        ]
    return steps


def spread_units(blocks: BlockNumbers, cut: Cut) -> tuple[BlockNumbers, Parts]:
    """The units of ``blocks`` in the order in which they travel: block number and part of each, int64[n]."""
    if cut.parts == 1:
        return blocks, np.zeros(len(blocks), np.int64)
    return np.tile(blocks, cut.parts), np.repeat(np.arange(cut.parts, dtype=np.int64), len(blocks))


def _split(begin: int, end: int, most: int, last: int) -> Iterator[tuple[int, int]]:
    starts = list(range(begin, end, most))
    if end - begin > most > last and end - starts[-1] > last:
        starts.append(end - last)
    return itertools.pairwise([*starts, end])
