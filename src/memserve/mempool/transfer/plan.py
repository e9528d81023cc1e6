"""Which blocks to copy where, in steps. Pure: block numbers in, block numbers out."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.mempool.address import Addresses, BlockNumbers, numbers_of

STEP_BYTES = 4 << 20
"""Bytes between two looks at whether to go on: under a millisecond of copying."""


@dataclass(frozen=True, slots=True)
class Step:
    """Copy whole blocks: the sender's ``src`` to the receiver's ``dst``, both int64[n], in this order."""

    src: BlockNumbers
    dst: BlockNumbers


def plan_steps(src: Addresses, dst: Addresses, block_bytes: int, step_bytes: int = STEP_BYTES) -> list[Step]:
    """Split a copy of ``src`` to ``dst`` (as many) into steps of at most ``step_bytes``, at least one block.

    Aggregated blocks are one contiguous piece each, so a block is one copy and one checksum.
    """
    assert len(src) == len(dst), f"{len(src)} blocks cannot be copied to {len(dst)}"
    blocks = max(1, step_bytes // block_bytes)
    source, target = numbers_of(src.packed), numbers_of(dst.packed)
    return [Step(source[at : at + blocks], target[at : at + blocks]) for at in range(0, len(src), blocks)]
