"""Giving parts of a file back to the system without shortening it: memory of a memfd, space on a disk."""

from __future__ import annotations

import ctypes
import os

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_FALLOCATE = ctypes.CDLL(None, use_errno=True).fallocate
_FALLOCATE.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch_hole(fd: int, start: int, size: int) -> None:
    """Free the pages of ``size`` bytes from ``start`` on, which read as zeros from then on.

    Raises ``OSError``: not every file system can do that.
    """
    if _FALLOCATE(fd, _PUNCH_HOLE | _KEEP_SIZE, start, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
