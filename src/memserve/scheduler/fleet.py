"""The instances as columns: what a policy needs to weigh all of them at once. Decides nothing.

Row n belongs to the instance with number n in the global prompt tree; rows of nobody are never read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memserve.core.types import StepPrices

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]
Slots = Indices
"""Row numbers: intp[n]."""

FLOOR_TOKENS = 16
"""An engine computes at least so many prompt tokens per step, however slow its streams are."""


class Fleet:
    """Columns, float64[rows].

    step, row, row_context, token, token_context : ``StepPrices``, seconds; ``token`` with its part of a step.
    stretch : how much longer prefill takes because streams are decoded in between, at least 1.
    free_at : when the prefill line will be done, in the scheduler's clock.
    streams, context : requests that decode, and the tokens they attend to.
    room : tokens of KV that fit beside what is in use.
    """

    COLUMNS = (
        "step",
        "row",
        "row_context",
        "token",
        "token_context",
        "stretch",
        "free_at",
        "streams",
        "context",
        "room",
    )

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

    def __init__(self) -> None:
        self.rows = 0
        for name in self.COLUMNS:
            setattr(self, name, np.zeros(0))

    def reserve(self, slot: int) -> None:
        """Make sure that row ``slot`` exists."""
        if slot < self.rows:
            return
        self.rows = max(8, 2 * slot)
        for name in self.COLUMNS:
            grown = np.zeros(self.rows)
            old: Floats = getattr(self, name)
            grown[: len(old)] = old
            setattr(self, name, grown)

    def set_prices(self, slot: int, prices: StepPrices, step_tokens: int) -> None:
        """What steps of the instance cost. A prompt token bears its part of a step of ``step_tokens``."""
        self.step[slot] = prices.step
        self.row[slot] = prices.row
        self.row_context[slot] = prices.row_context
        self.token[slot] = prices.token + prices.step / step_tokens
        self.token_context[slot] = prices.token_context

    def clear(self, slot: int) -> None:
        """Forget the row's instance."""
        for name in self.COLUMNS:
            getattr(self, name)[slot] = 0.0


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
