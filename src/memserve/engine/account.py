"""Where the KV of a prompt came from, block by block, exact also for a request that was preempted. Pure."""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import NDArray

from memserve.core.types import Ledger
from memserve.mempool.address import Origin, Tier


class Source(enum.IntEnum):
    """Values and order are those of the ledger's fields; ``OPEN`` is neither found nor computed so far."""

    OPEN = -1
    COMPUTED = 0
    LOCAL = 1
    HOST = 2
    DISK = 3
    PEER = 4
    BACKFLOW = 5


_BY_ORIGIN = np.zeros(len(Origin), np.int8)
_BY_ORIGIN[[Origin.COMPUTED, Origin.PEER, Origin.BACKFLOW]] = [Source.LOCAL, Source.PEER, Source.BACKFLOW]
_BY_TIER = np.zeros(len(Tier), np.int8)
_BY_TIER[[Tier.HOST, Tier.DISK]] = [Source.HOST, Source.DISK]


class PromptAccount:
    """The sources of a prompt of ``length`` tokens, until its first token is sampled.

    What the request has computed itself stays computed, also when it finds it cached after a preemption.
    """

    __slots__ = ("_block_tokens", "_length", "_sources")

    def __init__(self, length: int, block_tokens: int) -> None:
        self._length = length
        self._block_tokens = block_tokens
        self._sources = np.full(length // block_tokens, Source.OPEN, np.int8)

    @property
    def cached_blocks(self) -> int:
        """Blocks that were found and not computed here."""
        return int(np.count_nonzero(self._sources > Source.COMPUTED))

    def find(self, origins: NDArray[np.uint8], tiers: NDArray[np.uint8]) -> None:
        """The first blocks are used as found: uint8[n] each, who computed them and where they lay."""
        found = np.where(tiers == Tier.DEVICE, _BY_ORIGIN[origins], _BY_TIER[tiers])
        used, beyond = self._sources[: len(found)], self._sources[len(found) :]
        used[:] = np.where(used == Source.COMPUTED, used, found)
        beyond[beyond != Source.COMPUTED] = Source.OPEN

    def lose(self, computed: int) -> None:
        """The request was preempted when the KV of ``computed`` tokens was there."""
        done = self._sources[: computed // self._block_tokens]
        done[done == Source.OPEN] = Source.COMPUTED

    def ledger(self) -> Ledger:
        """All of it, once nothing is open any more but what has just been computed."""
        cached = self._sources[self._sources > Source.COMPUTED]
        tokens = (np.bincount(cached, minlength=len(Source) - 1) * self._block_tokens).tolist()
        return Ledger(self._length - sum(tokens), *tokens[Source.LOCAL :])
