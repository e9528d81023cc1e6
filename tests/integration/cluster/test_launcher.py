"""Child processes: started, watched, ended, whatever they think of it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from memserve.cluster import launcher as launcher_module
from memserve.cluster.launcher import LocalLauncher
from memserve.cluster.spawning import INSTANCE_COMMAND, end_spare, spawn
from memserve.core.types import InstanceId

pytestmark = pytest.mark.processes

CHILD = InstanceId("child-0")


def python(code: str) -> tuple[str, str, str]:
    return sys.executable, "-c", code


def run(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


class Exits:
    """Remembers how children ended."""

    def __init__(self) -> None:
        self.reasons: dict[InstanceId, str] = {}
        self.changed = asyncio.Event()

    def __call__(self, instance: InstanceId, reason: str) -> None:
        self.reasons[instance] = reason
        self.changed.set()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_settings_arrive_and_the_exit_code_is_told() -> None:
    async def scenario() -> None:
        exits = Exits()
        launcher = LocalLauncher(python("import sys; sys.exit(int(sys.stdin.read()))"), exits)
        pid = launcher.start(CHILD, b"7")
        await exits.changed.wait()
        assert exits.reasons == {CHILD: "it exited with code 7"}
        assert gone(pid)
        await launcher.stop()

    run(scenario)


def test_a_child_that_does_not_read_its_settings_is_no_problem() -> None:
    async def scenario() -> None:
        exits = Exits()
        launcher = LocalLauncher(python("raise SystemExit(3)"), exits)
        launcher.start(CHILD, b"x" * (1 << 20))
        await exits.changed.wait()
        assert exits.reasons == {CHILD: "it exited with code 3"}

    run(scenario)


def test_kill_is_seen_as_what_it_is() -> None:
    async def scenario() -> None:
        exits = Exits()
        launcher = LocalLauncher(python("import time; time.sleep(60)"), exits)
        launcher.start(CHILD, b"")
        launcher.kill(CHILD)
        launcher.kill(InstanceId("unknown"))
        await exits.changed.wait()
        assert exits.reasons == {CHILD: "it was killed by SIGKILL"}

    run(scenario)


def test_stop_is_polite_first() -> None:
    async def scenario() -> None:
        exits = Exits()
        launcher = LocalLauncher(python("import signal; signal.pause()"), exits)
        pid = launcher.start(CHILD, b"")
        await launcher.stop()
        assert exits.reasons == {CHILD: "it was killed by SIGTERM"}
        assert gone(pid)

    run(scenario)


def test_stop_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launcher_module, "STOP_SECONDS", 0.3)
    deaf = tmp_path / "deaf"
    stubborn = (
        "import pathlib, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(deaf)!r}).touch()\n"
        "while True: signal.pause()"
    )

    async def scenario() -> None:
        exits = Exits()
        launcher = LocalLauncher(python(stubborn), exits)
        pid = launcher.start(CHILD, b"")
        while not deaf.exists():
            await asyncio.sleep(0.01)
        await launcher.stop()
        assert exits.reasons == {CHILD: "it was killed by SIGKILL"}
        assert gone(pid)

    run(scenario)


def test_spare_processes_come_first() -> None:
    async def scenario() -> None:
        exits = Exits()
        spare = [spawn(python("import sys; sys.exit(int(sys.stdin.read()))")) for _ in range(2)]
        waiting = [process.pid for process in spare]
        launcher = LocalLauncher(python("raise SystemExit(3)"), exits, spare)
        pid = launcher.start(CHILD, b"7")
        await exits.changed.wait()
        assert exits.reasons == {CHILD: "it exited with code 7"}
        assert pid in waiting
        assert len(spare) == 1
        end_spare(spare)
        assert all(gone(pid) for pid in waiting)
        exits.changed.clear()
        spare.clear()
        launcher.start(CHILD, b"7")
        await exits.changed.wait()
        assert exits.reasons == {CHILD: "it exited with code 3"}
        await launcher.stop()

    run(scenario)


def test_an_instance_without_settings_ends_quietly() -> None:
    process = subprocess.Popen(INSTANCE_COMMAND, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
