"""How much of a prompt's way to D goes on while the prompt is computed: chosen from what it has cost. Pure.

Knows seconds and bytes; what travels and when layers are done, others know.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from memserve.engine.cost import LinearCost

SHORT_SECONDS = 2e-3
"""A transfer that takes less is not cut into layers: it is over before the calls for them would be."""
_RETRY = 0.95
"""The way that was not taken counts as having been this much quicker than expected: it is tried again."""
_HIDDEN = 0.5
"""Of the last chunk's time, what may be planned to hide transfers behind."""

_TAIL = (1e-3, 1.2e-10), (1e-3, 1e-11)
_WORK = (1e-3, 1.4e-10), (2e-3, 2.3e-10)
"""Seconds per transfer and per byte, whole and by layer: ``benchmarks/transfer_modes.py`` over shared memory.
The first measurement corrects the scale."""


class Overlap(enum.StrEnum):
    """What happens before the first token is there.

    ``NONE``    nothing: the transfer begins with the first token.
    ``WHOLE``   the peer has reserved; whole blocks go when the last layer is computed.
    ``LAYERS``  each layer of all blocks goes when it is computed.
    ``CHUNKS``  blocks of finished chunks go whole and are published; the last chunk's as with ``WHOLE``.
    ``AUTO``    the cheaper of ``WHOLE`` and ``LAYERS`` for the last chunk, after ``CHUNKS`` where that pays.
    """

    NONE = "none"
    WHOLE = "whole"
    LAYERS = "layers"
    CHUNKS = "chunks"
    AUTO = "auto"


@dataclass(slots=True)
class _Way:
    tail: LinearCost
    work: LinearCost


class HandoffCosts:
    """What handing over to one peer has cost, whole and by layer.

    *Tail* is what a request waits for: from its first token to the publication. *Work* is how long a transfer
    is on its way, hidden or not. Both are measured, so the load on processors and links is in them.
    """

    def __init__(self) -> None:
        self._whole, self._layers = (
            _Way(LinearCost(tail), LinearCost(work)) for tail, work in zip(_TAIL, _WORK, strict=True)
        )
        self._linked = False

    def learn(self, overlap: Overlap, size: int, *, tail: float, work: float) -> None:
        """A transfer of ``size`` bytes by ``overlap`` (``WHOLE`` or ``LAYERS``) has taken so many seconds.

        The first of all does not count: it has opened the link and touched pages for the first time.
        """
        if not self._linked:
            self._linked = True
            return
        amounts = (1, size)
        taken, other = self._whole, self._layers
        if overlap is Overlap.LAYERS:
            taken, other = other, taken
        taken.tail.learn(amounts, tail)
        taken.work.learn(amounts, work)
        other.tail.learn(amounts, other.tail.predict(amounts) * _RETRY)

    def learn_ahead(self, size: int, work: float) -> None:
        """``size`` bytes of whole blocks have taken so long while others were computed."""
        self._whole.work.learn((1, size), work)

    def choose(self, size: int, step_seconds: float) -> Overlap:
        """``WHOLE`` or ``LAYERS`` for ``size`` bytes, whose last layers are computed in ``step_seconds``."""
        amounts = (1, size)
        if self._whole.work.predict(amounts) < SHORT_SECONDS:
            return Overlap.WHOLE
        late = self._layers.work.predict(amounts) - step_seconds
        layers = max(self._layers.tail.predict(amounts), late)
        return Overlap.LAYERS if layers < self._whole.tail.predict(amounts) else Overlap.WHOLE

    def pays_ahead(self, size: int, left_seconds: float) -> bool:
        """Whether ``size`` bytes that are computed go now, with ``left_seconds`` of prefill to come.

        Later they would go with fewer messages, as long as there is enough time left to hide them.
        """
        seconds = self._whole.work.predict((1, size))
        return seconds >= SHORT_SECONDS and seconds > _HIDDEN * left_seconds
