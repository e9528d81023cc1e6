"""What is simulated: a cluster, and what befalls its instances at given times. Values only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memserve.core.errors import ConfigError
from memserve.core.types import InstanceId, Role
from memserve.scheduler.costs import Wire
from memserve.sim.steps import Speed


@dataclass(frozen=True, slots=True)
class Site:
    """A cluster: instances by role, with ``blocks`` of KV each.

    All are alike, but those that only decode may have a ``decode_speed`` of their own.
    """

    prefill: int
    decode: int
    colocated: int
    speed: Speed
    blocks: int
    wire: Wire
    decode_speed: Speed | None = None

    def speed_of(self, role: Role) -> Speed:
        """How fast an instance is that begins in that role."""
        return self.decode_speed or self.speed if role is Role.DECODE else self.speed

    @property
    def size(self) -> int:
        """How many instances."""
        return self.prefill + self.decode + self.colocated

    @property
    def shape(self) -> str:
        """How many of which role, as people write it."""
        disaggregated = f"{self.prefill}P{self.decode}D" if self.prefill or self.decode else ""
        return "+".join(filter(None, (disaggregated, f"{self.colocated}C" if self.colocated else "")))

    def instances(self) -> Iterator[tuple[InstanceId, Role]]:
        """Names and roles."""
        for role, count in (
            (Role.PREFILL, self.prefill),
            (Role.DECODE, self.decode),
            (Role.COLOCATED, self.colocated),
        ):
            for number in range(count):
                yield InstanceId(f"{role}-{number}"), role


@dataclass(frozen=True, slots=True)
class Loss:
    """An instance dies at ``at`` s with all it held; ``back`` s later it takes requests again, empty."""

    instance: InstanceId
    at: float
    back: float | None = None


@dataclass(frozen=True, slots=True)
class RoleChange:
    """An instance does other work from ``at`` s on, and holds what it held."""

    instance: InstanceId
    role: Role
    at: float


Change = Loss | RoleChange


def check_changes(site: Site, changes: Sequence[Change]) -> None:
    """Raise ``ConfigError`` where a change speaks of no instance of ``site``, or of no time."""
    names = [name for name, _ in site.instances()]
    for change in changes:
        if change.instance not in names:
            raise ConfigError(f"there is no instance {change.instance!r}; accepted: {', '.join(names)}")
        back = change.back if isinstance(change, Loss) else None
        if not change.at >= 0 or (back is not None and not back > 0):
            raise ConfigError(f"{change.instance} cannot change at {change.at:g} s; accepted: 0 s or later")


def parse_loss(text: str) -> Loss:
    """``INSTANCE@SECONDS`` or ``INSTANCE@SECONDS+BACK``. Raises ``ConfigError``."""
    match = _LOSS.fullmatch(text)
    if match is None:
        raise ConfigError(f"--kill is {text!r}; accepted: INSTANCE@SECONDS or INSTANCE@SECONDS+BACK")
    back = match["back"]
    return Loss(InstanceId(match["name"]), float(match["at"]), None if back is None else float(back))


def parse_role_change(text: str) -> RoleChange:
    """``INSTANCE=ROLE@SECONDS``. Raises ``ConfigError``."""
    match = _ROLE_CHANGE.fullmatch(text)
    if match is None or match["role"] not in set(Role):
        raise ConfigError(
            f"--role is {text!r}; accepted: INSTANCE=ROLE@SECONDS, ROLE one of {', '.join(Role)}"
        )
    return RoleChange(InstanceId(match["name"]), Role(match["role"]), float(match["at"]))


_NUMBER = r"\d+(?:\.\d+)?"
_LOSS = re.compile(rf"(?P<name>[^@=]+)@(?P<at>{_NUMBER})(?:\+(?P<back>{_NUMBER}))?")
_ROLE_CHANGE = re.compile(rf"(?P<name>[^@=]+)=(?P<role>[a-z]+)@(?P<at>{_NUMBER})")
