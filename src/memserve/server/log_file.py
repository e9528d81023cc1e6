"""The file that a decision log goes to: complete lines, up to a size; without it, serving goes on."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import msgspec

from memserve.core.clock import Clock
from memserve.core.errors import ConfigError
from memserve.scheduler.decision_log import Closed

log = logging.getLogger(__name__)


class LogFile:
    """Replaces ``path``, for its owner's eyes only. Raises ``ConfigError`` where that cannot be written.

    ``limit`` in bytes: with the line that would exceed it the log is closed. Every line is handed to the
    system at once, so that it can be read also if this process dies.
    """

    def __init__(self, path: Path, limit: int, clock: Clock) -> None:
        self._path = path
        self._left = limit
        self._clock = clock
        try:
            number = _open_private(path)
        except OSError as error:
            raise ConfigError(
                f"scheduler.decision_log: {path} cannot be written: {error.strerror or error}"
            ) from error
        self._file = os.fdopen(number, "wb", buffering=0)
        self._open = True

    def write(self, line: bytes) -> None:
        """Add a line. Never raises: a log that cannot go on ends, with a warning."""
        if not self._open:
            return
        if len(line) > self._left:
            self._end(f"scheduler.decision_log_bytes are full after {self._file.tell()} bytes")
            return
        self._left -= len(line)
        self._write(line)

    def close(self) -> None:
        """May be repeated."""
        self._open = False
        self._file.close()

    def _end(self, reason: str) -> None:
        log.warning("the decision log %s ends: %s", self._path, reason)
        self._write(msgspec.json.encode(Closed(self._clock.now(), reason)) + b"\n")
        self.close()

    def _write(self, line: bytes) -> None:
        """All of it, or the log ends: nothing may follow a piece of a line."""
        try:
            whole = self._file.write(line) == len(line)
            problem = None if whole else "the disk is full"
        except OSError as error:
            problem = str(error)
        if problem is not None:
            self._open = False
            log.warning("the decision log %s ends: %s", self._path, problem)


def _open_private(path: Path) -> int:
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # A file that was there keeps its mode; prompts come only once others cannot read it.
        if stat.S_ISREG(os.fstat(number).st_mode):
            os.fchmod(number, 0o600)
            os.ftruncate(number, 0)
    except OSError:
        os.close(number)
        raise
    return number
