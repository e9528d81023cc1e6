"""Read-only mapped files, and what tells one state of a file from another. Knows no format."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec

from memserve.core.errors import ModelError

_U64 = struct.Struct("<Q")


class FileState(msgspec.Struct, frozen=True):
    """A file as it was when it was opened; ``changed`` is what no program can set, in nanoseconds.

    Every way to other content changes it: writing in place, also with the modification time put back
    (``changed``), and replacing the file, also by one of equal size and time.
    """

    path: str
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> FileState:
        return cls(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def is_current(self) -> bool:
        """Whether the file is still there, as it was."""
        try:
            return FileState.of(Path(self.path), os.stat(self.path)) == self
        except OSError:
            return False


def map_file(path: Path) -> tuple[mmap.mmap, FileState]:
    """Map a file read-only; raises ``ModelError`` for what cannot be read, an empty file included."""
    try:
        with path.open("rb") as file:
            state = FileState.of(path, os.fstat(file.fileno()))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), state
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def sample_bytes(update: Callable[[bytes], None], mapped: mmap.mmap, start: int) -> None:
    """Feed a hash with the size and 64 evenly spaced 4 KiB pages of ``mapped[start:]``."""
    update(_U64.pack(len(mapped)))
    for page in range(64):
        at = start + (len(mapped) - start) * page // 64
        update(mapped[at : at + 4096])
