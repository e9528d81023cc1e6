"""One instance's engine: admits requests, runs steps, and does with their KV what the phases table says.

A thin shell on one event loop. The batcher decides what a step computes; the model runs on one worker
thread; blocks change hands only between steps, so the kernels never see memory that somebody else got.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from memserve.core.clock import Clock
from memserve.core.errors import ConfigError, InvalidRequest, MemServeError, Overloaded, RequestFailed
from memserve.core.messages import (
    Message,
    RequestClosed,
    RequestError,
    Submit,
    TokenChunk,
    Trace,
)
from memserve.core.types import (
    FinishReason,
    InstanceId,
    Ledger,
    RequestId,
    Tokens,
    unpack_tokens,
)
from memserve.engine.backflow import PIECE_TOKENS, Backflow
from memserve.engine.batcher import Batcher, Chunk, work_of
from memserve.engine.carrier import Carrier
from memserve.engine.head_start import HeadStarts
from memserve.engine.journeys import Journeys
from memserve.engine.overlap import Overlap
from memserve.engine.phases import Handoff, Phases
from memserve.engine.runners.base import Runner
from memserve.engine.sequence import Expected, Patience, Sequence, from_adoption, new_sequence
from memserve.engine.sequence_blocks import SequenceBlocks
from memserve.engine.sharing import Lead, Leaders
from memserve.engine.speculation import Speculated
from memserve.engine.step import Run, compute_step
from memserve.mempool.address import Addresses
from memserve.mempool.layout import Arrangement
from memserve.mempool.pool import MemPool

log = logging.getLogger(__name__)

MAX_WAITING = 1024
"""Requests queued in one engine; the server refuses new ones long before."""
_REMEMBERED_CANCELS = 4096
_PATIENCE_SECONDS = 0.25
"""How long a request waits for KV of its prompt that is on its way here."""
_FOLLOWING_SECONDS = 2.0
"""How long a request waits for another that computes its prompt's beginning and makes no progress."""
_EXPECTING_SECONDS = 0.001
_STARVED_SECONDS = 0.05
"""How often a request that found no blocks looks again when nothing here gives any back."""


class Engine:
    """Runs sequences on ``runner`` with KV in ``pool``; everything it has to say goes to ``emit``.

    ``context`` is the longest sequence in tokens, prompt and answer together; ``backflow_tokens`` how much of
    a running answer is sent back to P at least at a time, 0: only at its end. ``cores``: the first is where
    the thread stays that calls the runner; none: anywhere.
    """

    def __init__(
        self,
        instance: InstanceId,
        pool: MemPool,
        runner: Runner,
        batcher: Batcher,
        phases: Phases,
        carrier: Carrier,
        *,
        context: int,
        vocabulary: int,
        clock: Clock,
        emit: Callable[[Message], None],
        cores: tuple[int, ...] = (),
        overlap: Overlap = Overlap.AUTO,
        backflow_tokens: int = PIECE_TOKENS,
    ) -> None:
        if pool.layout.arrangement is not Arrangement.AGGREGATED:
            raise ConfigError(
                f"the pool's layout.arrangement is {pool.layout.arrangement.value}, and kernels read whole "
                f"blocks; make the pool with arrangement {Arrangement.AGGREGATED.value}"
            )
        self._instance = instance
        self._pool = pool
        self._runner = runner
        self._batcher = batcher
        self._phases = phases
        self._blocks = SequenceBlocks(pool, phases, batcher.pace.times, clock)
        self._heads = HeadStarts(instance, runner, phases, carrier, batcher.pace.times, overlap)
        self._backflow = Backflow(carrier, backflow_tokens if phases.backflow else 0, self._blocks_came_free)
        self._journeys = Journeys(
            instance,
            phases,
            carrier,
            self._heads,
            self._backflow,
            clock,
            release=self._release,
            trace=self._trace,
            emit=emit,
        )
        self._context = context
        self._vocabulary = vocabulary
        self._clock = clock
        self._emit = emit
        stay = functools.partial(os.sched_setaffinity, 0, cores[:1]) if cores else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model", initializer=stay)
        self._wake = asyncio.Event()
        self._stepping: frozenset[Sequence] = frozenset()
        self._cancelled: dict[RequestId, None] = {}
        self._starved = False
        self._expecting = False
        self._steps = 0
        self._shared = 0
        self._speculated = Speculated()

    # --- requests come and go ---

    @property
    def batcher(self) -> Batcher:
        return self._batcher

    def counters(self) -> Mapping[str, float]:
        """What has been done so far, for metrics."""
        own = {"steps": float(self._steps), "shared_prefills": float(self._shared)}
        parts = (self._blocks, self._heads, self._backflow, self._speculated)
        return own | {name: value for part in parts for name, value in part.counters().items()}

    def swap_seconds(self, host: int, disk: int) -> float:
        """See ``SequenceBlocks.swap_seconds``."""
        return self._blocks.swap_seconds(host, disk)

    def submit(self, message: Submit) -> None:
        """Queue a new request; a bad one is answered with a ``RequestError``."""
        try:
            tokens = unpack_tokens(message.tokens)
            self._check(tokens, message)
        except MemServeError as error:
            self._fail(message.request, error)
            return
        if self._cancelled.pop(message.request, _MISSING) is not _MISSING:
            return
        sequence = new_sequence(
            message.request,
            message.namespace,
            tokens,
            message.sampling,
            decode_on=message.decode_on,
            trace=message.trace,
        )
        if message.fetch is not None:
            deadline = self._clock.now() + message.fetch.seconds
            sequence.fetch = Expected(message.fetch.tokens, deadline)
        self._batcher.enqueue(sequence)
        self._wake.set()

    def adopt(self, attachment: bytes, addrs: Addresses) -> None:
        """Go on with a request that was prefilled elsewhere; its KV is in ``addrs``, now ours.

        Raises ``Overloaded`` or ``RequestFailed`` when it cannot be taken; ``addrs`` stay the caller's then.
        """
        sequence = from_adoption(attachment)
        if self._cancelled.pop(sequence.request, _MISSING) is not _MISSING:
            raise RequestFailed(f"request {sequence.request} was cancelled before it could be decoded")
        if self._batcher.waiting >= MAX_WAITING:
            raise Overloaded(f"{self._instance} has {MAX_WAITING} requests waiting")
        self._blocks.hold(sequence, addrs)
        self._trace(sequence, "engine.decode", "adopted")
        self._batcher.enqueue(sequence)
        self._wake.set()

    def cancel(self, request: RequestId, reason: FinishReason) -> None:
        """End a request early, wherever it is; an unknown one is remembered in case it arrives late."""
        if self._journeys.cancel(request, reason):
            return
        sequence = self._batcher.find(request)
        if sequence is None:
            self._cancelled[request] = None
            while len(self._cancelled) > _REMEMBERED_CANCELS:
                del self._cancelled[next(iter(self._cancelled))]
        elif sequence in self._stepping:
            sequence.ended = reason
        else:
            self._end(sequence, reason)

    def capacity_changed(self) -> None:
        """The pool has more blocks, or fewer: look again at who can run."""
        self._starved = False
        self._wake.set()

    # --- the loop ---

    async def run(self) -> None:
        """Step for ever, sleeping while there is nothing to do."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            self._admit()
            self._grow()
            chunks = tuple(map(self._fit, self._batcher.plan()))
            if not chunks:
                await self._sleep()
                continue
            self._stepping = frozenset(chunk.sequence for chunk in chunks)
            work, started, signal = work_of(chunks), self._clock.now(), self._heads.begin_step(chunks)
            try:
                sampled = await loop.run_in_executor(self._thread, compute_step, self._runner, chunks, signal)
            except Exception as error:
                log.exception("a forward pass failed")
                self._stepping = frozenset()
                self._fail_step(chunks, error)
                self._heads.end_step()
                continue
            self._stepping = frozenset()
            self._heads.end_step()
            self._steps += 1
            self._apply(chunks, sampled)
            self._backflow.send_early(self._batcher.admitted())
            # With all that has to be done before the next one.
            self._batcher.pace.times.learn(work, self._clock.now() - started)

    async def _sleep(self) -> None:
        """Until something arrives or is given back. What peers bring or free is looked for in between."""
        seconds = _EXPECTING_SECONDS if self._expecting else _STARVED_SECONDS if self._starved else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._starved = self._expecting = False

    async def close(self) -> None:
        """Cancel what is under way and give all blocks back. Call after ``run`` has been cancelled."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        await self._journeys.close()
        await self._heads.close()
        await self._backflow.close()
        for sequence in list(self._batcher):
            self._batcher.remove(sequence)
            self._release(sequence)

    # --- blocks ---

    def _admit(self) -> None:
        """Bring waiting sequences into the batch. Nobody without blocks overtakes another such."""
        leaders = Leaders(self._pool.layout.block_tokens, self._batcher.admitted())
        for sequence in self._batcher.admissible():
            if self._batcher.full:
                return
            if sequence.addrs is None and not self._find_blocks(sequence, leaders):
                continue
            self._batcher.admit(sequence)
            leaders.add(sequence)

    def _find_blocks(self, sequence: Sequence, leaders: Leaders) -> bool:
        """See to a waiting sequence's blocks. False: it waits, or has failed."""
        if self._awaits_kv(sequence) or self._outgrows(sequence) or self._starved:
            return False
        if self._phases.reuses and self._follows(sequence, leaders.lead_of(sequence)):
            return False
        if not self._blocks.take(sequence):
            self._starved = True
            return False
        self._trace(sequence, "mempool.match", f"{sequence.computed} tokens cached")
        return True

    def _follows(self, sequence: Sequence, lead: Lead | None) -> bool:
        """Whether a running sequence computes more of the prompt just now, so that waiting saves as much.

        What it has computed so far is published when somebody comes to use it.
        """
        if lead is None:
            return False
        waited = sequence.leader_patience is not None
        if lead.coming and (waited or lead.worth_waiting(sequence)):
            self._shared += not waited
            sequence.leader_patience = sequence.leader_patience or Patience(_FOLLOWING_SECONDS)
            if not sequence.leader_patience.spent(lead.leader.computed, self._clock.now()):
                return True
        self._blocks.publish(lead.leader)
        return False

    def _awaits_kv(self, sequence: Sequence) -> bool:
        """Whether a transfer under way brings more of the prompt: sooner here than computed once more.

        The next turn of a chat may come before the last answer's KV has come back from D.
        """
        if not self._phases.reuses:
            return False
        now = self._clock.now()
        if self._is_fetched(sequence, now):
            self._expecting = True
            return True
        wanted = sequence.buffer[: sequence.length - 1]
        if self._pool.incoming_gain(wanted, sequence.namespace) == 0:
            return False
        if sequence.patience is None:
            sequence.patience = now + _PATIENCE_SECONDS
        if now >= sequence.patience:
            return False
        self._expecting = True
        return True

    def _is_fetched(self, sequence: Sequence, now: float) -> bool:
        """Whether a peer was asked for the prompt's beginning and may still bring it."""
        expected = sequence.fetch
        if expected is None:
            return False
        prefix = sequence.buffer[: min(expected.tokens, sequence.length - 1)]
        whole = len(prefix) - len(prefix) % self._pool.layout.block_tokens
        if now < expected.deadline and self._pool.count_cached(prefix, sequence.namespace) < whole:
            return True
        sequence.fetch = None
        return False

    def _outgrows(self, sequence: Sequence) -> bool:
        """Whether a sequence can never run in the pool as it is now; it has failed then."""
        need, have = self._pool.layout.blocks_for(sequence.length), self._pool.blocks
        if need > have:
            text = f"the request has come to need {need} KV blocks and the pool was shrunk to {have}"
            self._drop(sequence, RequestFailed(f"{text}; give the pool more memory"))
        return need > have

    def _grow(self) -> None:
        """Give each running sequence a block for its next token; preempt where there is none."""
        for sequence in self._batcher.admitted():
            while sequence.addrs is not None and not self._blocks.grow(sequence):
                victim = self._batcher.preempt_newest()
                assert victim is not None, "a running sequence is always there to be preempted"
                self._blocks.give_up(victim)
                self._blocks_came_free()

    def _fit(self, chunk: Chunk) -> Chunk:
        """Speculate no further than context and free blocks reach: nobody is preempted for it."""
        if not chunk.proposed:
            return chunk
        ahead = min(len(chunk.proposed), self._context - chunk.sequence.length - 1)
        return replace(chunk, proposed=chunk.proposed[: self._blocks.reach(chunk.sequence, ahead)])

    def _release(self, sequence: Sequence) -> None:
        self._heads.call_off(sequence.request)
        self._backflow.forget(sequence.request)
        self._blocks.release(sequence)
        self._blocks_came_free()

    def _blocks_came_free(self) -> None:
        self._starved = False
        self._wake.set()

    # --- what a step brought ---

    def _apply(self, chunks: tuple[Chunk, ...], sampled: list[Run | RequestFailed]) -> None:
        results = iter(sampled)
        for chunk in chunks:
            sequence, last = chunk.sequence, chunk.last
            sequence.computed += chunk.count
            result = next(results) if last else None
            if sequence.ended is not None:
                self._end(sequence, sequence.ended)
            elif isinstance(result, RequestFailed):
                self._drop(sequence, result)
            elif result is not None:
                self._accept(sequence, result)
                self._speculated.count(len(chunk.proposed), len(result) - 1)

    def _accept(self, sequence: Sequence, run: Run) -> None:
        before = sequence.sampled
        first = before == 0
        finish = sequence.extend((one.token for one in run), self._context)
        sequence.computed = sequence.length - 1
        self._blocks.trim(sequence)
        run = run[: sequence.sampled - before]
        chunk = TokenChunk(
            sequence.request,
            before,
            tuple(one.token for one in run),
            tuple(one.logprob for one in run if one.logprob is not None),
            finish,
            self._blocks.settle_account(sequence),
        )
        if first:
            self._trace(sequence, "engine.prefill", "prefilled", chunk.ledger)
            self._blocks.publish(sequence)
            self._trace(sequence, "mempool.insert", "insert")
        self._emit(chunk)
        if finish is not None:
            self._end(sequence, finish, told=True)
        elif first and sequence.decode_on is not None and self._phases.handoff is not Handoff.NONE:
            self._batcher.remove(sequence)
            self._journeys.hand_over(sequence)

    def _end(self, sequence: Sequence, reason: FinishReason, *, told: bool = False) -> None:
        """Take a sequence out, keep its KV as the phases say, and send the answer's KV back to P."""
        self._batcher.remove(sequence)
        if not told and reason is FinishReason.STOP:
            self._emit(TokenChunk(sequence.request, sequence.sampled, (), finish=reason))
        self._blocks.publish(sequence)
        if self._phases.backflow and sequence.prefilled_on is not None and sequence.addrs is not None:
            self._journeys.send_back(sequence)
        else:
            self._release(sequence)
            self._emit(RequestClosed(sequence.request, self._instance))

    def _fail_step(self, chunks: tuple[Chunk, ...], error: Exception) -> None:
        failure = RequestFailed(f"the model could not be run: {type(error).__name__}: {error}")
        for chunk in chunks:
            self._drop(chunk.sequence, failure)

    def _drop(self, sequence: Sequence, error: MemServeError) -> None:
        self._batcher.remove(sequence)
        self._release(sequence)
        self._fail(sequence.request, error)

    def _fail(self, request: RequestId, error: MemServeError) -> None:
        self._emit(RequestError(request, type(error).__name__, str(error)))
        self._emit(RequestClosed(request, self._instance))

    # --- small things ---

    def _check(self, tokens: Tokens, message: Submit) -> None:
        if not 1 <= len(tokens) < self._context:
            raise InvalidRequest(
                f"the prompt has {len(tokens)} tokens; 1 to {self._context - 1} are possible",
                field="prompt",
                code="context_length_exceeded",
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._vocabulary:
            raise InvalidRequest(f"token ids must be within 0..{self._vocabulary - 1}", field="prompt")
        if message.sampling.max_tokens < 1:
            raise InvalidRequest("max_tokens must be at least 1", field="max_tokens")
        longest = min(len(tokens) + message.sampling.max_tokens, self._context)
        need, have = self._pool.layout.blocks_for(longest), self._pool.blocks
        if need > have:
            raise InvalidRequest(
                f"prompt and answer may need {need} KV blocks and the pool has {have}; "
                "lower max_tokens or give the pool more memory",
                field="max_tokens",
            )

    def _trace(self, sequence: Sequence, room: str, event: str, ledger: Ledger | None = None) -> None:
        if sequence.trace:
            self._emit(Trace(sequence.request, self._instance, room, event, self._clock.now(), ledger))


_MISSING = object()
