"""Instances as child processes of this machine: start, watch through a pidfd, stop.

A child gets its settings on standard input and lives in a session of its own, so Ctrl-C reaches only the
server, which then stops its children in order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memserve.cluster.spawning import spawn
from memserve.core.types import InstanceId

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""How long a child may take to end by itself before it is killed."""


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    pidfd: int
    exited: asyncio.Event


class LocalLauncher:
    """Starts ``command`` once per instance; ``on_exit(instance, description)`` tells of each end.

    ``spare``: processes of that command that wait for settings already, which are taken from the list first.
    Whoever made it ends those that are left.
    """

    def __init__(
        self,
        command: Sequence[str],
        on_exit: Callable[[InstanceId, str], None],
        spare: list[subprocess.Popen[bytes]] | None = None,
    ) -> None:
        self._command = list(command)
        self._on_exit = on_exit
        self._spare = [] if spare is None else spare
        self._children: dict[InstanceId, _Child] = {}

    def start(self, instance: InstanceId, settings: bytes) -> int:
        """Start a child, hand it ``settings`` and return its pid. Raises ``OSError`` when it cannot start."""
        process = self._spare.pop() if self._spare else spawn(self._command)
        assert process.stdin is not None
        try:
            process.stdin.write(settings)
            process.stdin.close()
        except BrokenPipeError:
            log.warning("%s ended before it read its settings", instance)
        child = _Child(process, os.pidfd_open(process.pid), asyncio.Event())
        self._children[instance] = child
        asyncio.get_running_loop().add_reader(child.pidfd, self._reap, instance, child)
        return process.pid

    def kill(self, instance: InstanceId) -> None:
        """Kill a child at once, if it still runs."""
        child = self._children.get(instance)
        if child is not None:
            _signal(child, signal.SIGKILL)

    async def stop(self) -> None:
        """End all children: politely first, then not."""
        children = list(self._children.values())
        for child in children:
            _signal(child, signal.SIGTERM)
        await _wait_all(children, STOP_SECONDS)
        for child in children:
            _signal(child, signal.SIGKILL)
        await _wait_all(children, STOP_SECONDS)

    def _reap(self, instance: InstanceId, child: _Child) -> None:
        asyncio.get_running_loop().remove_reader(child.pidfd)
        os.close(child.pidfd)
        code = child.process.wait()
        child.exited.set()
        if self._children.get(instance) is child:
            del self._children[instance]
        self._on_exit(instance, _describe(code))


def _signal(child: _Child, number: signal.Signals) -> None:
    if not child.exited.is_set():
        signal.pidfd_send_signal(child.pidfd, number)


async def _wait_all(children: Sequence[_Child], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            for child in children:
                await child.exited.wait()
    except TimeoutError:
        log.warning("some instances did not end within %s s", seconds)


def _describe(code: int) -> str:
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it exited with code {code}"
