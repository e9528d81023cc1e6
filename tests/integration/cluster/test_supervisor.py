"""Real children that die: started again with higher incarnations, not for ever, and never after the end."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from memserve.cluster.supervisor import FIRST_PAUSE, LONGEST_PAUSE, STEADY_SECONDS, Supervisor, pause_before
from memserve.core.clock import VirtualClock
from memserve.core.config import ClusterConfig
from memserve.core.types import InstanceId, Role

pytestmark = pytest.mark.processes

CHILD = InstanceId("child-0")
STAYS = "import sys, time; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n'); time.sleep(60)"
ENDS = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n'); sys.exit(3)"


class Watched:
    """A supervisor whose children write into ``file`` what they were told; remembers what it says."""

    def __init__(self, code: str, file: Path, **config: float) -> None:
        self.file = file
        self.clock = VirtualClock()
        self.wanted: Role | None = Role.DECODE
        self.exits: list[tuple[int, str]] = []
        self.given_up: list[str] = []
        self.supervisor = Supervisor(
            (sys.executable, "-c", code, str(file)),
            ClusterConfig(**config),  # type: ignore[arg-type]
            self.clock,
            lambda name, role, incarnation: json.dumps([name, role, incarnation]).encode(),
            on_exit=self._exited,
            on_given_up=lambda _, reason: self.given_up.append(reason),
        )

    def _exited(self, instance: InstanceId, incarnation: int, reason: str) -> Role | None:
        self.exits.append((incarnation, reason))
        return self.wanted

    def told(self) -> list[tuple[str, str, int]]:
        """Name, role and incarnation of every child so far."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [tuple(json.loads(line)) for line in lines]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)


def run(
    code: str, file: Path, scenario: Callable[[Watched], Coroutine[None, None, None]], **config: float
) -> None:
    async def bounded() -> None:
        watched = Watched(code, file, **config)
        try:
            async with asyncio.timeout(60):
                await scenario(watched)
        finally:
            await watched.supervisor.stop()

    asyncio.run(bounded())


def test_a_killed_child_comes_back_in_the_role_it_is_missed_in(tmp_path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        supervisor = watched.supervisor
        supervisor.start(CHILD, Role.PREFILL)
        supervisor.restart_lost()
        await watched.until(lambda: len(watched.told()) == 1)
        assert not supervisor.became_ready(CHILD)
        supervisor.kill(CHILD)
        assert supervisor.restarting == (CHILD,)
        await watched.until(lambda: len(watched.told()) == 2)
        (_, role, first), (_, again, second) = watched.told()
        assert (role, again, second > first) == ("prefill", "decode", True)
        assert watched.exits == [(first, "it was killed by SIGKILL")]
        assert supervisor.restarting == (CHILD,)
        assert supervisor.became_ready(CHILD)
        assert supervisor.restarting == ()

    run(STAYS, tmp_path / "told", scenario)


def test_one_that_never_stays_up_is_given_up(tmp_path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        watched.supervisor.start(CHILD, Role.PREFILL)
        watched.supervisor.restart_lost()
        await watched.until(lambda: bool(watched.given_up))
        assert watched.given_up == ["it exited with code 3; it was restarted 2 times in a row"]
        assert len(watched.told()) == len(watched.exits) == 3
        assert watched.supervisor.restarting == ()

    run(ENDS, tmp_path / "told", scenario, max_restarts=2)


def test_a_steady_life_is_forgiven_what_was_before(tmp_path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        watched.supervisor.start(CHILD, Role.PREFILL)
        watched.supervisor.restart_lost()
        for lives in range(1, 4):
            await watched.until(lambda count=lives: len(watched.told()) == count)  # type: ignore[misc]
            watched.clock.advance(STEADY_SECONDS + 1)
            watched.supervisor.kill(CHILD)
        await watched.until(lambda: len(watched.told()) == 4)
        assert watched.given_up == []

    run(STAYS, tmp_path / "told", scenario, max_restarts=1)


@pytest.mark.parametrize("wanted", [None, Role.DECODE])
def test_who_is_not_missed_or_not_to_be_restarted_stays_away(tmp_path: Path, wanted: Role | None) -> None:
    async def scenario(watched: Watched) -> None:
        watched.wanted = wanted
        watched.supervisor.start(CHILD, Role.PREFILL)
        watched.supervisor.restart_lost()
        await watched.until(lambda: len(watched.exits) == 1)
        assert watched.supervisor.restarting == ()
        assert len(watched.told()) == 1

    run(ENDS, tmp_path / "told", scenario, restart_lost=wanted is None)


def test_a_restart_that_hangs_before_it_joins_is_killed(tmp_path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        supervisor = watched.supervisor
        supervisor.start(CHILD, Role.PREFILL)
        supervisor.restart_lost()
        await watched.until(lambda: len(watched.told()) == 1)
        supervisor.kill(CHILD)
        await watched.until(lambda: bool(watched.given_up))
        assert len(watched.exits) == 2

    run(STAYS, tmp_path / "told", scenario, start_timeout=0.2, max_restarts=1)


def test_after_the_end_nothing_is_started(tmp_path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        watched.supervisor.start(CHILD, Role.PREFILL)
        watched.supervisor.restart_lost()
        await watched.until(lambda: len(watched.told()) == 1)
        await watched.supervisor.stop()
        assert watched.exits[-1][1] == f"it was killed by {signal.SIGTERM.name}"
        assert watched.supervisor.restarting == ()
        assert len(watched.told()) == 1

    run(STAYS, tmp_path / "told", scenario)


def test_pauses_grow_to_a_limit() -> None:
    pauses = [pause_before(restart) for restart in range(1, 12)]
    assert pauses[:3] == [0.0, FIRST_PAUSE, 2 * FIRST_PAUSE]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE
