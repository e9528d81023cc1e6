"""The disk tier's file: fixed places for records, each a header and a block. Knows files, not the index.

Nothing is ever trusted that does not verify, so no write needs an order or a sync: a place that was being
written when the process died holds a broken header, or a header whose checksum its bytes do not meet. Both
read as empty.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memserve._native import checksum_blocks
from memserve.core.errors import ConfigError
from memserve.mempool.disk_record import HEADER_BYTES, Record, decode_header, encode_header
from memserve.mempool.holes import punch_hole
from memserve.mempool.layout import KVLayout

log = logging.getLogger(__name__)

_PAGE = 4096
_EMPTY = bytes(_PAGE)


@dataclass(frozen=True, slots=True)
class DiskTier:
    """Keep up to ``blocks`` blocks in the directory ``path``, which one pool at a time may use."""

    path: Path
    blocks: int


class DiskStore:
    """Records of one pool in ``tier.path``; places are numbered from 0 to ``tier.blocks - 1``.

    Raises ``ConfigError`` when the directory cannot be used, or another process uses it.
    """

    def __init__(self, tier: DiskTier, layout: KVLayout) -> None:
        self.blocks = tier.blocks
        self._layout = layout
        self._stride = HEADER_BYTES + -(-layout.block_bytes // _PAGE) * _PAGE
        self._checksums = np.zeros(tier.blocks, np.uint64)
        self._sequence = 0
        self._fd = _open_alone(tier.path / "segment-0000.kv", tier.blocks * self._stride)

    def close(self) -> None:
        os.close(self._fd)

    def grow(self, blocks: int) -> None:
        """Add places. Raises ``ConfigError`` when the disk refuses."""
        try:
            os.ftruncate(self._fd, (self.blocks + blocks) * self._stride)
        except OSError as error:
            raise ConfigError(f"the disk tier cannot grow by {blocks} blocks: {error}") from error
        self.blocks += blocks
        self._checksums = np.concatenate((self._checksums, np.zeros(blocks, np.uint64)))

    def scan(self) -> Iterator[tuple[int, Record]]:
        """Every place that holds a whole header of this layout, with what it says.

        The blocks' bytes are verified when they are read, not now.
        """
        for place in range(self.blocks):
            try:
                raw = os.pread(self._fd, HEADER_BYTES, place * self._stride)
            except OSError as error:
                log.warning("place %d of the disk tier cannot be read: %s", place, error)
                continue
            record = decode_header(raw, self._layout.fingerprint, self._layout.block_tokens)
            if record is not None:
                self._checksums[place] = record.checksum
                self._sequence = max(self._sequence, record.sequence)
                yield place, record

    def write(self, place: int, block: NDArray[np.uint8], record: Record) -> bool:
        """Store a block (uint8[block_bytes]) with ``record``, whose checksum and sequence are set here.

        Returns False when the disk did not take it, or names are too long; the place reads as empty then.
        """
        self._sequence += 1
        checksum = int(checksum_blocks(_pointer(block), len(block))[0])
        sealed = Record(
            record.namespace, record.parent, record.tokens, record.origin, checksum, self._sequence
        )
        header = encode_header(sealed, self._layout.fingerprint)
        if header is None:
            return False
        try:
            written = os.pwritev(self._fd, [header, block.data], place * self._stride)
        except OSError as error:
            log.warning("the disk tier did not take a block: %s", error)
            written = 0
        if written != len(header) + len(block):
            self.erase([place])
            return False
        self._checksums[place] = checksum
        return True

    def read(self, place: int, block: NDArray[np.uint8]) -> bool:
        """Fill ``block`` (uint8[block_bytes]); False when the bytes are not those that were written."""
        try:
            count = os.preadv(self._fd, [block.data], place * self._stride + HEADER_BYTES)
        except OSError as error:
            log.warning("place %d of the disk tier cannot be read: %s", place, error)
            return False
        found = checksum_blocks(_pointer(block), len(block))[0]
        return count == len(block) and bool(found == self._checksums[place])

    def give_back(self, places: Sequence[int]) -> None:
        """Erase places, and let the file system have their space where it can take it."""
        try:
            for place in places:
                punch_hole(self._fd, place * self._stride, self._stride)
        except OSError as error:
            log.warning("the disk tier shrinks, but its file does not: %s", error)
            self.erase(places)

    def erase(self, places: Sequence[int]) -> None:
        """Make places read as empty from now on, after a restart too."""
        for place in places:
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, _EMPTY, place * self._stride)


def _pointer(block: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.array([block.ctypes.data], np.uint64)


def _open_alone(path: Path, size: int) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"the disk tier cannot use {path}: {error}; choose another directory") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"the disk tier cannot use {path} ({error}); give each pool a directory of its own"
        ) from error
    return fd
