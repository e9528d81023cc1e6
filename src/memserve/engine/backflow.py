"""KV of answers that goes back to P while they are still being decoded, so that little is left at their end.

Knows how much of each answer has gone and decides when more is worth a transfer; ends are the journeys'.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from memserve.core.errors import MemServeError
from memserve.core.types import RequestId
from memserve.engine.carrier import Carrier
from memserve.engine.sequence import Sequence

log = logging.getLogger(__name__)

PIECE_TOKENS = 256
"""Fewer are left for later: a transfer costs a millisecond whatever it carries (benchmarks/backflow.py)."""


@dataclass(slots=True)
class _Flow:
    """Of an answer, the KV up to token number ``tokens`` is at P; ``sent`` bytes went there."""

    tokens: int
    sent: int = 0
    refused: bool = False
    piece: asyncio.Task[None] | None = None


class Backflow:
    """Sends the finished blocks of running answers back in pieces of at least ``piece_tokens`` tokens.

    One piece at a time, whoever it belongs to: what goes back early must not be felt by those that decode.
    0 tokens: nothing goes early. ``came_free`` is called when a piece has let go of its blocks.
    """

    def __init__(self, carrier: Carrier, piece_tokens: int, came_free: Callable[[], None]) -> None:
        self._carrier = carrier
        self._piece_tokens = piece_tokens
        self._came_free = came_free
        self._flows: dict[RequestId, _Flow] = {}
        self._under_way: asyncio.Task[None] | None = None
        self._pieces = 0
        self._early_bytes = 0
        self._late_bytes = 0

    def counters(self) -> Mapping[str, float]:
        """What has been done so far, for metrics."""
        return {
            "backflow_pieces": float(self._pieces),
            "backflow_early_bytes": float(self._early_bytes),
            "backflow_late_bytes": float(self._late_bytes),
        }

    def send_early(self, sequences: Iterable[Sequence]) -> None:
        """A step is over: send a piece of the one of ``sequences`` with most to send, if that is enough."""
        if not self._piece_tokens or self._under_way is not None:
            return
        ready = [(self._unsent(one), one) for one in sequences if one.prefilled_on is not None]
        if not ready:
            return
        unsent, sequence = max(ready, key=lambda pair: pair[0])
        if unsent >= self._piece_tokens:
            flow = self._flows.setdefault(sequence.request, _Flow(sequence.prompt_length))
            flow.piece = self._under_way = asyncio.create_task(self._send_piece(sequence, flow))
            flow.piece.add_done_callback(self._end_piece)

    async def send_rest(self, sequence: Sequence) -> int:
        """The answer has ended: send what P lacks of it. Returns the bytes that went, early ones included.

        Raises ``MemServeError``. Cancelled, it also ends a piece that is under way.
        """
        flow = self._flows.pop(sequence.request, _Flow(sequence.prompt_length))
        if flow.piece is not None:
            # What it publishes need not be sent twice.
            await flow.piece
        sent = await self._carrier.send_back(sequence)
        self._late_bytes += sent
        return flow.sent + sent

    def forget(self, request: RequestId) -> None:
        """The request has ended otherwise."""
        flow = self._flows.pop(request, None)
        if flow is not None and flow.piece is not None:
            flow.piece.cancel()

    async def close(self) -> None:
        """End what is under way."""
        if self._under_way is not None:
            self._under_way.cancel()
            await asyncio.gather(self._under_way, return_exceptions=True)

    def _unsent(self, sequence: Sequence) -> int:
        flow = self._flows.get(sequence.request)
        if flow is None:
            return sequence.computed - sequence.prompt_length
        return 0 if flow.refused else sequence.computed - flow.tokens

    async def _send_piece(self, sequence: Sequence, flow: _Flow) -> None:
        if sequence.addrs is None:
            # Preempted since; what it computes anew is sent later.
            return
        computed = sequence.computed
        try:
            sent = await self._carrier.send_back(sequence)
        except MemServeError as error:
            # The end will try again, and nobody is told if that fails, too.
            flow.refused = True
            log.info("a piece of the answer's KV of %s did not go back: %s", sequence.request, error)
            return
        flow.tokens = computed
        flow.sent += sent
        self._pieces += 1
        self._early_bytes += sent

    def _end_piece(self, piece: asyncio.Task[None]) -> None:
        self._under_way = None
        self._came_free()
