"""What the engine asks of a model runner. A runner computes; it keeps no KV of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memserve.core.types import Tokens
from memserve.mempool.layout import KVLayout


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One forward pass over rows of several sequences, any mix of prefill chunks and decode tokens.

    tokens: int32[rows]; positions: int32[rows], ascending by one inside a sequence.
    starts: int32[sequences + 1]; rows ``starts[s]:starts[s+1]`` belong to sequence s.
    blocks: uint64[sequences, width]; memory address of each KV block of a sequence, in order of position;
        covers all positions up to the sequence's last row. Entries beyond are 0 and never read.
    logit_rows: int32[wanted]; rows whose logits are wanted, ascending.
    """

    tokens: Tokens
    positions: NDArray[np.int32]
    starts: NDArray[np.int32]
    blocks: NDArray[np.uint64]
    logit_rows: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LayerSignal:
    """Where a pass tells how far it is, without the GIL: an eventfd to which passed layers are added.

    Rows pass the layers in tiles of ``Runner.tile_rows``, one tile after another, and the sum goes through
    all of them. ``every`` so many layers are enough to be told of, and at the end of a tile all.
    """

    fd: int
    every: int = 1


class Runner(Protocol):
    """Executes forward passes on pool memory. Not thread-safe: one pass at a time."""

    @property
    def layout(self) -> KVLayout:
        """The layout of the blocks it reads and writes."""
        ...

    @property
    def isa(self) -> str:
        """The instruction set it runs on, for people: ``reference``, ``portable``, ``avx512-bf16``, ..."""
        ...

    @property
    def tile_rows(self) -> int:
        """Rows of a pass that go through all layers together, before the next ones do."""
        ...

    def forward(self, batch: ForwardBatch, signal: LayerSignal | None = None) -> NDArray[np.float32]:
        """Write the rows' KV into their blocks and return logits float32[wanted, vocabulary]."""
        ...

    def close(self) -> None:
        """End worker threads and release memory."""
        ...
