"""From options to a workload, for every command that takes one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memserve.core.errors import ConfigError

if TYPE_CHECKING:
    from memserve.bench.synthetic import Shape
    from memserve.bench.workload import Workload

SYNTHETIC, MOONCAKE = "synthetic", "mooncake"
_THINK = 1.0
"""Mean seconds between turns of synthetic sessions."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sizes of synthetic sessions, tokens."""

    turns: int
    prompt: int
    shared: float
    follow_up: int
    output: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which workload, as the command line says it."""

    name: str
    data: Path | None
    trace: Path | None
    sessions: int
    context: int
    seed: int
    think: float | None
    lengths: Lengths


def make_workload(wanted: Wanted) -> Workload:
    """Read or make it. Raises ``ConfigError``."""
    from memserve.bench.sources import Recorded, read_replay, read_workload
    from memserve.bench.synthetic import make_synthetic

    if (wanted.name == MOONCAKE) != (wanted.trace is not None):
        raise ConfigError(f"--workload {MOONCAKE} and --trace FILE go together")
    if wanted.trace is not None:
        return read_replay(wanted.trace, wanted.sessions, wanted.context)
    if wanted.name == SYNTHETIC:
        return make_synthetic(_shape(wanted), wanted.context, wanted.seed)
    if wanted.data is None:
        raise ConfigError(f"--workload {wanted.name} needs --data DIR, a folder with the data sets")
    asked = Recorded(wanted.name, wanted.data, wanted.sessions, wanted.context, wanted.seed, wanted.think)
    return read_workload(asked)


def _shape(wanted: Wanted) -> Shape:
    from memserve.bench.synthetic import Shape

    lengths = wanted.lengths
    return Shape(
        wanted.sessions,
        lengths.turns,
        lengths.prompt,
        lengths.shared,
        lengths.follow_up,
        lengths.output,
        think=_THINK if wanted.think is None else wanted.think,
    )
