"""The nixl backend: blocks written straight into a peer's registered memory over UCX (RDMA, NVLink, TCP).

Knows NIXL's agents, registrations and handles; how a transfer goes, ``sender`` and ``receiver`` know. NIXL
is an optional package that is imported here only. UCX neither authenticates nor encrypts, so this backend is
used only where it is asked for by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve._native import checksum_blocks
from memserve.core.errors import ConfigError, PeerLost, ProtocolError, TransferAborted
from memserve.core.messages import Hello
from memserve.mempool.arena import Arena
from memserve.mempool.transfer.backends import NIXL, Transmission
from memserve.mempool.transfer.plan import Step

INSTALL = "pip install --no-deps nixl-cu12"
"""Installs NIXL without torch, which its wheel asks for and which nothing here needs."""
log = logging.getLogger(__name__)

_PACKAGES = ("nixl_cu12", "nixl_cu13")
_UCX = "UCX"
_PROGRESS_MICROSECONDS = 1000
"""Between two looks of an idle receiving agent: with NIXL's default of 0 it keeps a core busy."""
_POLL_SECONDS = 20e-6
_MOST_POSTED = 2
"""Steps that NIXL has at once: one on its way, the next one ready."""
_DRAIN_SECONDS = 1.0
"""How long an interrupted transmission waits for what NIXL has already begun."""


Segments = Sequence[tuple[int, int]]


class _Offer(msgspec.Struct, frozen=True):
    """What ``Hello.nixl`` carries: how to reach an agent, and each segment: its address there, and blocks."""

    agent: str
    metadata: bytes
    segments: tuple[tuple[int, int], ...]


@functools.cache
def load_bindings() -> Any:
    """NIXL's binding module. Raises ``ConfigError``: which package is missing and how to install it."""
    # Both write to standard output otherwise, which belongs to the application.
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    reasons = []
    for package in _PACKAGES:
        try:
            return importlib.import_module(f"{package}._bindings")
        except ImportError as error:
            reasons.append(f"{package}: {error}")
    raise ConfigError(
        f"the transfer backend nixl needs the package nixl-cu12, which does not load ({'; '.join(reasons)}); "
        f"install it with: {INSTALL}"
    )


@functools.cache
def _errors() -> tuple[type[Exception], ...]:
    """NIXL's errors have no base class of their own."""
    bindings = load_bindings()
    return tuple(getattr(bindings, name) for name in dir(bindings) if name.endswith("Error"))


class Agent:
    """A NIXL agent with UCX, and the part of ``arena`` that it has registered.

    ``progress`` gives it a thread that serves peers; without it only calls from here move anything. May be
    used from several threads.
    """

    def __init__(self, name: str, arena: Arena, *, progress: bool) -> None:
        self.name = name
        self.closed = False
        self.after_close: list[Callable[[], None]] = []
        """What waits for this agent's end; for the event loop."""
        self._bindings = load_bindings()
        self._arena = arena
        self._registered: list[Any] = []
        self._lock = threading.Lock()
        config = self._bindings.nixlAgentConfig()
        config.useProgThread = progress
        config.pthrDelay = _PROGRESS_MICROSECONDS
        config.syncMode = self._bindings.NIXL_THREAD_SYNC_RW
        with _as_config_error("no agent can be created"):
            self._agent = self._bindings.nixlAgent(name, config)
            self._agent.createBackend(_UCX, {})
        self.cover()

    def cover(self) -> int:
        """Register what the arena has grown by; returns the number of segments. Raises ``ConfigError``."""
        with self._lock, _as_config_error("memory cannot be registered"):
            for base, blocks in _segments(self._arena)[len(self._registered) :]:
                memory = (base, blocks * self._arena.block_bytes, 0, "")
                descriptors = self._bindings.nixlRegDList(self._bindings.DRAM_SEG, [memory])
                self._agent.registerMem(descriptors, [])
                self._registered.append(descriptors)
            return len(self._registered)

    def offer(self) -> bytes:
        """What a peer needs to write here: ``Hello.nixl``. Empty once the agent has ended."""
        if self.closed:
            return b""
        segments = _segments(self._arena)[: self.cover()]
        return msgspec.msgpack.encode(_Offer(self.name, self._agent.getLocalMD(), tuple(segments)))

    # --- for writing to peers ---

    def learn(self, offer: _Offer) -> None:
        """Take up a peer's metadata and connect. Raises ``PeerLost``."""
        with _as_peer_lost("the peer's NIXL agent cannot be reached"):
            self._agent.loadRemoteMD(offer.metadata)
            self._agent.makeConnection(offer.agent, [])

    def forget(self, name: str) -> None:
        """Let go of a peer's agent and of the connection to it."""
        with contextlib.suppress(*_errors()):
            self._agent.invalidateRemoteMD(name)

    def prepare_own(self) -> int:
        """A descriptor list of the own blocks, numbered as in the arena."""
        segments = _segments(self._arena)[: self.cover()]
        with _as_config_error("the pool cannot be described"):
            return self._prepare(self._bindings.NIXL_INIT_AGENT, segments)

    def prepare_peer(self, name: str, segments: Segments) -> int:
        """The same of a peer's blocks. Raises ``PeerLost``."""
        with _as_peer_lost("the peer's pool cannot be described"):
            return self._prepare(name, segments)

    def release_list(self, prepared: int) -> None:
        with contextlib.suppress(*_errors()):
            self._agent.releasedDlistH(prepared)

    def post(self, own: int, own_at: NDArray[np.int32], peer: int, peer_at: NDArray[np.int32]) -> int:
        """Begin to write pieces ``own_at`` to ``peer_at`` (int32[n]); returns a handle. Raises ``PeerLost``.

        UCX may move all of it before this returns, and does so where processors copy.
        """
        with _as_peer_lost("blocks cannot be written"):
            handle: int = self._agent.makeXferReq(
                self._bindings.NIXL_WRITE, own, own_at, peer, peer_at, "", [], False
            )
            try:
                self._agent.postXferReq(handle, "")
            except BaseException:
                self.release(handle)
                raise
        return handle

    def arrived(self, handle: int) -> bool:
        """Whether all of it lies in the peer's memory. Raises ``PeerLost``."""
        with _as_peer_lost("blocks do not reach it"):
            return bool(self._agent.getXferStatus(handle) == self._bindings.NIXL_SUCCESS)

    def release(self, handle: int) -> None:
        """Forget a handle; one that is still under way is cancelled as far as UCX can."""
        with contextlib.suppress(*_errors()):
            self._agent.releaseXferReq(handle)

    def close(self) -> None:
        """Deregister and end all connections: from now on nothing is read or written through this agent."""
        with self._lock:
            for descriptors in self._registered:
                with contextlib.suppress(*_errors()):
                    self._agent.deregisterMem(descriptors, [])
            self._registered = []
            # The bindings have no call for it: the last reference ends the agent, its thread and connections.
            del self._agent
            self.closed = True

    def _prepare(self, name: str, segments: Segments) -> int:
        size = self._arena.block_bytes
        strided = np.array([(base, size, 0, size, blocks) for base, blocks in segments], np.uint64)
        prepared: int = self._agent.prepXferDlist(name, self._bindings.DRAM_SEG, strided, [])
        return prepared


@dataclass(frozen=True, slots=True)
class _Posted:
    """A step that NIXL has: its first block and blocks, and their checksums when computed."""

    handle: int
    first: int
    blocks: int
    checksums: Future[NDArray[np.uint64]]


class NixlSource:
    """The agent that writes this pool's blocks to peers, created when the first one is connected.

    ``hashers`` compute checksums while NIXL transmits. ``stall_seconds`` is how long a step may take.
    """

    def __init__(self, name: str, arena: Arena, hashers: Executor, stall_seconds: float) -> None:
        self._name = name
        self._arena = arena
        self._hashers = hashers
        self._stall_seconds = stall_seconds
        self._agent: Agent | None = None
        self._lock = threading.Lock()
        self._links: dict[str, NixlBackend] = {}

    def connect(self, hello: Hello) -> NixlBackend:
        """A way to the memory that ``hello`` offers. Blocks, so for a worker thread.

        Raises ``PeerLost``, ``ProtocolError``, ``ConfigError``.
        """
        offer = _read_offer(hello)
        with self._lock:
            # An agent knows each other agent once, so the previous link has to let go of it first.
            previous = self._links.pop(offer.agent, None)
            if previous is not None and not previous.let_go.wait(self._stall_seconds):
                raise PeerLost(f"the previous link to {hello.instance} has not ended yet; try again later")
            if self._agent is None:
                self._agent = Agent(_agent_name(self._name), self._arena, progress=False)
            agent = self._agent
            agent.learn(offer)
            try:
                link = NixlBackend(agent, self._arena, offer, self._hashers, self._stall_seconds)
            except BaseException:
                agent.forget(offer.agent)
                raise
            self._links[offer.agent] = link
            return link

    def close(self) -> None:
        """End all links and the agent. Blocks, so for a worker thread."""
        with self._lock:
            for link in self._links.values():
                link.close()
            for link in self._links.values():
                link.let_go.wait(self._stall_seconds)
            if self._agent is not None:
                self._agent.close()


class NixlBackend:
    """Writes into the segments of one peer, from a thread of its own."""

    name = NIXL

    def __init__(
        self, agent: Agent, own: Arena, peer: _Offer, hashers: Executor, stall_seconds: float
    ) -> None:
        self.workers = ThreadPoolExecutor(1, thread_name_prefix="memserve-nixl")
        self.let_go = threading.Event()
        """Set when nothing of this link is in use any more."""
        self._agent = agent
        self._own = own
        self._peer = peer
        self._hashers = hashers
        self._stall_seconds = stall_seconds
        self._interrupted = threading.Event()
        self._closing = False
        self._peer_list = agent.prepare_peer(peer.agent, peer.segments)
        self._peer_blocks = sum(blocks for _, blocks in peer.segments)
        self._own_list = agent.prepare_own()
        self._own_blocks = own.blocks

    def transmit(self, order: Transmission) -> NDArray[np.uint64]:
        checksums = [np.empty(0, np.uint64)]
        posted: deque[_Posted] = deque()
        first = 0
        try:
            for step in order.steps:
                if self._interrupted.is_set() or not order.may_go_on():
                    raise TransferAborted("the transmission was stopped half-way; nothing was published")
                posted.append(self._post(step, first))
                first += len(step.src)
                while posted and (len(posted) >= _MOST_POSTED or self._agent.arrived(posted[0].handle)):
                    checksums.append(self._finish(posted, order))
            while posted:
                checksums.append(self._finish(posted, order))
        finally:
            self._drain(posted)
        return np.concatenate(checksums)

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        self._interrupted.set()
        if not self._closing:
            self._closing = True
            self.workers.submit(self._let_go)
            self.workers.shutdown(wait=False)

    # --- in the link's thread ---

    def _post(self, step: Step, first: int) -> _Posted:
        if len(step.dst) and int(step.dst.max()) >= self._peer_blocks:
            raise PeerLost(f"{self._peer.agent} has grown since the handshake; connect again")
        if self._own.blocks != self._own_blocks:
            self._agent.release_list(self._own_list)
            self._own_list, self._own_blocks = self._agent.prepare_own(), self._own.blocks
        pointers, size = self._own.pointers(step.src), self._own.block_bytes
        checksums = self._hashers.submit(checksum_blocks, pointers, size)
        handle = self._agent.post(
            self._own_list, step.src.astype(np.int32), self._peer_list, step.dst.astype(np.int32)
        )
        return _Posted(handle, first, len(step.src), checksums)

    def _finish(self, posted: deque[_Posted], order: Transmission) -> NDArray[np.uint64]:
        """Wait for the oldest step and tell of it; of the last one tells the publication."""
        self._wait(posted[0].handle, self._stall_seconds)
        step = posted.popleft()
        self._agent.release(step.handle)
        if posted or step.first + step.blocks < sum(len(one.src) for one in order.steps):
            order.written(step.first, step.blocks)
        return step.checksums.result()

    def _wait(self, handle: int, seconds: float) -> None:
        """Raises ``PeerLost`` after ``seconds``, or soon after an interruption."""
        deadline = time.monotonic() + seconds
        while not self._agent.arrived(handle):
            now = time.monotonic()
            if self._interrupted.is_set():
                deadline = min(deadline, now + _DRAIN_SECONDS)
            if now >= deadline:
                raise PeerLost(f"{self._peer.agent} takes no blocks; nothing was published")
            time.sleep(_POLL_SECONDS)

    def _drain(self, posted: deque[_Posted]) -> None:
        """After a failure: have nothing under way, or raise ``PeerLost``, upon which the link ends."""
        with contextlib.ExitStack() as released:
            for step in posted:
                released.callback(self._agent.release, step.handle)
            for step in posted:
                self._wait(step.handle, _DRAIN_SECONDS)

    def _let_go(self) -> None:
        try:
            self._agent.release_list(self._peer_list)
            self._agent.release_list(self._own_list)
            self._agent.forget(self._peer.agent)
        finally:
            self.let_go.set()


class NixlTarget:
    """The agent through which peers write into ``arena``, and its replacement.

    Bytes of a peer that was lost in the middle of a transfer may still be on their way: in a socket's buffer
    or a network card. Only the end of the agent that they are addressed to keeps them from arriving, so it is
    replaced then, and ``on_replaced`` is told. Peers that know the old one have to shake hands again.
    """

    def __init__(self, name: str, arena: Arena, workers: Executor) -> None:
        self.on_replaced: Callable[[Agent], None] = lambda agent: None
        """Is told the agent that is about to end, in the event loop."""
        self._name = name
        self._arena = arena
        self._workers = workers
        self._agent = self._create()
        self._replacing: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def agent(self) -> Agent:
        """The one that is offered to peers now."""
        return self._agent

    async def settle(self) -> None:
        """Wait until no replacement is under way."""
        if self._replacing is not None:
            await asyncio.shield(self._replacing)

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
        await self.settle()
        await self._end(self._agent)

    async def _replace(self) -> None:
        while self._agent.after_close and not self._agent.closed:
            old = self._agent
            try:
                self._agent = await asyncio.get_running_loop().run_in_executor(self._workers, self._create)
            except ConfigError as error:
                log.error("no more blocks can come by nixl: %s", error)
            self.on_replaced(old)
            await self._end(old)
        self._replacing = None

    def _create(self) -> Agent:
        return Agent(_agent_name(self._name), self._arena, progress=True)

    async def _end(self, agent: Agent) -> None:
        if not agent.closed:
            await asyncio.get_running_loop().run_in_executor(self._workers, agent.close)
        waiting, agent.after_close = agent.after_close, []
        for then in waiting:
            then()


def _agent_name(pool: str) -> str:
    """Never used before: neither by an earlier life of the pool nor by an earlier agent of this one."""
    return f"{pool}/{secrets.token_hex(8)}"


def _read_offer(hello: Hello) -> _Offer:
    try:
        offer = msgspec.msgpack.decode(hello.nixl, type=_Offer)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"{hello.instance} describes its NIXL agent wrongly: {error}") from error
    return offer


def _segments(arena: Arena) -> Segments:
    """Where each segment begins, and its blocks."""
    counts = np.array(arena.segment_blocks, np.int64)
    bases = arena.pointers(np.cumsum(counts) - counts)
    return list(zip(bases.tolist(), counts.tolist(), strict=True))


@contextlib.contextmanager
def _as_config_error(what: str) -> Iterator[None]:
    try:
        yield
    except _errors() as error:
        raise ConfigError(f"transfer backend nixl: {what}: {error}") from error


@contextlib.contextmanager
def _as_peer_lost(what: str) -> Iterator[None]:
    try:
        yield
    except _errors() as error:
        raise PeerLost(f"{what}: {type(error).__name__} {error}") from error
