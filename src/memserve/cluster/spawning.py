"""Starts instance processes before it is known what they will be: they load their code and wait.

Imports nothing heavy, because that is what it saves waiting for.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

INSTANCE_COMMAND = (sys.executable, "-m", "memserve.engine.instance")


def spawn(command: Sequence[str] = INSTANCE_COMMAND) -> subprocess.Popen[bytes]:
    """Start a process that reads its settings from standard input, and ends if that ends without any.

    It lives in a session of its own, so Ctrl-C reaches only the server. Raises ``OSError``.
    """
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def end_spare(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes that have got no settings, and leave none behind."""
    for process in processes:
        process.kill()
        process.communicate()
