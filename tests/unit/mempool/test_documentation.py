"""The first program that a reader of the documentation copies runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "mempool" / "README.md"


def test_the_example_in_short_runs() -> None:
    (program,) = re.findall(r"## In short\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(program, str(PAGE), "exec"), names)
    match = names["match"]
    assert not match.active  # type: ignore[attr-defined]
    assert len(names["addrs"]) == 7  # type: ignore[arg-type]
