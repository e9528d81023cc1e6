"""Answers of MemPool calls, as values."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.mempool.modes import TransferMode


@dataclass(frozen=True, slots=True)
class Freed:
    """References dropped, and addresses that named nothing the caller could hold any more. Units: blocks."""

    freed: int
    stale: int


@dataclass(frozen=True, slots=True)
class Inserted:
    """Blocks that are new in the index, and blocks not taken because others hold the same tokens' KV."""

    new: int
    duplicate: int


@dataclass(frozen=True, slots=True)
class Transferred:
    """Of the blocks asked for the receiver ``held`` some already; ``sent`` were copied, ``bytes`` in all.

    ``calls`` counts the contiguous pieces in which they went, by ``mode`` over ``backend``. ``seconds`` is
    what it took, less the waiting for layers and attachment that were still to be computed.
    """

    held: int
    sent: int
    bytes: int
    calls: int
    mode: TransferMode
    backend: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Resized:
    """A tier is to have ``blocks`` blocks; of those that are too many ``draining`` are still held."""

    blocks: int
    draining: int
