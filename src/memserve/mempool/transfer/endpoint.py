"""A pool's place on the wire: listens for peers, shakes hands with them, sends blocks to them.

Knows who lives and which connection leads to whom; ``sender`` and ``receiver`` know how a transfer goes.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from memserve.core.clock import Clock
from memserve.core.errors import CorruptBlock, InvalidRequest, PeerLost, ProtocolError, StaleAddress
from memserve.core.messages import Hello, Member, PeerMessage
from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.mempool.address import Addresses, Origin, Tier
from memserve.mempool.arena import Arena
from memserve.mempool.layer_gate import LayerGate
from memserve.mempool.modes import TransferMode, cut_blocks
from memserve.mempool.pool import MemPool
from memserve.mempool.results import Freed, Transferred
from memserve.mempool.transfer.backends import (
    DEFAULT_BACKENDS,
    NIXL,
    SHM,
    TCP,
    TransferBackend,
    choose_backend,
    require_known,
)
from memserve.mempool.transfer.nixl import NixlSource, NixlTarget
from memserve.mempool.transfer.nixl_agent import load_bindings
from memserve.mempool.transfer.receiver import Adopt, Receiver, require_same_layout
from memserve.mempool.transfer.sender import LinkState, OutboundLink, SendLimits, SendOrder
from memserve.mempool.transfer.shm import DescriptorServer, SharedMemoryBackend, receive_arena
from memserve.mempool.transfer.streams import StreamListener
from memserve.mempool.transfer.tcp import connect_stream
from memserve.mempool.transport import Attachment
from memserve.wire import Security, connect, listen, listening_address
from memserve.wire.address import UnixAddress, parse_address

_NO_TOKENS = np.empty(0, np.int32)
_NO_NAMESPACE = Namespace(model="")
_WORKERS = 2
_LOOPBACK = "127.0.0.1"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK_NAMESPACE = Path("/proc/self/ns/net")


class TransferEndpoint:
    """Connects ``pool`` to other pools, and attaches itself to it.

    ``reserve_seconds`` is how long a receiver keeps blocks for a transfer without progress, ``call_seconds``
    how long a peer may take to answer and a stream may stand still. ``link_bytes`` bounds the bytes on their
    way to one peer. ``backends`` are the allowed ways of moving blocks, the preferred first; ``tcp`` (and
    any TCP address) needs ``security``; ``nixl`` needs its package (``ConfigError`` without) and a network
    that can be trusted. ``observe`` is told each step of a sent transfer: ``reserved``, ``copying`` (in a
    worker thread, once per few megabytes), ``copied``, ``published``.
    """

    def __init__(
        self,
        pool: MemPool,
        clock: Clock,
        *,
        reserve_seconds: float = 30.0,
        call_seconds: float = 10.0,
        link_bytes: int = 256 << 20,
        backends: Sequence[str] = DEFAULT_BACKENDS,
        security: Security | None = None,
        observe: Callable[[str], None] | None = None,
    ) -> None:
        self.on_adopt: Adopt | None = None
        """Takes over the blocks of transfers to here that come with an attachment."""
        require_known(backends)
        if NIXL in backends:
            load_bindings()
        self.address = ""
        """Where peers reach this pool, once it listens: what ``Member.peer_address`` says."""
        self._pool = pool
        self._clock = clock
        self._limits = SendLimits(reserve_seconds, call_seconds, link_bytes)
        self._backends = tuple(name for name in backends if name != TCP or security is not None)
        self._security = security
        self._observe = observe or (lambda step: None)
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="memserve-copy")
        self._nixl = NixlSource(pool.instance, pool.arena, self._workers, call_seconds)
        self._members: dict[InstanceId, Member] = {}
        self._links: dict[InstanceId, OutboundLink] = {}
        self._connecting: dict[InstanceId, asyncio.Lock] = {}
        self._numbers = itertools.count(1)
        self._hello = _hello_of(pool)
        self._receiver = Receiver(pool, clock, self._workers, self._adopt)
        self._server: asyncio.Server | None = None
        self._descriptors: DescriptorServer | None = None
        pool.attach(self)

    async def start(self, address: str) -> None:
        """Listen for peers at ``address``: ``@name`` or ``tcp://host:port`` (port 0: see ``address`` then).

        Raises ``ConfigError`` for TCP without a key, or beyond loopback without TLS; ``OSError``.
        """
        assert self._server is None, "an endpoint is started once"
        if SHM in self._backends:
            fd_address = f"@memserve-arena-{secrets.token_hex(8)}"
            self._descriptors = DescriptorServer(fd_address, self._pool.arena, self._pool.incarnation)
        if TCP in self._backends:
            place = parse_address(address)
            host = _LOOPBACK if isinstance(place, UnixAddress) else place.host
            self._receiver.streams = StreamListener(host, self._security, self._limits.call_seconds)
        if NIXL in self._backends:
            self._receiver.nixl = await asyncio.get_running_loop().run_in_executor(
                self._workers, NixlTarget, self._pool.instance, self._pool.arena, self._workers
            )
        self._hello = msgspec.structs.replace(
            self._hello,
            backends=self._backends,
            fd_address="" if self._descriptors is None else self._descriptors.address,
            tcp_port=0 if self._receiver.streams is None else self._receiver.streams.port,
        )
        self._receiver.hello = self._hello
        self._server = await listen(address, PeerMessage, self._receiver.accept, self._security)
        self.address = listening_address(self._server, address)

    async def close(self) -> None:
        """Stop copying, end all connections, free what peers had reserved."""
        for link in list(self._links.values()):
            link.close("the pool is closing")
        if self._server is not None:
            self._server.close()
        if self._descriptors is not None:
            self._descriptors.close()
        await self._receiver.close()
        await asyncio.get_running_loop().run_in_executor(None, self._nixl.close)
        await asyncio.get_running_loop().run_in_executor(None, self._workers.shutdown)

    # --- peers ---

    async def connect(self, member: Member) -> None:
        """Shake hands with a pool now; otherwise the first transfer does.

        Raises ``PeerLost``, ``LayoutMismatch``, or ``StaleAddress`` when another life of the peer answers.
        """
        self._members[member.instance] = member
        await self._link(member.instance)

    def set_peers(self, members: tuple[Member, ...]) -> None:
        """All other pools that live. Who is missing is dead: its reservations here are freed."""
        living = {member.instance: member for member in members}
        for instance, member in self._members.items():
            now = living.get(instance)
            if now is None or now.incarnation != member.incarnation:
                self.drop_peer(instance, f"{instance} has left the cluster")
        self._members = living

    def drop_peer(self, instance: InstanceId, reason: str) -> None:
        """A death notice: end both connections with ``instance`` and free what it had reserved.

        Its process must be gone: a living one could still write to blocks that are used again.
        """
        link = self._links.pop(instance, None)
        if link is not None:
            link.close(reason)
        self._receiver.drop_peer(instance, reason)

    def links(self) -> tuple[LinkState, ...]:
        """The links to peers that are up, as they are now."""
        states = (link.state for link in self._links.values())
        return tuple(state for state in states if state is not None)

    # --- transfers ---

    async def transfer(
        self,
        peer: InstanceId,
        src: Addresses,
        *,
        attachment: Attachment = b"",
        mode: TransferMode | None = None,
        ready: LayerGate | None = None,
        dst: Addresses | None = None,
    ) -> Transferred:
        """See ``MemPool.transfer``."""
        if not attachment and dst is None:
            raise InvalidRequest("without dst or attachment nobody would hold the copies", field="attachment")
        order = SendOrder(_NO_TOKENS, src, _NO_NAMESPACE, Origin.PEER, attachment, mode, ready, dst)
        return await self._send(peer, order)

    async def transfer_with_insert(
        self,
        peer: InstanceId,
        tokens: Tokens,
        src: Addresses,
        namespace: Namespace,
        *,
        origin: Origin = Origin.PEER,
        attachment: Attachment = b"",
        mode: TransferMode | None = None,
        ready: LayerGate | None = None,
        dst: Addresses | None = None,
    ) -> Transferred:
        """See ``MemPool.transfer_with_insert``."""
        layout = self._pool.layout
        wanted = layout.blocks_for(len(tokens)) if attachment else len(tokens) // layout.block_tokens
        if len(src) < wanted:
            raise InvalidRequest(f"{len(src)} addresses for {wanted} blocks of tokens", field="src")
        there = None if dst is None else dst[:wanted]
        order = SendOrder(tokens, src[:wanted], namespace, origin, attachment, mode, ready, there)
        return await self._send(peer, order)

    # --- a peer's memory ---

    async def allocate(self, peer: InstanceId, n: int, tier: Tier, seconds: float) -> Addresses:
        """See ``MemPool.alloc_peer_mem``."""
        link = await self._link(peer)
        return await link.allocate(self._next_transfer(), n, tier, seconds)

    async def give_back(self, addrs: Addresses) -> Freed:
        """See ``MemPool.free_peer_mem``."""
        member = self._members.get(addrs.instance)
        if member is None or member.incarnation != addrs.incarnation:
            # What was lent by a life that has ended went with it.
            return Freed(0, len(addrs))
        return await (await self._link(addrs.instance)).give_back(addrs)

    # --- inside ---

    async def _send(self, peer: InstanceId, order: SendOrder) -> Transferred:
        if order.mode is not None:
            cut_blocks(self._pool.layout, order.mode)
        if order.dst is not None and len(order.dst) != len(order.src):
            raise InvalidRequest(f"{len(order.dst)} addresses for {len(order.src)} blocks", field="dst")
        if not len(order.src):
            return Transferred(0, 0, 0, 0, order.mode or TransferMode.BY_REQUEST, "")
        self._pool.retain(order.src)
        try:
            link = await self._link(peer)
            try:
                done = await link.send(self._next_transfer(), order)
            except CorruptBlock:
                done = await link.send(self._next_transfer(), order)
        finally:
            self._pool.free_mem(order.src)
        self._pool.count_sent(peer, done)
        return done

    def _next_transfer(self) -> str:
        return f"{self._pool.instance}/{self._pool.incarnation}/{next(self._numbers)}"

    async def _link(self, peer: InstanceId) -> OutboundLink:
        async with self._connecting.setdefault(peer, asyncio.Lock()):
            link = self._links.get(peer)
            if link is None or link.closed:
                link = self._links[peer] = await self._shake_hands(peer)
            return link

    async def _shake_hands(self, peer: InstanceId) -> OutboundLink:
        member = self._members.get(peer)
        if member is None:
            raise PeerLost(f"{peer} is not a living member of the cluster")
        timeout = self._limits.call_seconds
        link = OutboundLink(self._pool.layout, self._clock, self._limits, self._observe)
        connection = await connect(member.peer_address, PeerMessage, link, timeout, self._security)
        connection.label = peer
        try:
            hello = await connection.call(self._hello, timeout)
            self._require_usable(hello, member)
            backend = await asyncio.get_running_loop().run_in_executor(
                self._workers, self._open_backend, member.peer_address, hello
            )
        except BaseException:
            connection.close("the handshake failed")
            raise
        link.open(connection, hello, backend)
        return link

    def _open_backend(self, peer_address: str, hello: Hello) -> TransferBackend:
        own, timeout = self._pool.arena, self._limits.call_seconds
        chosen = choose_backend(self._backends, self._hello, hello)
        if chosen == TCP:
            return connect_stream(own, peer_address, hello, self._security, timeout)
        if chosen == NIXL:
            return self._nixl.connect(hello.instance)
        extend = functools.partial(receive_arena, hello, timeout=timeout)
        unmapped = Arena(own.block_bytes, own.pieces)
        return SharedMemoryBackend(own, extend(unmapped), self._workers, extend)

    def _require_usable(self, hello: Hello, member: Member) -> None:
        if not isinstance(hello, Hello):
            raise ProtocolError(f"{member.instance} answered {type(hello).__name__} to Hello")
        require_same_layout(self._hello, hello)
        if (hello.instance, hello.incarnation) != (member.instance, member.incarnation):
            raise StaleAddress(
                f"{member.peer_address} is {hello.instance} (incarnation {hello.incarnation}), not "
                f"{member.instance} (incarnation {member.incarnation})"
            )

    def _adopt(self, attachment: bytes, addrs: Addresses) -> None:
        if self.on_adopt is None:
            raise InvalidRequest(f"{self._pool.instance} does not take over attachments", field="attachment")
        self.on_adopt(attachment, addrs)


def _hello_of(pool: MemPool) -> Hello:
    """What is known before listening."""
    layout = pool.layout
    return Hello(pool.instance, pool.incarnation, layout.fingerprint, layout.text, _host(), "")


def _host() -> str:
    """Equal for processes that reach each other's shared memory: one kernel, network namespace and user."""
    boot = _BOOT_ID.read_text().strip()
    return f"{boot}/{_NETWORK_NAMESPACE.stat().st_ino}/{os.getuid()}"
