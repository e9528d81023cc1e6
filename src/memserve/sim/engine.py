"""An instance in the simulator: a real pool, and a model of the steps an engine would run on it.

Step by step, as the real batcher plans them: whoever comes waits for the end of the step that runs, and a
first token is out at the end of its step. Steps are planned ahead, so that nobody wakes for each of them.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memserve.core.clock import VirtualClock
from memserve.core.errors import OutOfBlocks
from memserve.core.messages import LoadReport, PoolEvents
from memserve.core.types import InstanceId, Ledger, Namespace, RequestId, Role, Tokens
from memserve.mempool import EvictionPolicy, KVLayout, MemPool
from memserve.mempool.address import Addresses, Origin
from memserve.sim.following import Lead, Prefill, lead_of
from memserve.sim.steps import Span, Speed, plan_steps

LAYOUT = KVLayout("simulated", layers=1, kv_heads=1, head_dim=1)
"""The smallest block there is: memory is reserved, never touched."""
_NEVER = float("inf")
_ENDLESS = 1 << 30
"""Steps that nobody runs: something ends before."""
_NO_ORIGINS = np.zeros(0, np.uint8)


@dataclass(slots=True, eq=False)
class Job:
    """A request inside an instance. ``prompt``: int32[n]; ``answer``: int32[m], what will be said.

    ``computed`` tokens of the prompt are done. It ``waits`` for KV that is on its way, and it ``follows`` who
    computes what it begins with. It ``began`` to be prefilled then, with ``cached`` tokens, by ``origins``
    (uint8[blocks]) for the ledger. ``ends``: when its answer does, in steps of the engine that streams it.
    """

    request: RequestId
    namespace: Namespace
    prompt: Tokens
    answer: Tokens
    decode_on: InstanceId | None = None
    waits: bool = False
    follows: bool = False
    computed: int = 0
    cached: int = 0
    origins: NDArray[np.uint8] = field(default_factory=lambda: _NO_ORIGINS)
    addrs: Addresses | None = None
    began: float = 0.0
    ends: int | None = None
    _whole: Tokens | None = None

    @property
    def context(self) -> float:
        """Tokens that a step reads for it, on average over the answer."""
        return len(self.prompt) + len(self.answer) / 2

    @property
    def prefilled(self) -> bool:
        return self.computed == len(self.prompt)

    @property
    def whole(self) -> Tokens:
        """Prompt and answer; the last token's KV is never computed."""
        if self._whole is None:
            self._whole = np.concatenate((self.prompt, self.answer[:-1]))
        return self._whole


class SimEngine:
    """One simulated instance. Call :meth:`advance` first, then change it, then :meth:`next_event`."""

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
        self._now = clock.now()
        self._waiting: list[Job] = []
        self._prefilling: list[Job] = []
        self._joining: list[Job] = []
        self._streams: list[tuple[int, int, Job]] = []
        self._spans: deque[Span] = deque()
        self._served = 0
        self._context = 0.0
        self._joined = 0
        self.busy = 0.0
        """Seconds in which steps ran."""

    # --- work comes ---

    def submit(self, job: Job) -> None:
        """A new request, to be prefilled here."""
        self._waiting.append(job)
        self.look_again()

    def adopt(self, job: Job) -> None:
        """A request that was prefilled elsewhere; its KV has arrived. Raises ``OutOfBlocks``."""
        job.addrs, _ = self._hold(job.namespace, job.prompt, Origin.PEER)
        self._joining.append(job)
        self.look_again()

    def look_again(self) -> None:
        """Somebody may begin when the step that runs is over: plan no further than that.

        Nor does anybody get into a step that begins at this moment: of two who come at once, one is first.
        """
        while len(self._spans) > 1 and self._spans[-1].start > self._now:
            self._spans.pop()
        if self._spans:
            self._spans[-1].cut(self._now)

    def receive(self, namespace: Namespace, tokens: Tokens, origin: Origin) -> None:
        """KV that somebody sent; without room for it, it is dropped."""
        try:
            addrs, _ = self._hold(namespace, tokens, origin)
        except OutOfBlocks:
            return
        self.pool.free_mem(addrs)

    # --- time passes ---

    def next_event(self) -> float:
        """When something ends here if nothing comes. Begins the next steps if none runs."""
        if not self._spans:
            self._begin_steps()
        if self._spans:
            return self._spans[-1].end
        return self._now if self._streams else _NEVER

    def advance(self, now: float) -> tuple[list[Job], list[Job]]:
        """Let time pass, up to :meth:`next_event` at most. Returns who is prefilled and who has ended."""
        if self._spans:
            self.busy += now - self._now
        self._now = now
        prefilled: list[Job] = []
        while self._spans:
            span = self._spans[0]
            if steps := span.finish(now):
                self._served += steps if self._streams else 0
                prefilled += self._compute(span)
            if span.done < span.count:
                break
            self._spans.popleft()
        for job in prefilled:
            self._publish(job, job.prompt)
            if job.decode_on is None:
                self._stream(job)
        ended = self._end_streams()
        for job in ended:
            self.release(job)
        return prefilled, ended

    def cancel(self, job: Job) -> None:
        """End a job early, wherever it is; what it has published stays cached."""
        self._spans.clear()
        if job in self._waiting:
            self._waiting.remove(job)
        elif job in self._prefilling:
            self._prefilling.remove(job)
        elif job in self._joining:
            self._joining.remove(job)
        elif job.ends is not None:
            self._streams = [stream for stream in self._streams if stream[2] is not job]
            heapq.heapify(self._streams)
            self._context -= job.context
        self.release(job)

    def release(self, job: Job) -> None:
        """The job has left: its blocks are historical or free."""
        if job.addrs is not None:
            self.pool.free_mem(job.addrs)
            job.addrs = None

    # --- observation ---

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not (self._waiting or self._prefilling or self._joining or self._streams)

    @property
    def starved(self) -> bool:
        """Whether somebody waits, perhaps for blocks."""
        return bool(self._waiting)

    def said(self, job: Job) -> int:
        """Tokens of the job's answer that are out; the first comes with the prefill's end."""
        if job.ends is None:
            return int(job.prefilled)
        return len(job.answer) - (job.ends - self._served)

    def held(self, namespace: Namespace, tokens: Tokens) -> int:
        """How many of ``tokens`` are cached here; asking is no use of them."""
        return self.pool.count_cached(tokens, namespace)

    def take_events(self) -> PoolEvents | None:
        return self.pool.take_events()

    def read_load(self, now: float) -> LoadReport:
        """As an engine would report at ``now``, :meth:`next_event` at most."""
        left = 0
        if self._prefilling:
            left += sum(len(job.prompt) - job.computed for job in self._prefilling)
            left -= sum(count for span in self._spans if span.end <= now for _, count in span.chunks)
        if self._waiting:
            left += sum(len(job.prompt) for job in self._waiting)
        return LoadReport(
            waiting=len(self._waiting),
            running=len(self._prefilling) + len(self._joining) + len(self._streams),
            tokens_to_prefill=left,
            blocks=self.pool.blocks,
            prices=self.speed.prices,
        )

    # --- inside ---

    def _begin_steps(self) -> None:
        joining, self._joining = self._joining, []
        for job in joining:
            self._stream(job)
        self._admit()
        lasting = self._streams[0][0] - self._served if self._streams else _ENDLESS
        if any(job.follows for job in self._waiting):
            lasting = min(lasting, 1)
        prompts = [(job.computed, len(job.prompt) - job.computed) for job in self._prefilling]
        if prompts or self._streams:
            speed, streams = self.speed, len(self._streams)
            self._spans.extend(plan_steps(speed, prompts, streams, self._context, lasting, self._now))

    def _compute(self, span: Span) -> list[Job]:
        """The prompts' part of a step that is over. Returns whose prompts are done."""
        for number, count in span.chunks:
            self._prefilling[number].computed += count
        if not span.chunks:
            return []
        prefilled = [job for job in self._prefilling if job.prefilled]
        if prefilled:
            self._prefilling = [job for job in self._prefilling if not job.prefilled]
        return prefilled

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
            job.computed = job.cached
            self._prefilling.append(job)

    def _follows(self, job: Job) -> bool:
        """Whether somebody here computes so much of its prompt that it waits; else it uses what is done."""
        lead = self._lead_of(job)
        job.follows = lead is not None and lead.worth_waiting(len(job.prompt))
        if lead is None or job.follows:
            return job.follows
        leader = self._prefilling[lead.leader]
        done = leader.computed // LAYOUT.block_tokens * LAYOUT.block_tokens
        if done > leader.cached:
            self._publish(leader, leader.prompt[:done])
        return False

    def _lead_of(self, job: Job) -> Lead | None:
        running = (Prefill(one.namespace, one.prompt, one.computed) for one in self._prefilling)
        return lead_of(job.namespace, job.prompt, running, LAYOUT.block_tokens)

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
        while self._streams and self._streams[0][0] <= self._served:
            job = heapq.heappop(self._streams)[2]
            self._context -= job.context
            self._publish(job, job.whole)
            ended.append(job)
        return ended


def ledger_of(job: Job) -> Ledger:
    """Where the prompt's KV came from."""
    counts = np.bincount(job.origins, minlength=len(Origin)) * LAYOUT.block_tokens
    local, peer, backflow = counts.tolist()
    return Ledger(len(job.prompt) - job.cached, local=local, peer=peer, backflow=backflow)
