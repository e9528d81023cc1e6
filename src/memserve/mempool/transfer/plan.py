"""Which blocks to copy where, in steps. Pure: block numbers in, block numbers out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from memserve.mempool.address import Addresses, BlockNumbers, numbers_of

STEP_BYTES = 8 << 20
"""Bytes between two looks at whether to go on: about a millisecond of copying."""
LAST_STEP_BYTES = 768 << 10
"""Steps are verified while the next one is copied; nothing hides the last one's verification."""


@dataclass(frozen=True, slots=True)
class Step:
    """Copy whole blocks: the sender's ``src`` to the receiver's ``dst``, both int64[n], in this order."""

    src: BlockNumbers
    dst: BlockNumbers


def plan_steps(src: Addresses, dst: Addresses, block_bytes: int, step_bytes: int = STEP_BYTES) -> list[Step]:
    """Split a copy of ``src`` to ``dst`` (as many) into steps of at most ``step_bytes``, at least one block.

    If there are several, the last one has at most ``LAST_STEP_BYTES`` or one block. Aggregated blocks are one
    contiguous piece each, so a block is one copy and one checksum.
    """
    assert len(src) == len(dst), f"{len(src)} blocks cannot be copied to {len(dst)}"
    most, last = max(1, step_bytes // block_bytes), max(1, LAST_STEP_BYTES // block_bytes)
    source, target = numbers_of(src.packed), numbers_of(dst.packed)
    starts = list(range(0, len(src), most))
    if len(src) > most > last and len(src) - starts[-1] > last:
        starts.append(len(src) - last)
    return [Step(source[a:b], target[a:b]) for a, b in itertools.pairwise([*starts, len(src)])]
