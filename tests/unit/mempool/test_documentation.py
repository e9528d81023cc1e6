"""What the documentation says is so: its first program runs as it stands, and no counter is left out."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from fnmatch import fnmatchcase
from pathlib import Path

from memserve.core.clock import VirtualClock
from memserve.core.types import InstanceId
from memserve.mempool import LinkTraffic, MemPool, TransferMode

from .conftest import LAYOUT

PAGE = Path(__file__).resolve().parents[3] / "docs" / "mempool" / "README.md"


def test_the_example_in_short_runs() -> None:
    (program,) = re.findall(r"## In short\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(program, str(PAGE), "exec"), names)
    match = names["match"]
    assert not match.active  # type: ignore[attr-defined]
    assert len(names["addrs"]) == 7  # type: ignore[arg-type]


def test_every_counter_is_documented() -> None:
    page = (PAGE.parents[1] / "operations.md").read_text()
    patterns = re.findall(r"`(pool_[a-z_*]+)`", page)
    link = LinkTraffic(InstanceId("b"), "shm", TransferMode.BY_LAYER, 1, 1, 1)
    with contextlib.closing(
        MemPool(LAYOUT, 2, instance=InstanceId("a"), incarnation=1, clock=VirtualClock())
    ) as pool:
        stats = dataclasses.replace(pool.stats(), traffic=(link,))
    unknown = [name for name in stats.counters() if not any(fnmatchcase(name, one) for one in patterns)]
    assert unknown == []
