"""Hand-overs that begin while their prompt is still being computed.

Knows which chunks a step computes and how far it is; the engine says what became of the prompt in the end:
it is taken for its journey, or called off. Until then nothing on the peer but whole blocks is published.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memserve.core.errors import MemServeError
from memserve.core.types import InstanceId, RequestId
from memserve.engine.batcher import Chunk
from memserve.engine.carrier import Carrier, Delivered, HeadStart
from memserve.engine.overlap import HandoffCosts, Overlap
from memserve.engine.pace import StepTimes
from memserve.engine.phases import Handoff, Phases
from memserve.engine.progress import LayerListener
from memserve.engine.runners.base import LayerSignal, Runner
from memserve.engine.sequence import Sequence, to_adoption
from memserve.mempool.layer_gate import LayerGate
from memserve.mempool.modes import TransferMode

log = logging.getLogger(__name__)

_TELL_BYTES = 1 << 20
"""Layers are told of when so much of them is computed: each telling wakes threads on both sides."""


@dataclass(slots=True, eq=False)
class _Started:
    """A hand-over under way of about ``blocks`` blocks.

    ``layers_before`` are done in the pass before its last rows' tile begins.
    """

    head: HeadStart
    blocks: int
    layers_before: int
    task: asyncio.Task[Delivered]


@dataclass(slots=True)
class _Ahead:
    """What has gone or goes of a prompt's finished chunks: ``blocks`` in all, and the transfer under way."""

    blocks: int = 0
    refused: bool = False
    task: asyncio.Task[None] | None = None


class HeadStarts:
    """Starts hand-overs to peers as ``overlap`` says. ``times`` tells what steps take."""

    def __init__(
        self,
        instance: InstanceId,
        runner: Runner,
        phases: Phases,
        carrier: Carrier,
        times: StepTimes,
        overlap: Overlap,
    ) -> None:
        self._instance = instance
        self._layout = runner.layout
        self._tile_rows = runner.tile_rows
        self._phases = phases
        self._carrier = carrier
        self._times = times
        self._overlap = overlap if phases.handoff is not Handoff.NONE else Overlap.NONE
        self._listener = LayerListener()
        self._started: dict[RequestId, _Started] = {}
        self._ahead: dict[RequestId, _Ahead] = {}
        self._ending: set[asyncio.Task[Delivered] | asyncio.Task[None]] = set()
        self._costs: dict[InstanceId, HandoffCosts] = {}
        self._counts = dict.fromkeys((Overlap.NONE, Overlap.WHOLE, Overlap.LAYERS), 0)
        self._ahead_blocks = 0

    def counters(self) -> Mapping[str, float]:
        """What has been done so far, for metrics."""
        by_way = {f"handoffs_{way.value}": float(count) for way, count in self._counts.items()}
        return {**by_way, "handoff_blocks_ahead": float(self._ahead_blocks)}

    # --- a step ---

    def begin_step(self, chunks: Iterable[Chunk]) -> LayerSignal | None:
        """Start what this step gives reason to; what its pass is to signal, if anybody listens."""
        if self._overlap is Overlap.NONE:
            return None
        rows, started = 0, []
        for chunk in chunks:
            rows += chunk.rows
            if not _departs(chunk.sequence):
                continue
            self._send_ahead(chunk)
            if chunk.last:
                started.append(self._start(chunk, (rows - 1) // self._tile_rows * self._layout.layers))
        if not started:
            return None
        every = min(self._layers_per_call(one) for one in started)
        return self._listener.start(every, self._open)

    def end_step(self) -> None:
        """The pass is over: what it has computed is computed in all layers."""
        self._listener.stop()
        self._open(None)

    # --- what becomes of a prompt ---

    def take(self, sequence: Sequence) -> asyncio.Task[Delivered] | None:
        """The prompt is computed and its first token there: its hand-over, if it had a head start.

        It can still be called off.
        """
        started = self._started.get(sequence.request)
        if started is None:
            return None
        started.head.adoption.set_result(to_adoption(sequence, self._instance))
        return started.task

    def call_off(self, request: RequestId) -> bool:
        """There is nothing to hand over (any more): whether that was under way.

        What has been published on the peer stays there.
        """
        ahead, started = self._ahead.pop(request, None), self._started.pop(request, None)
        if ahead is not None and ahead.task is not None:
            self._end(ahead.task)
        if started is None or started.task.done():
            return False
        started.head.adoption.cancel()
        self._end(started.task)
        return True

    def record(self, sequence: Sequence, done: Delivered, tail: float) -> str:
        """A hand-over has ended ``tail`` seconds after the first token. Returns what to tell of it."""
        self._counts[done.overlap] += 1
        sent = done.transferred
        if done.overlap is not Overlap.NONE:
            self._costs_of(sequence).learn(done.overlap, sent.bytes, tail=tail, work=sent.seconds)
        ahead = self._ahead.get(sequence.request, _Ahead()).blocks
        return (
            f"handed over: overlap {done.overlap.value}, {ahead} blocks ahead, then {sent.sent} of "
            f"{sent.held + sent.sent} blocks {sent.mode.value} over {sent.backend}, "
            f"{sent.bytes} bytes, {1e3 * tail:.2f} ms after the token"
        )

    async def close(self) -> None:
        """End everything, however far it has come. No pass is running any more."""
        self._listener.close()
        for request in {*self._started, *self._ahead}:
            self.call_off(request)
        await asyncio.gather(*self._ending, return_exceptions=True)

    # --- inside ---

    def _start(self, chunk: Chunk, layers_before: int) -> _Started:
        sequence = chunk.sequence
        blocks = self._layout.blocks_for(sequence.prompt_length) - self._gone(sequence)
        overlap = self._choose(chunk, blocks * self._layout.block_bytes)
        mode = TransferMode.BY_LAYER if overlap is Overlap.LAYERS else TransferMode.BY_REQUEST_AGGREGATED
        loop = asyncio.get_running_loop()
        head = HeadStart(overlap, mode, LayerGate(), loop.create_future())
        task = loop.create_task(self._hand_over(sequence, head))
        started = self._started[sequence.request] = _Started(head, blocks, layers_before, task)
        return started

    async def _hand_over(self, sequence: Sequence, head: HeadStart) -> Delivered:
        ahead = self._ahead.get(sequence.request)
        if ahead is not None and ahead.task is not None:
            # What it publishes need not be sent twice.
            await asyncio.wait([ahead.task])
        with_insert = self._phases.handoff is Handoff.TRANSFER_WITH_INSERT
        return await self._carrier.hand_over(sequence, with_insert=with_insert, head=head)

    def _choose(self, chunk: Chunk, size: int) -> Overlap:
        if self._overlap is Overlap.CHUNKS:
            return Overlap.WHOLE
        if self._overlap is not Overlap.AUTO:
            return self._overlap
        sequence = chunk.sequence
        seconds = self._times.prefill_seconds(sequence.computed, chunk.count)
        return self._costs_of(sequence).choose(size, seconds)

    def _gone(self, sequence: Sequence) -> int:
        """Blocks that the peer has: sent ahead, and probably what of a chat was cached here."""
        ahead = self._ahead.get(sequence.request)
        cached = 0 if sequence.account is None else sequence.account.cached_blocks
        return max(cached, 0 if ahead is None else ahead.blocks)

    def _send_ahead(self, chunk: Chunk) -> None:
        """Have the blocks of finished chunks go while this one is computed, where that is wanted."""
        sequence, with_insert = chunk.sequence, self._phases.handoff is Handoff.TRANSFER_WITH_INSERT
        if not with_insert or self._overlap not in (Overlap.CHUNKS, Overlap.AUTO):
            return
        ahead = self._ahead.setdefault(sequence.request, _Ahead())
        blocks = sequence.computed // self._layout.block_tokens
        if ahead.refused or ahead.task is not None or not self._pays_ahead(chunk, blocks):
            return
        publishing = self._publish_ahead(sequence, ahead, ahead.blocks)
        ahead.blocks = blocks
        ahead.task = asyncio.get_running_loop().create_task(publishing)

    def _pays_ahead(self, chunk: Chunk, blocks: int) -> bool:
        sequence = chunk.sequence
        fresh = blocks - self._gone(sequence)
        if fresh <= 0 or self._overlap is Overlap.CHUNKS:
            return fresh > 0
        rest = sequence.pending - chunk.count
        # The last chunk is what hides best: it is the only one after which nothing else is left to do.
        last = (rest - 1) % chunk.count + 1 if rest else 0
        left = self._times.prefill_seconds(sequence.prompt_length - last, last)
        return self._costs_of(sequence).pays_ahead(fresh * self._layout.block_bytes, left)

    async def _publish_ahead(self, sequence: Sequence, ahead: _Ahead, before: int) -> None:
        try:
            sent = await self._carrier.send_ahead(sequence, ahead.blocks)
            self._ahead_blocks += sent.sent
            self._costs_of(sequence).learn_ahead(sent.bytes, sent.seconds)
        except MemServeError as error:
            # The hand-over itself will try again, and say what is wrong if it still is.
            ahead.refused, ahead.blocks = True, before
            log.info("blocks of %s did not go ahead: %s", sequence.request, error)
        ahead.task = None

    def _layers_per_call(self, started: _Started) -> int:
        layout = self._layout
        if started.head.mode is not TransferMode.BY_LAYER:
            return layout.layers
        return min(layout.layers, math.ceil(_TELL_BYTES / max(1, started.blocks * layout.layer_bytes)))

    def _open(self, done: int | None) -> None:
        """``done`` layers of the running pass are computed; None: all of a pass that is over."""
        layers = self._layout.layers
        for started in self._started.values():
            ready = layers if done is None else min(done - started.layers_before, layers)
            if ready > started.head.ready.layers:
                started.head.ready.open(ready)

    def _costs_of(self, sequence: Sequence) -> HandoffCosts:
        assert sequence.decode_on is not None, "who is handed over has somewhere to go"
        return self._costs.setdefault(sequence.decode_on, HandoffCosts())

    def _end(self, task: asyncio.Task[Delivered] | asyncio.Task[None]) -> None:
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def _departs(sequence: Sequence) -> bool:
    """Whether it is going to be handed over, unless its first token ends it."""
    return sequence.decode_on is not None and sequence.sampled == 0 and sequence.sampling.max_tokens > 1
