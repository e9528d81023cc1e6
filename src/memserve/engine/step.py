"""One step: chunks of sequences -> forward pass -> sampled tokens. Runs on the engine's worker thread.

It only reads sequences; the event loop must not touch those of a running step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from memserve.core.errors import RequestFailed
from memserve.engine.batcher import Chunk
from memserve.engine.runners.base import ForwardBatch, LayerSignal, Runner
from memserve.engine.sampling import SampledToken, sample_row


def build_batch(chunks: Seq[Chunk]) -> ForwardBatch:
    """Lay the chunks out as one forward pass; sequences are in the order of ``chunks``."""
    counts = [chunk.count for chunk in chunks]
    starts = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    tokens = np.empty(starts[-1], np.int32)
    positions = np.empty(starts[-1], np.int32)
    blocks = np.zeros((len(chunks), max(chunk.sequence.blocks_held for chunk in chunks)), np.uint64)
    for at, chunk in enumerate(chunks):
        sequence, rows = chunk.sequence, slice(starts[at], starts[at + 1])
        end = sequence.computed + chunk.count
        tokens[rows] = sequence.buffer[sequence.computed : end]
        positions[rows] = np.arange(sequence.computed, end, dtype=np.int32)
        blocks[at, : sequence.blocks_held] = sequence.pointers
    logit_rows = np.array([starts[at + 1] - 1 for at, chunk in enumerate(chunks) if chunk.last], np.int32)
    return ForwardBatch(tokens, positions, starts, blocks, logit_rows)


def compute_step(
    runner: Runner, chunks: Seq[Chunk], signal: LayerSignal | None = None
) -> list[SampledToken | RequestFailed]:
    """Run the model on ``chunks`` and sample one token for each chunk that is its sequence's last.

    A row whose logits cannot be sampled from yields its error; its batch mates are not concerned.
    """
    logits = runner.forward(build_batch(chunks), signal)
    sampled: list[SampledToken | RequestFailed] = []
    for row, chunk in zip(logits, (chunk for chunk in chunks if chunk.last), strict=True):
        sequence = chunk.sequence
        try:
            sampled.append(sample_row(row, sequence.sampling, sequence.sampled))
        except RequestFailed as error:
            sampled.append(error)
    return sampled
