"""What an instance process is told at its start, as JSON on standard input."""

from __future__ import annotations

import msgspec

from memserve.core.config import Config
from memserve.core.types import InstanceId, Role


class InstanceSettings(msgspec.Struct, frozen=True):
    """What the launcher tells a new instance. ``cores``: one per thread, to stay on; empty: anywhere."""

    instance: InstanceId
    incarnation: int
    role: Role
    cluster: str
    control_address: str
    threads: int
    config: Config
    cores: tuple[int, ...] = ()
