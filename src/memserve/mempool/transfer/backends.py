"""Ways of moving blocks to a peer, and which of them two pools use with each other. No I/O here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import ConfigError, PeerLost
from memserve.core.messages import Hello
from memserve.mempool.transfer.plan import Step

SHM = "shm"
NIXL = "nixl"
TCP = "tcp"
BACKENDS = (SHM, NIXL, TCP)
"""All that there are, in the order in which they are worth preferring."""
DEFAULT_BACKENDS = (SHM, TCP)
"""Without ``nixl``, which needs a package of its own and a network that can be trusted."""


@dataclass(frozen=True, slots=True)
class Transmission:
    """What to move of one transfer, which the receiver knows as ``ticket``: ``steps``, in order.

    A unit has ``unit_bytes`` bytes; the first one here is unit number ``first`` of the transfer.
    ``may_go_on`` is asked before each step. ``written(first, units)`` tells the receiver of units that lie
    in its memory; a backend whose receiver sees that by itself does not call it.
    """

    ticket: int
    steps: Sequence[Step]
    unit_bytes: int
    first: int
    last: bool
    """Whether these are the transfer's last steps: the publication, which comes at once, tells of the end."""
    may_go_on: Callable[[], bool]
    written: Callable[[int, int], None]
    memory: bytes = b""
    """How to write to the receiver's memory, where the network does that: what its ``Reserved`` says."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The checksum of each unit as it was read here, uint64[n], and in how many pieces the bytes went.

    A piece is what touches on every side that the backend writes to or reads from: units are joined to it.
    """

    checksums: NDArray[np.uint64]
    calls: int


class TransferBackend(Protocol):
    """Moves blocks to one peer. ``transmit`` runs in a thread of ``workers``, all else in the event loop."""

    name: str

    @property
    def workers(self) -> Executor:
        """Where ``transmit`` is to run."""

    def transmit(self, order: Transmission) -> Moved:
        """Move all steps, in order. Several calls for one transfer come one after the other.

        Raises ``TransferAborted`` when told to stop, ``PeerLost`` when the way to the peer is cut.
        """

    def interrupt(self) -> None:
        """Have a transmission under way end soon; the link is not used any more."""

    def close(self) -> None:
        """Let go of everything; nothing is under way."""


def require_known(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless all are names of backends, and at least one is given."""
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ConfigError(f"transfer backends {list(names)}: choose from {', '.join(BACKENDS)}")


def choose_backend(wanted: Sequence[str], own: Hello, peer: Hello) -> str:
    """The first of ``wanted`` by which ``peer`` can receive from here. Raises ``PeerLost``: why none."""
    same_host = own.host == peer.host
    for name in wanted:
        if name in peer.backends and (name != SHM or same_host):
            return name
    where = "on this host" if same_host else "on another host (shm does not reach it)"
    raise PeerLost(
        f"no way to move blocks to {peer.instance}, which is {where}: here {', '.join(wanted)} are allowed, "
        f"there {', '.join(peer.backends) or 'none'}; tcp needs a cluster key on both sides"
    )
