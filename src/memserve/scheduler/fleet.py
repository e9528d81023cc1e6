"""The instances as columns: what a policy needs to weigh all of them at once. Decides nothing.

Row n belongs to the instance with number n in the global prompt tree; rows of nobody are never read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memserve.core.types import StepPrices

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Slots = NDArray[np.intp]
"""Row numbers: intp[n]."""

FLOOR_TOKENS = 16
"""An engine computes at least so many prompt tokens per step, however slow its streams are."""


class Columns(NamedTuple):
    """One entry per place, float64[n].

    step, row, row_context, token, token_context : ``StepPrices``, seconds; ``token`` with its part of a step.
    stretch : how much longer prefill takes because streams are decoded in between, at least 1.
    free_at : when the prefill line will be done, in the scheduler's clock.
    streams, context : requests that decode, and the tokens they attend to.
    room : tokens of KV that fit beside what is in use.
    swap : seconds per token to bring KV up to the device.
    line : prompts in the prefill line that one more would delay.
    """

    step: Floats
    row: Floats
    row_context: Floats
    token: Floats
    token_context: Floats
    stretch: Floats
    free_at: Floats
    streams: Floats
    context: Floats
    room: Floats
    swap: Floats
    line: Floats


class Fleet:
    """All rows: ``columns`` are to be written to in place; ``table`` has all, float64[columns, rows]."""

    def __init__(self) -> None:
        self.table = np.zeros((len(Columns._fields), 0))
        self.columns = Columns(*self.table)

    @property
    def rows(self) -> int:
        """How many there are, those of nobody included."""
        return self.table.shape[1]

    def at(self, slots: Slots) -> Columns:
        """A copy of some rows, in the order of ``slots``."""
        return Columns(*self.table.take(slots, axis=1))

    def reserve(self, slot: int) -> None:
        """Make sure that row ``slot`` exists."""
        if slot >= self.rows:
            self._resize(max(8, 2 * slot))

    def set_prices(self, slot: int, prices: StepPrices, step_tokens: int, swap: float = 0.0) -> None:
        """What steps of the instance cost. A prompt token bears its part of a step of ``step_tokens``."""
        columns = self.columns
        columns.step[slot] = prices.step
        columns.row[slot] = prices.row
        columns.row_context[slot] = prices.row_context
        columns.token[slot] = prices.token + prices.step / step_tokens
        columns.token_context[slot] = prices.token_context
        columns.swap[slot] = swap

    def clear(self, slot: int) -> None:
        """Forget the row's instance."""
        self.table[:, slot] = 0.0

    def _resize(self, rows: int) -> None:
        table = np.zeros((len(Columns._fields), rows))
        table[:, : self.rows] = self.table
        self.table = table
        self.columns = Columns(*table)


def stretch_of(prices: StepPrices, step_tokens: int, target: float, streams: float, context: float) -> float:
    """How much longer prefill takes beside ``streams``: the length of a step over prefill's part in it.

    ``target``: see ``Ready.target_tpot``.
    """
    if streams <= 0:
        return 1.0
    decoding = prices.decode_step(streams, context)
    part = step_tokens * prices.token
    if target > 0:
        part = min(part, max(FLOOR_TOKENS * prices.token, target - decoding))
    return (decoding - prices.step + part) / part
