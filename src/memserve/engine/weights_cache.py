"""Packed weights on disk: where they lie, how they get there, and when they go.

A cache only: whatever goes wrong is said in one line, and the weights are packed as if there were none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import time
from pathlib import Path

from memserve.core.errors import ModelError
from memserve.engine.models.packed import (
    PackedOrigin,
    PackedWeights,
    is_outdated,
    map_packed,
    write_packed,
)

log = logging.getLogger(__name__)

OFF = "off"
_SUFFIX, _UNFINISHED = ".packed", ".tmp"
_ABANDONED_SECONDS = 3600.0
"""An unfinished file of that age has nobody left who would finish it."""


def open_cache(setting: str | None) -> WeightsCache | None:
    """The cache that ``engine.weights_cache`` asks for: a folder, ``off``, or None for the user's own."""
    if setting == OFF:
        return None
    try:
        return WeightsCache(Path(setting).expanduser() if setting else default_folder())
    except RuntimeError as error:
        log.warning("packed weights are not kept: %s; name a folder with --weights-cache", error)
        return None


def default_folder() -> Path:
    """``memserve`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Raises ``RuntimeError`` where there is no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: anything but an absolute path is to be ignored.
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "memserve"


class WeightsCache:
    """Packed weights in ``folder``, one file per model and ``engine.weights`` setting."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, origin: PackedOrigin) -> PackedWeights | None:
        """Map what was packed from ``origin`` before; None if there is nothing that is sound."""
        try:
            return map_packed(self.path_of(origin), origin)
        except FileNotFoundError:
            return None
        except ModelError as error:
            log.warning("%s; packing the weights again", error)
            return None

    def store(self, origin: PackedOrigin, weights: PackedWeights) -> PackedWeights | None:
        """Keep what was packed from ``origin``, drop what is of no more use, and map what is kept.

        A file appears complete or not at all; of several that store the same at once, one wins. None if that
        failed, for example because the disk is full.
        """
        if not origin.is_current():
            log.warning("packed weights are not kept: the model's files changed while they were read")
            return None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_outdated()
            self._publish(origin, weights)
        except OSError as error:
            log.warning("packed weights are not kept in %s: %s", self.folder, error)
            return None
        return self.find(origin)

    def path_of(self, origin: PackedOrigin) -> Path:
        """Where the weights of ``origin`` lie or would lie."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", origin.name)[:80]
        return self.folder / f"{name}-{origin.keep}-{origin.key[:16]}{_SUFFIX}"

    def _publish(self, origin: PackedOrigin, weights: PackedWeights) -> None:
        path = self.path_of(origin)
        descriptor, name = tempfile.mkstemp(_UNFINISHED, f".{path.stem}-", self.folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write_packed(file, origin, weights)
            try:
                os.link(name, path)
            except OSError:
                # Whoever is second takes the first one's, so that both share one copy in memory.
                if self.find(origin) is None:
                    os.replace(name, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    def _remove_outdated(self) -> None:
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                if is_outdated(path):
                    path.unlink()
        for path in self.folder.glob(f".*{_UNFINISHED}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
