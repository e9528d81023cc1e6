"""An instance in the simulator: a real pool, and a model of the steps an engine would run on it.

A fluid model: between two events, steps are all alike, so that prefill and streams proceed at constant rates.
Exact for one kind of work; where both run, a step holds as much prefill as the engine's pace allows.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memserve.core.clock import VirtualClock
from memserve.core.errors import OutOfBlocks
from memserve.core.messages import LoadReport, PoolEvents
from memserve.core.types import InstanceId, Ledger, Namespace, RequestId, Role, StepPrices, Tokens
from memserve.mempool import EvictionPolicy, KVLayout, MemPool
from memserve.mempool.address import Addresses, Origin
from memserve.sim.following import Lead, Prefill, Work, lead_of

LAYOUT = KVLayout("simulated", layers=1, kv_heads=1, head_dim=1)
"""The smallest block there is: memory is reserved, never touched."""
_FLOOR_TOKENS = 16
_NEVER = float("inf")
_NO_ORIGINS = np.zeros(0, np.uint8)
_DONE = 1e-9
"""Seconds or tokens that count as nothing left."""
_DONE_TOKENS = 1e-3
"""A token of which only this is left is computed: seconds were converted to tokens."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What an instance can do: its steps' prices, the most prompt tokens in one, the pace of its streams."""

    prices: StepPrices
    step_tokens: int = 512
    target_tpot: float = 0.0


@dataclass(slots=True, eq=False)
class Job:
    """A request inside an instance. ``prompt``: int32[n]; ``answer``: int32[m], what will be said.

    ``left``: seconds of prefill that remain, alone in its steps. It ``waits`` for KV that is on its way, and
    ``follows`` another until that one has ``follows_until`` seconds left: then a common prefix is computed.
    It ``began`` to be prefilled then, with ``cached`` tokens, by ``origins`` (uint8[blocks]) for the ledger.
    ``ends``: when its answer does, in steps of the engine that streams it.
    """

    request: RequestId
    namespace: Namespace
    prompt: Tokens
    answer: Tokens
    decode_on: InstanceId | None = None
    waits: bool = False
    left: float = 0.0
    cached: int = 0
    origins: NDArray[np.uint8] = field(default_factory=lambda: _NO_ORIGINS)
    addrs: Addresses | None = None
    follows: Job | None = None
    follows_until: float = 0.0
    began: float = 0.0
    prefilled: bool = False
    ends: float | None = None
    _computed: Tokens | None = None

    @property
    def context(self) -> float:
        """Tokens that a step reads for it, on average over the answer."""
        return len(self.prompt) + len(self.answer) / 2

    @property
    def computed(self) -> Tokens:
        """Prompt and answer; the last token's KV is never computed."""
        if self._computed is None:
            self._computed = np.concatenate((self.prompt, self.answer[:-1]))
        return self._computed


class SimEngine:
    """One simulated instance. Call :meth:`advance` first, then change it, then ask :meth:`next_event`."""

    def __init__(
        self,
        instance: InstanceId,
        role: Role,
        speed: Speed,
        blocks: int,
        clock: VirtualClock,
        eviction: EvictionPolicy | None = None,
        incarnation: int = 1,
    ) -> None:
        self.instance = instance
        self.role = role
        self.speed = speed
        self.incarnation = incarnation
        self.pool = MemPool(
            LAYOUT,
            blocks,
            instance=instance,
            incarnation=incarnation,
            clock=clock,
            eviction=eviction,
            borrows_tokens=True,
        )
        self.pool.take_events()
        self._work = Work(speed.prices, speed.step_tokens)
        self._now = clock.now()
        self._waiting: list[Job] = []
        self._prefilling: list[Job] = []
        self._streams: list[tuple[float, int, Job]] = []
        self._served = 0.0
        self._context = 0.0
        self._joined = 0
        self.busy = 0.0
        """Seconds in which steps ran."""

    # --- work comes ---

    def submit(self, job: Job) -> None:
        """A new request, to be prefilled here."""
        self._waiting.append(job)
        self._admit()

    def adopt(self, job: Job) -> None:
        """A request that was prefilled elsewhere; its KV has arrived. Raises ``OutOfBlocks``."""
        job.addrs, _ = self._hold(job.namespace, job.prompt, Origin.PEER)
        self._stream(job)

    def receive(self, namespace: Namespace, tokens: Tokens, origin: Origin) -> None:
        """KV that somebody sent; without room for it, it is dropped."""
        try:
            addrs, _ = self._hold(namespace, tokens, origin)
        except OutOfBlocks:
            return
        self.pool.free_mem(addrs)

    # --- time passes ---

    def next_event(self) -> float:
        """When something ends here if nothing comes."""
        step, part = self._step()
        active = self._active()
        soonest = _NEVER
        if active:
            left = min(job.left for job in active)
            if self._waiting:
                left = min((left, *self._leads_left(active)))
            soonest = left * len(active) * step / part
        if self._streams:
            soonest = min(soonest, (self._streams[0][0] - self._served) * step)
        return self._now + soonest

    def advance(self, now: float) -> tuple[list[Job], list[Job]]:
        """Let time pass, up to :meth:`next_event` at most. Returns who is prefilled and who has ended."""
        seconds = now - self._now
        step, part = self._step()
        active = self._active()
        for job in active:
            job.left -= seconds * part / step / len(active)
        if self._streams:
            self._served += seconds / step
        if active or self._streams:
            self.busy += seconds
        self._now = now
        prefilled = [job for job in active if job.left <= _DONE]
        for job in prefilled:
            self._prefilling.remove(job)
            job.prefilled = True
            self._publish(job, job.prompt)
        ended = self._end_streams()
        for job in ended:
            self.release(job)
        for job in prefilled:
            if job.decode_on is None:
                self._stream(job)
        self._admit()
        return prefilled, ended

    def cancel(self, job: Job) -> None:
        """End a job early, wherever it is; what it has published stays cached."""
        if job in self._waiting:
            self._waiting.remove(job)
        elif job in self._prefilling:
            self._prefilling.remove(job)
        elif job.ends is not None:
            self._streams = [stream for stream in self._streams if stream[2] is not job]
            heapq.heapify(self._streams)
            self._context -= job.context
        self.release(job)
        self._admit()

    def release(self, job: Job) -> None:
        """The job has left: its blocks are historical or free."""
        if job.addrs is not None:
            self.pool.free_mem(job.addrs)
            job.addrs = None

    # --- observation ---

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not (self._waiting or self._prefilling or self._streams)

    @property
    def starved(self) -> bool:
        """Whether somebody waits, perhaps for blocks."""
        return bool(self._waiting)

    def said(self, job: Job) -> int:
        """Tokens of the job's answer that are out; the first comes with the prefill's end."""
        if job.ends is None:
            return int(job.prefilled)
        left = math.ceil(job.ends - self._served - _DONE)
        return len(job.answer) - max(left, 0)

    def held(self, namespace: Namespace, tokens: Tokens) -> int:
        """How many of ``tokens`` are cached here; asking is no use of them."""
        return self.pool.count_cached(tokens, namespace)

    def take_events(self) -> PoolEvents | None:
        return self.pool.take_events()

    def read_load(self, now: float) -> LoadReport:
        """As an engine would report at ``now``, :meth:`next_event` at most."""
        left = 0.0
        if self._prefilling:
            step, part = self._step()
            seconds = sum(job.left for job in self._prefilling) - (now - self._now) * part / step
            left = seconds / self.speed.prices.token
        left += sum(len(job.prompt) for job in self._waiting)
        return LoadReport(
            waiting=len(self._waiting),
            running=len(self._prefilling) + len(self._streams),
            tokens_to_prefill=int(left),
            blocks=self.pool.blocks,
            prices=self.speed.prices,
        )

    # --- inside ---

    def _active(self) -> list[Job]:
        """The oldest and the shortest prompt share the steps."""
        if len(self._prefilling) < 2:
            return list(self._prefilling)
        oldest = self._prefilling[0]
        shortest = min(self._prefilling, key=lambda job: job.left)
        return [oldest] if shortest is oldest else [oldest, shortest]

    def _step(self) -> tuple[float, float]:
        """Seconds of a step as it is now, and how many of them are prefill."""
        prices, streams = self.speed.prices, len(self._streams)
        decoding = prices.row * streams + prices.row_context * self._context
        if not self._prefilling:
            return prices.step + decoding, 0.0
        whole = self.speed.step_tokens * prices.token + prices.step
        if not streams:
            return whole, whole
        part = whole
        if self.speed.target_tpot > 0:
            floor = prices.step + _FLOOR_TOKENS * prices.token
            part = min(whole, max(floor, self.speed.target_tpot - decoding))
        return decoding + part, part

    def _admit(self) -> None:
        """Begin to prefill whom there are blocks for, in order of arrival."""
        for job in list(self._waiting):
            if job.waits or self._follows(job):
                continue
            try:
                job.addrs, found = self._hold(job.namespace, job.prompt, None)
            except OutOfBlocks:
                return
            self._waiting.remove(job)
            # The last token is always computed: its logits are needed.
            job.origins = found[: (len(job.prompt) - 1) // LAYOUT.block_tokens]
            job.cached = len(job.origins) * LAYOUT.block_tokens
            job.began = self._now
            job.left = self._work.left(len(job.prompt), job.cached)
            self._prefilling.append(job)

    def _follows(self, job: Job) -> bool:
        """Whether somebody here computes so much of its prompt that it waits; else it uses what is done."""
        lead = self._lead_of(job)
        if lead is None:
            return False
        job.follows = None
        leader = self._prefilling[lead.leader]
        if lead.worth_waiting(len(job.prompt)):
            job.follows, job.follows_until = leader, self._work.left(len(leader.prompt), lead.tokens)
            return True
        done = int(lead.computed + _DONE_TOKENS) // LAYOUT.block_tokens * LAYOUT.block_tokens
        if done > leader.cached:
            self._publish(leader, leader.prompt[:done])
        return False

    def _lead_of(self, job: Job) -> Lead | None:
        running = (
            Prefill(one.namespace, one.prompt, self._work.computed(len(one.prompt), one.left))
            for one in self._prefilling
        )
        return lead_of(job.namespace, job.prompt, running, LAYOUT.block_tokens)

    def _leads_left(self, active: list[Job]) -> Iterator[float]:
        """Seconds of prefill until what others wait for is computed."""
        for job in self._waiting:
            if job.follows in active:
                yield max(0.0, job.follows.left - job.follows_until)

    def _hold(
        self, namespace: Namespace, tokens: Tokens, origin: Origin | None
    ) -> tuple[Addresses, NDArray[np.uint8]]:
        """Blocks for ``tokens``, cached ones first, and who computed those: uint8[cached blocks].

        With ``origin`` the KV of all is there already. Raises ``OutOfBlocks``.
        """
        with self.pool.match(tokens, namespace) as lease:
            found = lease.origins
            missing = self.pool.layout.blocks_for(len(tokens)) - len(lease.addrs)
            fresh = self.pool.alloc_mem(missing)
            addrs = lease.detach().concat(fresh)
        if origin is not None:
            self.pool.insert(tokens, addrs, namespace, origin)
        return addrs, found

    def _publish(self, job: Job, tokens: Tokens) -> None:
        assert job.addrs is not None
        covered = len(job.addrs) * self.pool.layout.block_tokens
        self.pool.insert(tokens[:covered], job.addrs, job.namespace)

    def _stream(self, job: Job) -> None:
        """Let it decode; without room for its answer's KV, that is not kept."""
        assert job.addrs is not None
        whole = self.pool.layout.blocks_for(len(job.prompt) + len(job.answer))
        with contextlib.suppress(OutOfBlocks):
            job.addrs = job.addrs.concat(self.pool.alloc_mem(whole - len(job.addrs)))
        self._joined += 1
        self._context += job.context
        job.ends = self._served + len(job.answer) - 1
        heapq.heappush(self._streams, (job.ends, self._joined, job))

    def _end_streams(self) -> list[Job]:
        ended = []
        while self._streams and self._streams[0][0] - self._served <= _DONE:
            job = heapq.heappop(self._streams)[2]
            self._context -= job.context
            self._publish(job, job.computed)
            ended.append(job)
        return ended


def ledger_of(job: Job) -> Ledger:
    """Where the prompt's KV came from."""
    counts = np.bincount(job.origins, minlength=len(Origin)) * LAYOUT.block_tokens
    local, peer, backflow = counts.tolist()
    return Ledger(len(job.prompt) - job.cached, local=local, peer=peer, backflow=backflow)
