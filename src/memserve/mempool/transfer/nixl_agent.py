"""NIXL's binding module, imported here only, and an agent with the memory that it has registered.

Knows addresses, descriptors and handles; neither blocks of peers nor transfers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import ConfigError, PeerLost, ProtocolError
from memserve.mempool.arena import Arena

INSTALL = "pip install --no-deps nixl-cu12"
"""Installs NIXL without torch, which its wheel asks for and which nothing here needs."""
_PACKAGES = ("nixl_cu12", "nixl_cu13")
_UCX = "UCX"
_PROGRESS_MICROSECONDS = 1000
"""Between two looks of an idle agent's thread; with NIXL's default of 0 it keeps a core busy."""

Pointers = NDArray[np.uint64]


class Pieces(NamedTuple):
    """Contiguous memory on both sides: addresses uint64[n] here and in the peer's process, bytes int64[n]."""

    own: Pointers
    there: Pointers
    sizes: NDArray[np.int64]


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
            reasons.append(str(error))
    raise ConfigError(
        f"the transfer backend nixl needs the package nixl-cu12, which does not load ({'; '.join(reasons)}); "
        f"install it with: {INSTALL}"
    )


@functools.cache
def _errors() -> tuple[type[Exception], ...]:
    """NIXL's errors have no base class of their own."""
    bindings = load_bindings()
    return tuple(getattr(bindings, name) for name in dir(bindings) if name.endswith("Error"))


class Offer(msgspec.Struct, frozen=True):
    """What a peer needs to write into a pool, opaque to the messages that carry it.

    ``segments``: first block, blocks and address (in its process) of each.
    """

    agent: str
    metadata: bytes
    segments: tuple[tuple[int, int, int], ...]


def read_offer(raw: bytes) -> Offer:
    """Raises ``ProtocolError``."""
    try:
        return msgspec.msgpack.decode(raw, type=Offer)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"a peer describes its NIXL agent wrongly: {error}") from error


class Agent:
    """A NIXL agent with UCX that has registered ``arena``, under a name that was never used before.

    ``progress`` gives it a thread that serves peers. Without it only calls from here move anything, which is
    half the work for an agent that only writes. May be used from several threads.
    """

    def __init__(self, pool: str, arena: Arena, *, progress: bool) -> None:
        # Neither an earlier life of the pool nor an earlier agent of this one can be mistaken for it.
        self.name = f"{pool}/{secrets.token_hex(8)}"
        self.closed = False
        self.after_close: list[Callable[[], None]] = []
        """What waits for this agent's end; for the event loop."""
        self._bindings = load_bindings()
        self._arena = arena
        self._reused = arena.reused
        self._registered: list[Any] = []
        self._offer = b""
        self._lock = threading.Lock()
        config = self._bindings.nixlAgentConfig()
        config.useProgThread = progress
        config.pthrDelay = _PROGRESS_MICROSECONDS
        config.syncMode = self._bindings.NIXL_THREAD_SYNC_RW
        with _as_config_error("no agent can be created"):
            self._agent = self._bindings.nixlAgent(self.name, config)
            self._agent.createBackend(_UCX, {})
        self._cover()

    @property
    def stale(self) -> bool:
        """Whether a network card may hold on to pages that blocks do not consist of any more."""
        return self._reused != self._arena.reused

    def offer(self) -> bytes:
        """An ``Offer`` of all memory that the arena has now. Raises ``ConfigError``."""
        if self._cover() or not self._offer:
            segments = tuple(_segments(self._arena)[: len(self._registered)])
            self._offer = msgspec.msgpack.encode(Offer(self.name, self._agent.getLocalMD(), segments))
        return self._offer

    def learn(self, offer: Offer) -> None:
        """Take up a peer's metadata, for the first time or when it has grown. Raises ``PeerLost``."""
        with _as_peer_lost("the peer's NIXL agent cannot be reached"):
            self._agent.loadRemoteMD(offer.metadata)
            self._agent.makeConnection(offer.agent, [])

    def forget(self, peer: str) -> None:
        """Let go of a peer's agent and of the connection to it."""
        with contextlib.suppress(*_errors()):
            self._agent.invalidateRemoteMD(peer)

    def post(self, peer: str, own: Pointers, there: Pointers, sizes: NDArray[np.int64]) -> int:
        """Begin to write ``Pieces`` of memory to ``peer``; returns a handle.

        UCX may move all of it before this returns, and does so where processors copy. Raises ``PeerLost``.
        """
        self._cover()
        kind, descriptors = self._bindings.DRAM_SEG, self._bindings.nixlXferDList
        with _as_peer_lost("blocks cannot be written"):
            handle: int = self._agent.createXferReq(
                self._bindings.NIXL_WRITE,
                descriptors(kind, _rows(own, sizes)),
                descriptors(kind, _rows(there, sizes)),
                peer,
            )
            try:
                self._agent.postXferReq(handle)
            except BaseException:
                self.release(handle)
                raise
        return handle

    def arrived(self, handle: int) -> bool:
        """Whether all of it lies in the peer's memory. Raises ``PeerLost``."""
        with _as_peer_lost("blocks do not reach it"):
            return bool(self._agent.getXferStatus(handle) == self._bindings.NIXL_SUCCESS)

    def release(self, handle: int) -> None:
        """Forget a handle; what is still under way is cancelled as far as UCX can."""
        with contextlib.suppress(*_errors()):
            self._agent.releaseXferReq(handle)

    def close(self) -> None:
        """Deregister and end all connections: from now on nothing is read or written through this agent."""
        with self._lock:
            if self.closed:
                return
            for descriptors in self._registered:
                with contextlib.suppress(*_errors()):
                    self._agent.deregisterMem(descriptors, [])
            # The bindings have no call for it: the last reference ends the agent, its thread and connections.
            del self._agent
            self.closed = True

    def _cover(self) -> bool:
        """Register what the arena has grown by; whether there was anything. Raises ``ConfigError``."""
        with self._lock, _as_config_error("memory cannot be registered"):
            new = _segments(self._arena)[len(self._registered) :]
            for _, blocks, base in new:
                memory = (base, blocks * self._arena.block_bytes, 0, "")
                descriptors = self._bindings.nixlRegDList(self._bindings.DRAM_SEG, [memory])
                self._agent.registerMem(descriptors, [])
                self._registered.append(descriptors)
            return bool(new)


def _segments(arena: Arena) -> list[tuple[int, int, int]]:
    """First block, blocks and address of each segment."""
    places = arena.map
    return list(zip(places.firsts.tolist(), places.blocks.tolist(), places.bases.tolist(), strict=True))


def _rows(pointers: Pointers, sizes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Descriptors as NIXL takes them: address, bytes, device."""
    rows = np.zeros((len(pointers), 3), np.uint64)
    rows[:, 0], rows[:, 1] = pointers, sizes
    return rows


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
