"""What ``MemPool.match`` returns: a cached prefix under a lease."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from memserve.core.errors import LeaseExpired
from memserve.mempool.address import Addresses


class Match:
    """The longest cached prefix of a prompt; its blocks stay until :meth:`release`.

    ``tokens`` is how many matched, ``origins`` uint8[blocks] where each block's KV came from (see
    :class:`~memserve.mempool.address.Origin`). A context manager: leaving it releases what was not detached.
    """

    __slots__ = ("_addrs", "_on_end", "_why_ended", "deadline", "origins", "tokens")

    def __init__(
        self,
        addrs: Addresses,
        origins: NDArray[np.uint8],
        tokens: int,
        deadline: float | None,
        on_end: Callable[[Match, bool], None],
    ) -> None:
        self.tokens = tokens
        self.origins = origins
        self.deadline = deadline
        self._addrs = addrs
        self._on_end = on_end
        self._why_ended = ""

    @property
    def addrs(self) -> Addresses:
        """The blocks, in order. Raises ``LeaseExpired`` once the lease has ended."""
        if self._why_ended:
            raise LeaseExpired(f"the lease on {len(self._addrs)} blocks has ended: {self._why_ended}")
        return self._addrs

    @property
    def tiers(self) -> NDArray[np.uint8]:
        """Where each block lies (see :class:`~memserve.mempool.address.Tier`): uint8[blocks]."""
        return self._addrs.tiers

    @property
    def active(self) -> bool:
        """Whether the lease still holds."""
        return not self._why_ended

    def release(self, why: str = "released") -> None:
        """Let go of the blocks; they stay cached. Repeating it is harmless."""
        if not self._why_ended:
            self._why_ended = why
            self._on_end(self, True)

    def detach(self) -> Addresses:
        """Hand the lease's references over to the caller, to be ended with ``free_mem``."""
        addrs = self.addrs
        self._why_ended = "detached"
        self._on_end(self, False)
        return addrs

    def __enter__(self) -> Match:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
