"""The decision log of a real server, with an instance lost under a request, replays to the same decisions."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from e2e.serving import serving, wait_for
from e2e.test_failover import SMALL, Answer, body, read
from memserve.scheduler.decision import Decision
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.replay import read_log, replay

pytestmark = [pytest.mark.processes, pytest.mark.model]

PROMPT = [2000 + 7 * at for at in range(300)]


def test_a_real_log_replays(tmp_path: Path) -> None:
    file = tmp_path / "decisions"
    with serving("--colocated", "2", "--policy", "cost", *SMALL, "--decision-log", str(file)) as served:
        pids = {name: one["pid"] for name, one in served.instances().items()}

        def kill(answer: Answer) -> None:
            busy = [name for name, one in served.instances().items() if one["running"]]
            if busy and not killed:
                killed.append(busy[0])
                os.kill(pids[busy[0]], signal.SIGKILL)

        killed: list[str] = []
        assert read(served, body(8, PROMPT)).done
        assert read(served, body(400, PROMPT), kill).done
        assert killed
        wait_for(lambda: len(served.instances()) == 2, "the lost one is back", 60)
        assert read(served, body(8, PROMPT[:100])).done
        served.wait_idle()
    with file.open("rb") as lines:
        opened, news = read_log(lines, str(file))
        replayed = list(replay(opened, news, policy_by_name(opened.policy)))
    assert len(replayed) >= 4, "a request that lost its instance is placed once more"
    for one in replayed:
        assert isinstance(one.then, Decision)
        assert one.then == one.now, f"line {one.line}"
