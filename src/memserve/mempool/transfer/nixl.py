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
from memserve.mempool.address import BlockNumbers
from memserve.mempool.arena import Arena
from memserve.mempool.transfer.backends import NIXL, Transmission
from memserve.mempool.transfer.nixl_agent import Agent, Offer, Pointers, read_offer
from memserve.mempool.transfer.plan import Step

log = logging.getLogger(__name__)

_POLL_SECONDS = 20e-6
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
    """A step that NIXL has: its first block and blocks."""

    handle: int
    first: int
    blocks: int


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
        self._there: _PeerMemory | None = None
        self._interrupted = threading.Event()
        self._closing = False

    def transmit(self, order: Transmission) -> NDArray[np.uint64]:
        agent, there = self._reach(order.memory)
        checksums: list[Future[NDArray[np.uint64]]] = []
        posted: deque[_Posted] = deque()
        first = 0
        try:
            for step in order.steps:
                if self._interrupted.is_set() or not order.may_go_on():
                    raise TransferAborted("the transmission was stopped half-way; nothing was published")
                checksums.append(self._checksum(step))
                posted.append(self._post(agent, there, step, first))
                first += len(step.src)
                while posted and (len(posted) >= _MOST_POSTED or agent.arrived(posted[0].handle)):
                    self._finish(agent, posted, order)
            while posted:
                self._finish(agent, posted, order)
        finally:
            self._drain(agent, posted)
            wait(checksums)
        return np.concatenate([np.empty(0, np.uint64), *(part.result() for part in checksums)])

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        self._interrupted.set()
        if not self._closing:
            self._closing = True
            self.workers.submit(self._let_go)
            self.workers.shutdown(wait=False)

    # --- in the link's thread ---

    def _reach(self, told: bytes) -> tuple[Agent, _PeerMemory]:
        """The agent to write with, and the memory of which the peer has told."""
        agent = self._source.agent_for(self)
        if self._there is None or agent is not self._agent or told != self._told:
            offer = read_offer(told)
            if self._there is not None and (agent, offer.agent) != (self._agent, self._there.agent):
                self._forget()
            self._source.claim(offer.agent, self)
            agent.learn(offer)
            self._agent, self._told, self._there = agent, told, _PeerMemory(offer, self._source.arena)
        return agent, self._there

    def _checksum(self, step: Step) -> Future[NDArray[np.uint64]]:
        """In another thread, because UCX keeps this one busy where processors copy."""
        arena = self._source.arena
        return self._source.hashers.submit(checksum_blocks, arena.pointers(step.src), arena.block_bytes)

    def _post(self, agent: Agent, there: _PeerMemory, step: Step, first: int) -> _Posted:
        arena = self._source.arena
        sizes = np.full(len(step.src), arena.block_bytes, np.int64)
        handle = agent.post(there.agent, arena.pointers(step.src), there.pointers(step.dst), sizes)
        return _Posted(handle, first, len(step.src))

    def _finish(self, agent: Agent, posted: deque[_Posted], order: Transmission) -> None:
        """Wait for the oldest step and tell of it; of the last one tells the publication."""
        self._wait(agent, posted[0].handle, self._source.stall_seconds)
        step = posted.popleft()
        agent.release(step.handle)
        if posted or step.first + step.blocks < sum(len(one.src) for one in order.steps):
            order.written(step.first, step.blocks)

    def _wait(self, agent: Agent, handle: int, seconds: float) -> None:
        """Raises ``PeerLost`` after ``seconds``, or soon after an interruption."""
        deadline = time.monotonic() + seconds
        while not agent.arrived(handle):
            now = time.monotonic()
            if self._interrupted.is_set():
                deadline = min(deadline, now + _DRAIN_SECONDS)
            if now >= deadline:
                raise PeerLost(f"{self._peer} takes no blocks by nixl; nothing was published")
            time.sleep(_POLL_SECONDS)

    def _drain(self, agent: Agent, posted: deque[_Posted]) -> None:
        """After a failure: have nothing under way, or raise ``PeerLost``, upon which the link ends."""
        with contextlib.ExitStack() as released:
            for step in posted:
                released.callback(agent.release, step.handle)
            for step in posted:
                self._wait(agent, step.handle, _DRAIN_SECONDS)

    def _forget(self) -> None:
        if self._agent is not None and self._there is not None and not self._agent.closed:
            self._agent.forget(self._there.agent)

    def _let_go(self) -> None:
        try:
            self._forget()
            self._source.leave(self)
        finally:
            self.let_go.set()


class _PeerMemory:
    """Where a peer's blocks lie in its process."""

    def __init__(self, offer: Offer, own: Arena) -> None:
        self.agent = offer.agent
        self._block_bytes = own.block_bytes
        self._firsts, self._blocks, self._bases = np.array(offer.segments, np.int64).T

    def pointers(self, numbers: BlockNumbers) -> Pointers:
        """Addresses of blocks: uint64[n]. Raises ``PeerLost`` for one that the peer has not offered."""
        at = np.searchsorted(self._firsts, numbers, side="right") - 1
        within = numbers - self._firsts[at]
        if (within >= self._blocks[at]).any():
            raise PeerLost(f"blocks {numbers[:8].tolist()} lie outside of what the peer has registered")
        pointers: NDArray[np.int64] = within * self._block_bytes + self._bases[at]
        return pointers.view(np.uint64)


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
