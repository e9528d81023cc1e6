"""The disk tier as the pool sees it: block numbers and prompts here, places and records there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from memserve.core.types import Namespace, Tokens, pack_tokens, unpack_tokens
from memserve.mempool.address import BlockNumbers
from memserve.mempool.arena import Arena, Extent
from memserve.mempool.disk import DiskStore
from memserve.mempool.disk_record import Record, chain_keys
from memserve.mempool.layout import KVLayout
from memserve.mempool.orphans import Orphan, Orphans


class DiskShelf:
    """The disk blocks of a pool, filled from and read into ``arena``. Place i holds block ``numbers[i]``."""

    def __init__(self, store: DiskStore, layout: KVLayout, arena: Arena, numbers: BlockNumbers) -> None:
        self.orphans = Orphans()
        self._store = store
        self._layout = layout
        self._arena = arena
        self._numbers = numbers
        for place, record in store.scan():
            doubled = self.orphans.add(place, record)
            if doubled is not None:
                store.erase([doubled])

    @property
    def orphaned(self) -> BlockNumbers:
        """Free blocks that hold something which may become reachable: int64[n]."""
        return self._numbers[self.orphans.places]

    def close(self) -> None:
        self._store.close()

    def grow(self, extent: Extent) -> None:
        """Add places for blocks numbered higher than all before. Raises ``ConfigError``."""
        self._store.grow(extent.blocks)
        added = np.arange(extent.first, extent.first + extent.blocks, dtype=np.int64)
        self._numbers = np.concatenate((self._numbers, added))

    def give_back(self, blocks: BlockNumbers) -> None:
        """These blocks are not used any more: free their space. What was orphaned there is gone."""
        self.take(blocks)
        self._store.give_back(self._places(blocks))

    def write(
        self,
        blocks: BlockNumbers,
        sources: BlockNumbers,
        origins: NDArray[np.uint8],
        namespace: Namespace,
        path: Tokens,
    ) -> bool:
        """Store memory blocks ``sources``, which hold the last blocks of ``path``, in disk ``blocks``.

        All or none: False when the disk refuses.
        """
        self.take(blocks)
        step = self._layout.block_tokens
        keys = chain_keys(self._layout.fingerprint, namespace, path, step)
        depth = len(keys) - 1 - len(blocks)
        for at, (place, source) in enumerate(zip(self._places(blocks), sources.tolist(), strict=True)):
            tokens = pack_tokens(path[(depth + at) * step : (depth + at + 1) * step])
            record = Record(namespace, keys[depth + at], tokens, int(origins[at]), 0, 0)
            # On disk a block is one piece; only where it is not so in memory is this a copy.
            kv = self._arena.block_memory(source).reshape(-1)
            if not self._store.write(place, kv, record):
                self.erase(blocks[:at])
                return False
        return True

    def read(self, block: int, target: int) -> bool:
        """Fill the memory block ``target``; False when the disk does not give back what was written."""
        memory = self._arena.block_memory(target)
        kv = memory.reshape(-1)
        good = self._store.read(self._places(np.array([block]))[0], kv)
        if self._arena.pieces > 1:
            memory[:] = kv.reshape(memory.shape)
        return good

    def erase(self, blocks: BlockNumbers) -> None:
        """What these blocks hold must not come back after a restart."""
        self._store.erase(self._places(blocks))

    def take(self, blocks: BlockNumbers) -> None:
        """These blocks are in use from now on."""
        if self.orphans:
            for place in self._places(blocks):
                self.orphans.forget(place)

    def erase_orphans(self, namespace: Namespace) -> None:
        """No orphan of a namespace must come back: nobody can tell which prompt one of them continues."""
        doomed = self.orphans.of(namespace)
        self._store.erase(doomed)
        for place in doomed:
            self.orphans.forget(place)

    def continuations(
        self, namespace: Namespace, tokens: Tokens
    ) -> Iterator[tuple[Tokens, BlockNumbers, NDArray[np.uint8]]]:
        """What is orphaned beyond each block of ``tokens``: a whole path, its last blocks, their origins."""
        step = self._layout.block_tokens
        keys = chain_keys(self._layout.fingerprint, namespace, tokens, step)
        for depth, key in enumerate(keys):
            for chain in self.orphans.chains(key):
                yield self._path(tokens[: depth * step], chain)

    def _path(self, head: Tokens, chain: list[Orphan]) -> tuple[Tokens, BlockNumbers, NDArray[np.uint8]]:
        tail = unpack_tokens(b"".join(orphan.record.tokens for orphan in chain))
        blocks = self._numbers[[orphan.place for orphan in chain]]
        origins = np.array([orphan.record.origin for orphan in chain], np.uint8)
        return np.concatenate((head, tail)), blocks, origins

    def _places(self, blocks: BlockNumbers) -> list[int]:
        places: list[int] = np.searchsorted(self._numbers, blocks).tolist()
        return places
