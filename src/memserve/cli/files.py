"""The files that a command is asked to write."""

from __future__ import annotations

from pathlib import Path

from memserve.cli.failure import CANNOT, fail
from memserve.core.errors import ConfigError


def check_writable(*files: Path | None) -> None:
    """Better before the work than after it. Raises ``ConfigError``."""
    for file in files:
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ConfigError(f"{file} cannot be written; accepted: a file in a folder that exists")


def write_file(file: Path, content: bytes) -> None:
    """Write it, or end the command and say why not."""
    try:
        file.write_bytes(content)
    except OSError as error:
        fail(f"{file} cannot be written: {error.strerror or error}", CANNOT)
