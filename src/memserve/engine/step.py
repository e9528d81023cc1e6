"""One step: chunks of sequences -> forward pass -> sampled tokens. Runs on the engine's worker thread.

It only reads sequences; the event loop must not touch those of a running step.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import islice

import numpy as np

from memserve.core.errors import RequestFailed
from memserve.engine.batcher import Chunk
from memserve.engine.runners.base import ForwardBatch, LayerSignal, Runner
from memserve.engine.sampling import Floats, SampledToken, sample_row

Run = tuple[SampledToken, ...]
"""Tokens that one step has given to one sequence."""


def build_batch(chunks: Seq[Chunk]) -> ForwardBatch:
    """Lay the chunks out as one forward pass; sequences are in the order of ``chunks``."""
    starts = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum([chunk.rows for chunk in chunks], out=starts[1:])
    tokens = np.empty(starts[-1], np.int32)
    positions = np.empty(starts[-1], np.int32)
    blocks = np.zeros((len(chunks), max(chunk.sequence.blocks_held for chunk in chunks)), np.uint64)
    for at, chunk in enumerate(chunks):
        sequence, computed = chunk.sequence, chunk.sequence.computed
        start, end = starts[at], starts[at + 1]
        tokens[start : start + chunk.count] = sequence.buffer[computed : computed + chunk.count]
        tokens[start + chunk.count : end] = chunk.proposed
        positions[start:end] = np.arange(computed, computed + chunk.rows, dtype=np.int32)
        blocks[at, : sequence.blocks_held] = sequence.pointers
    wanted = [
        row
        for at, chunk in enumerate(chunks)
        if chunk.last
        for row in range(starts[at] + chunk.count - 1, starts[at + 1])
    ]
    return ForwardBatch(tokens, positions, starts, blocks, np.array(wanted, np.int32))


def compute_step(
    runner: Runner, chunks: Seq[Chunk], signal: LayerSignal | None = None
) -> list[Run | RequestFailed]:
    """Run the model on ``chunks`` and sample for each chunk that is its sequence's last.

    A row whose logits cannot be sampled from yields its error; its batch mates are not concerned.
    """
    logits = iter(runner.forward(build_batch(chunks), signal))
    return [sample_run(chunk, logits) for chunk in chunks if chunk.last]


def sample_run(chunk: Chunk, logits: Iterator[Floats]) -> Run | RequestFailed:
    """Take the chunk's rows from ``logits`` and sample the tokens that plain decoding would give.

    That is one token, and one more for each proposed one that is what was sampled before it: its row then
    has the past that it would have had, and draws the same random number.
    """
    sequence = chunk.sequence
    run: list[SampledToken] = []
    for row, proposed in zip(
        list(islice(logits, len(chunk.proposed) + 1)), (*chunk.proposed, None), strict=True
    ):
        try:
            sampled = sample_row(row, sequence.sampling, sequence.sampled + len(run))
        except RequestFailed as error:
            # After other tokens it is the next step's: that computes the same row again.
            return tuple(run) or error
        run.append(sampled)
        if sampled.token != proposed:
            break
    return tuple(run)
