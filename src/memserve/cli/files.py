"""The files that a command writes, and those that it may have open."""

from __future__ import annotations

import resource
from pathlib import Path

from memserve.cli.failure import CANNOT, fail
from memserve.core.errors import ConfigError

_OTHERS = 100


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


def allow_open_files(count: int) -> None:
    """Let this process have ``count`` more than a few files open. Raises ``ConfigError``."""
    wanted = count + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise ConfigError(f"{count} instances need as many open files; the limit is {hard} (ulimit -n)")
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
