"""Keeps the instances of this machine running: starts them, and again when they are lost.

Each life of an instance is an incarnation with a higher number. Pauses between lives grow, and an instance
that never stays up is given up. Knows processes and pauses; what an instance is told, what it is good for
and whether it is missed, others know.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memserve.cluster.launcher import LocalLauncher
from memserve.core.clock import Clock
from memserve.core.config import ClusterConfig
from memserve.core.types import InstanceId, Role

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
STEADY_SECONDS = 60.0
"""A life that lasted this long was a success: pauses begin anew after it."""


def pause_before(restart: int) -> float:
    """Seconds to wait before the ``restart``-th restart in a row, from 1 on: the first is at once."""
    return 0.0 if restart <= 1 else min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (restart - 2))


@dataclass(slots=True)
class _Life:
    """An instance's present or latest incarnation; ``restarts`` counts those in a row."""

    role: Role
    incarnation: int
    started_at: float
    restarts: int = 0


class Supervisor:
    """Runs ``command`` once per instance.

    ``encode(instance, role, incarnation)`` makes what a process reads on standard input. ``on_exit(instance,
    incarnation, reason)`` is told of each end and returns the role to restart with, None if it is not missed.
    ``on_given_up(instance, reason)`` is told when there is no further restart. ``spare``: see
    ``LocalLauncher``.
    """

    def __init__(
        self,
        command: Sequence[str],
        config: ClusterConfig,
        clock: Clock,
        encode: Callable[[InstanceId, Role, int], bytes],
        *,
        on_exit: Callable[[InstanceId, int, str], Role | None],
        on_given_up: Callable[[InstanceId, str], None],
        spare: list[subprocess.Popen[bytes]] | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._encode = encode
        self._on_exit = on_exit
        self._on_given_up = on_given_up
        self._launcher = LocalLauncher(command, self._exited, spare)
        self._lives: dict[InstanceId, _Life] = {}
        self._timers: dict[InstanceId, asyncio.TimerHandle] = {}
        self._dying: set[InstanceId] = set()
        self._restarts = False

    def start(self, instance: InstanceId, role: Role) -> None:
        """Start an instance for the first time. Raises ``OSError`` when there can be no process."""
        self._lives[instance] = _Life(role, time.time_ns() // 1_000_000, self._clock.now())
        self._launch(instance)

    def restart_lost(self) -> None:
        """From now on start again what is lost, if the configuration says so."""
        self._restarts = self._config.restart_lost

    def restart_no_more(self) -> None:
        """What ends from now on stays away."""
        self._restarts = False
        for instance in list(self._timers):
            self._clear_timer(instance)

    def became_ready(self, instance: InstanceId) -> bool:
        """An instance can take requests; returns whether it is one of ours that has come back."""
        life = self._lives.get(instance)
        if life is None:
            return False
        self._clear_timer(instance)
        return life.restarts > 0

    @property
    def restarting(self) -> tuple[InstanceId, ...]:
        """Those that have been lost and are on their way back."""
        return tuple(sorted(self._dying | self._timers.keys()))

    def kill(self, instance: InstanceId) -> None:
        """Kill an instance at once, if it still runs; its end is told later."""
        if self._restarts and instance in self._lives:
            self._dying.add(instance)
        self._launcher.kill(instance)

    async def stop(self) -> None:
        """End all instances and start none again."""
        self.restart_no_more()
        await self._launcher.stop()

    # --- inside ---

    def _launch(self, instance: InstanceId) -> None:
        life = self._lives[instance]
        self._launcher.start(instance, self._encode(instance, life.role, life.incarnation))

    def _exited(self, instance: InstanceId, reason: str) -> None:
        life = self._lives[instance]
        self._clear_timer(instance)
        role = self._on_exit(instance, life.incarnation, reason)
        self._dying.discard(instance)
        if role is None or not self._restarts:
            return
        if self._clock.now() - life.started_at > STEADY_SECONDS:
            life.restarts = 0
        life.role = role
        if life.restarts >= self._config.max_restarts:
            self._on_given_up(instance, f"{reason}; it was restarted {life.restarts} times in a row")
            return
        life.restarts += 1
        loop = asyncio.get_running_loop()
        self._timers[instance] = loop.call_later(pause_before(life.restarts), self._restart, instance)

    def _restart(self, instance: InstanceId) -> None:
        life = self._lives[instance]
        life.incarnation = max(life.incarnation + 1, time.time_ns() // 1_000_000)
        life.started_at = self._clock.now()
        # Membership bounds the time from joining to being ready; a process may hang before it joins.
        loop, seconds = asyncio.get_running_loop(), self._config.start_timeout
        self._timers[instance] = loop.call_later(seconds, self._launcher.kill, instance)
        try:
            self._launch(instance)
        except OSError as error:
            self._clear_timer(instance)
            self._on_given_up(instance, f"it cannot be started again: {error}")

    def _clear_timer(self, instance: InstanceId) -> None:
        timer = self._timers.pop(instance, None)
        if timer is not None:
            timer.cancel()
