"""The nixl backend: blocks written straight into a peer's registered memory over UCX (RDMA, NVLink, TCP).

Knows which agents write where and when they must end; how a transfer goes, ``sender`` and ``receiver`` know.
UCX neither authenticates nor encrypts, so this backend is used only where it is asked for by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve._native import checksum_blocks
from memserve.core.errors import ConfigError, PeerLost, TransferAborted
from memserve.core.types import InstanceId
from memserve.mempool.arena import Arena
from memserve.mempool.segments import SegmentMap, runs_of
from memserve.mempool.transfer.backends import NIXL, Moved, Transmission
from memserve.mempool.transfer.nixl_agent import Agent, Pieces, read_offer
from memserve.mempool.transfer.plan import Step

log = logging.getLogger(__name__)

_NO_CHECKSUMS = np.empty(0, np.uint64)
_SHORTEST_PAUSE = 20e-6
_LONGEST_PAUSE = 320e-6
"""Between two looks at what NIXL has; looking all the time takes the processor from checksums."""
_MOST_POSTED = 2
"""Steps that NIXL has at once: one on its way, the next one ready."""
_DRAIN_SECONDS = 1.0
"""How long an interrupted transmission waits for what NIXL has already begun."""


class NixlSource:
    """The agent that writes this pool's blocks to peers, created when the first one is written to.

    ``hashers`` compute checksums while NIXL transmits. ``stall_seconds`` is how long a step may take.
    """

    def __init__(self, pool: InstanceId, arena: Arena, hashers: Executor, stall_seconds: float) -> None:
        self.arena = arena
        self.hashers = hashers
        self.stall_seconds = stall_seconds
        self._pool = pool
        self._agent: Agent | None = None
        self._lock = threading.Lock()
        self._links: dict[NixlBackend, Agent | None] = {}
        self._knowing: dict[str, NixlBackend] = {}

    def connect(self, peer: InstanceId) -> NixlBackend:
        """A way to ``peer``; where to write there, its answers to reservations say."""
        link = NixlBackend(self, peer)
        with self._lock:
            self._links[link] = None
        return link

    def agent_for(self, link: NixlBackend) -> Agent:
        """The agent by which ``link`` is to write now. Raises ``ConfigError``."""
        with self._lock:
            if self._agent is None or self._agent.stale:
                self._agent = Agent(self._pool, self.arena, progress=False)
            before, self._links[link] = self._links[link], self._agent
            self._close_unused(before)
            return self._agent

    def claim(self, peer_agent: str, link: NixlBackend) -> None:
        """Make ``link`` the only one that knows ``peer_agent``. Raises ``PeerLost``."""
        with self._lock:
            previous = self._knowing.get(peer_agent, link)
            self._knowing[peer_agent] = link
        # An agent knows each other agent once, so the link before this one has to let go of it first.
        if previous is not link and not previous.let_go.wait(self.stall_seconds):
            raise PeerLost("the link before this one has not ended yet; try again later")

    def leave(self, link: NixlBackend) -> None:
        """``link`` uses nothing any more."""
        with self._lock:
            before = self._links.pop(link, None)
            self._knowing = {agent: user for agent, user in self._knowing.items() if user is not link}
            self._close_unused(before)

    def close(self) -> None:
        """End all links and the agent. Blocks, so for a worker thread."""
        for link in list(self._links):
            link.close()
            if not link.let_go.wait(self.stall_seconds):
                log.error("a transmission by nixl does not end; its memory stays registered")
                return
        if self._agent is not None:
            self._agent.close()

    def _close_unused(self, agent: Agent | None) -> None:
        if agent is not None and agent is not self._agent and agent not in self._links.values():
            agent.close()


@dataclass(frozen=True, slots=True)
class _Posted:
    """A step that NIXL has: its first unit, and of how many units the receiver is to be told."""

    handle: int
    first: int
    untold: int


class NixlBackend:
    """Writes into the memory of one peer, from a thread of its own."""

    name = NIXL

    def __init__(self, source: NixlSource, peer: InstanceId) -> None:
        self.workers = ThreadPoolExecutor(1, thread_name_prefix="memserve-nixl")
        self.let_go = threading.Event()
        """Set when nothing of this link is in use any more."""
        self._source = source
        self._peer = peer
        self._agent: Agent | None = None
        self._told = b""
        self._peer_agent = ""
        self._there: SegmentMap | None = None
        self._interrupted = threading.Event()
        self._closing = threading.Lock()
        self._closed = False

    def transmit(self, order: Transmission) -> Moved:
        agent, there = self._reach(order.memory)
        checksums: list[Future[NDArray[np.uint64]]] = []
        posted: deque[_Posted] = deque()
        first, calls = order.first, 0
        try:
            for at, step in enumerate(order.steps):
                if self._interrupted.is_set() or not order.may_go_on():
                    raise TransferAborted("the transmission was stopped half-way; nothing was published")
                pieces = self._join(there, step, order.unit_bytes)
                checksums.append(self._checksum(step, order.unit_bytes))
                told_by_publication = order.last and at + 1 == len(order.steps)
                handle = agent.post(self._peer_agent, *pieces)
                posted.append(_Posted(handle, first, 0 if told_by_publication else len(step.src)))
                first += len(step.src)
                calls += len(pieces.sizes)
                while posted and (len(posted) >= _MOST_POSTED or agent.arrived(posted[0].handle)):
                    self._finish(agent, posted, order)
            while posted:
                self._finish(agent, posted, order)
        finally:
            self._drain(agent, posted)
            wait(checksums)
        return Moved(np.concatenate([_NO_CHECKSUMS, *(part.result() for part in checksums)]), calls)

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        self._interrupted.set()
        with self._closing:
            if not self._closed:
                self._closed = True
                self.workers.submit(self._let_go)
                self.workers.shutdown(wait=False)

    # --- in the link's thread ---

    def _reach(self, told: bytes) -> tuple[Agent, SegmentMap]:
        """The agent to write with, and where the peer's blocks are, according to what it has told."""
        agent = self._source.agent_for(self)
        if self._there is None or agent is not self._agent or told != self._told:
            offer = read_offer(told)
            if (agent, offer.agent) != (self._agent, self._peer_agent):
                self._forget()
            self._source.claim(offer.agent, self)
            agent.learn(offer)
            self._agent, self._peer_agent, self._told = agent, offer.agent, told
            own = self._source.arena
            firsts, blocks, bases = np.array(offer.segments, np.int64).T
            self._there = SegmentMap(firsts, blocks, bases, own.block_bytes, own.pieces)
        return agent, self._there

    def _join(self, there: SegmentMap, step: Step, size: int) -> Pieces:
        """The units of a step, those that touch on both sides as one. Raises ``PeerLost``."""
        here = self._source.arena.map
        at = there.segments_of(step.dst)
        if (step.dst - there.firsts[at] >= there.blocks[at]).any():
            raise PeerLost(f"blocks {step.dst[:8].tolist()} lie outside of what {self._peer} has registered")
        touching = here.touching(step.src, step.parts, size) & there.touching(step.dst, step.parts, size)
        starts, counts = runs_of(touching)
        parts = step.parts[starts]
        return Pieces(
            here.unit_pointers(step.src[starts], parts, size),
            there.unit_pointers(step.dst[starts], parts, size),
            counts * size,
        )

    def _checksum(self, step: Step, size: int) -> Future[NDArray[np.uint64]]:
        """In another thread, because UCX keeps this one busy where processors copy."""
        units = self._source.arena.map.unit_pointers(step.src, step.parts, size)
        return self._source.hashers.submit(checksum_blocks, units, size)

    def _finish(self, agent: Agent, posted: deque[_Posted], order: Transmission) -> None:
        """Wait for the oldest step and tell of it."""
        self._wait(agent, posted[0].handle, self._source.stall_seconds)
        step = posted.popleft()
        agent.release(step.handle)
        if step.untold:
            order.written(step.first, step.untold)

    def _wait(self, agent: Agent, handle: int, seconds: float) -> None:
        """Raises ``PeerLost`` after ``seconds``, or soon after an interruption."""
        deadline = time.monotonic() + seconds
        pause = _SHORTEST_PAUSE
        while not agent.arrived(handle):
            now = time.monotonic()
            if self._interrupted.is_set():
                deadline = min(deadline, now + _DRAIN_SECONDS)
            if now >= deadline:
                raise PeerLost(f"{self._peer} takes no blocks by nixl; nothing was published")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _drain(self, agent: Agent, posted: deque[_Posted]) -> None:
        """After a failure: have nothing under way, or raise ``PeerLost``, upon which the link ends."""
        with contextlib.ExitStack() as released:
            for step in posted:
                released.callback(agent.release, step.handle)
            for step in posted:
                self._wait(agent, step.handle, _DRAIN_SECONDS)

    def _forget(self) -> None:
        if self._agent is not None and not self._agent.closed:
            self._agent.forget(self._peer_agent)

    def _let_go(self) -> None:
        try:
            self._forget()
            self._source.leave(self)
        finally:
            self.let_go.set()


class NixlTarget:
    """The agent through which peers write into ``arena``, and its replacement.

    Bytes of a peer that was lost in the middle of a transfer may still be on their way: in a socket's buffer
    or a network card. Only the end of the agent that they are addressed to keeps them from arriving, so it is
    replaced then. Peers learn of the new one with their next reservation.
    """

    def __init__(self, pool: InstanceId, arena: Arena, workers: Executor) -> None:
        self._pool = pool
        self._arena = arena
        self._workers = workers
        self._agent = self._create()
        self._replacing: asyncio.Task[None] | None = None
        self._closing = False

    async def current(self) -> Agent:
        """The agent to write to now, once no replacement is under way. Raises ``ConfigError``."""
        if self._agent.stale and not self._agent.closed:
            self.call_when_silent(self._agent, lambda: None)
        if self._replacing is not None:
            await asyncio.shield(self._replacing)
        if self._agent.closed:
            raise ConfigError("the pool cannot be registered with NIXL any more; its log says why")
        return self._agent

    def call_when_silent(self, agent: Agent, then: Callable[[], None]) -> None:
        """End ``agent``, then call ``then``, in the event loop. Without it nothing arrives any more."""
        if agent.closed:
            then()
            return
        agent.after_close.append(then)
        if self._replacing is None and not self._closing:
            self._replacing = asyncio.get_running_loop().create_task(self._replace())

    async def close(self) -> None:
        """End the agent; whoever waits for that is called."""
        self._closing = True
        if self._replacing is not None:
            await self._replacing
        await self._end(self._agent)

    async def _replace(self) -> None:
        while self._agent.after_close and not self._agent.closed:
            old = self._agent
            try:
                self._agent = await asyncio.get_running_loop().run_in_executor(self._workers, self._create)
            except ConfigError as error:
                log.error("no more blocks can come by nixl: %s", error)
            await self._end(old)
        self._replacing = None

    def _create(self) -> Agent:
        return Agent(self._pool, self._arena, progress=True)

    async def _end(self, agent: Agent) -> None:
        await asyncio.get_running_loop().run_in_executor(self._workers, agent.close)
        waiting, agent.after_close = agent.after_close, []
        for then in waiting:
            then()
