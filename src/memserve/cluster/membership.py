"""Who belongs to the cluster, as a pure state machine: events and the time in, effects out.

    joining -> ready <-> suspect -> dead
                 \\-> draining -> left          (any living state -> dead)

A role may change while an instance serves; that is no state of its own, because every engine can finish what
it has begun under the earlier role.

Knows names, incarnations and silences. Knows no connection, process or clock: the caller brings events in
the order they happened, and a ``Tick`` at least once per heartbeat.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from memserve.core.config import ClusterConfig
from memserve.core.messages import Member
from memserve.core.types import InstanceId, Role

SUSPECT_BEATS = 2
"""So many missed heartbeats make an instance suspect."""


class MemberState(enum.StrEnum):
    """Life of one incarnation. ``dead`` and ``left`` are final."""

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DEAD = "dead"
    LEFT = "left"

    @property
    def gone(self) -> bool:
        return self in (MemberState.DEAD, MemberState.LEFT)

    @property
    def serves(self) -> bool:
        """Counted as a member: others may reach its pool. A draining one takes no new request."""
        return self in (MemberState.READY, MemberState.SUSPECT, MemberState.DRAINING)


# --- events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Joined:
    """An instance introduced itself; it is not ready yet."""

    instance: InstanceId
    incarnation: int
    role: Role


@dataclass(frozen=True, slots=True)
class BecameReady:
    """The instance can take requests; ``peer_address`` is where its pool listens."""

    instance: InstanceId
    incarnation: int
    peer_address: str


@dataclass(frozen=True, slots=True)
class Heard:
    """A heartbeat arrived."""

    instance: InstanceId
    incarnation: int


@dataclass(frozen=True, slots=True)
class RoleChanged:
    """The instance has said that it works as ``role`` from now on."""

    instance: InstanceId
    incarnation: int
    role: Role


@dataclass(frozen=True, slots=True)
class LeaveRequested:
    """The instance shall finish what it runs and go: ending then is leaving, falling silent is dying."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The control connection broke."""

    instance: InstanceId
    incarnation: int
    reason: str = "connection lost"


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """The operating system says that the process is gone."""

    instance: InstanceId
    incarnation: int
    reason: str = "process exited"


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: look at the deadlines."""


Event = Joined | BecameReady | Heard | RoleChanged | LeaveRequested | ConnectionLost | ProcessExited | Tick


# --- effects ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemberReady:
    """A new member takes requests from now on."""

    member: Member


@dataclass(frozen=True, slots=True)
class MemberSuspected:
    """Silent for too long to be preferred, not long enough to be given up."""

    instance: InstanceId
    incarnation: int


@dataclass(frozen=True, slots=True)
class MemberRecovered:
    """A suspect was heard again."""

    instance: InstanceId
    incarnation: int


@dataclass(frozen=True, slots=True)
class MemberRoleChanged:
    """Give ``member`` the requests of its new role; what it holds it holds still."""

    member: Member


@dataclass(frozen=True, slots=True)
class MemberDraining:
    """Give it no new request."""

    instance: InstanceId
    incarnation: int


@dataclass(frozen=True, slots=True)
class MemberLost:
    """Forget everything about this incarnation, whether it had become ready or not.

    ``left`` tells an asked-for end from a death; a process that may still exist must be killed.
    """

    instance: InstanceId
    incarnation: int
    reason: str
    left: bool


@dataclass(frozen=True, slots=True)
class MembersChanged:
    """Tell everybody: these are the members now. Comes last, at most once per event."""

    members: tuple[Member, ...]


Effect = (
    MemberReady
    | MemberSuspected
    | MemberRecovered
    | MemberRoleChanged
    | MemberDraining
    | MemberLost
    | MembersChanged
)


# --- the machine --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemberView:
    """One line of the cluster's health: ``since`` and ``heard_at`` in the caller's seconds."""

    instance: InstanceId
    incarnation: int
    role: Role
    state: MemberState
    since: float
    heard_at: float
    reason: str


@dataclass(slots=True)
class _Record:
    instance: InstanceId
    incarnation: int
    role: Role
    since: float
    heard_at: float
    state: MemberState = MemberState.JOINING
    peer_address: str = ""
    reason: str = ""

    @property
    def member(self) -> Member:
        return Member(self.instance, self.incarnation, self.role, self.peer_address)

    def enter(self, state: MemberState, now: float) -> None:
        self.state = state
        self.since = now


class Membership:
    """The members of one cluster. ``config`` gives heartbeat interval and deadlines, in seconds."""

    def __init__(self, config: ClusterConfig) -> None:
        self._beat = config.heartbeat
        self._dead_after = config.dead_after
        self._start_timeout = config.start_timeout
        self._records: dict[InstanceId, _Record] = {}
        self._ticked_at: float | None = None

    def apply(self, event: Event, now: float) -> list[Effect]:
        """Take one event in and return what follows from it, in the order in which to act.

        Events of an earlier incarnation, or of one that is gone, change nothing.
        """
        before = self.members()
        effects = self._step(event, now)
        after = self.members()
        if after != before:
            effects.append(MembersChanged(after))
        return effects

    def members(self) -> tuple[Member, ...]:
        """All that serve (ready, suspect, draining), ordered by name."""
        return tuple(record.member for _, record in sorted(self._records.items()) if record.state.serves)

    def view(self) -> tuple[MemberView, ...]:
        """Everyone ever seen, in the latest incarnation, ordered by name."""
        return tuple(
            MemberView(
                record.instance,
                record.incarnation,
                record.role,
                record.state,
                record.since,
                record.heard_at,
                record.reason,
            )
            for _, record in sorted(self._records.items())
        )

    def check(self) -> None:
        """Raise ``AssertionError`` if the state contradicts itself."""
        for name, record in self._records.items():
            assert record.instance == name, f"{record.instance} is filed under {name}"
            assert record.state.gone == bool(record.reason), f"{name} is {record.state}: {record.reason!r}"
            serves_nowhere = record.state.serves and not record.peer_address
            assert not serves_nowhere, f"{name} is {record.state} without an address"

    def _step(self, event: Event, now: float) -> list[Effect]:
        if isinstance(event, Tick):
            return self._tick(now)
        if isinstance(event, Joined):
            return self._join(event, now)
        record = self._records.get(event.instance)
        if record is None or record.state.gone:
            return []
        if isinstance(event, LeaveRequested):
            return self._drain(record, now)
        if event.incarnation != record.incarnation:
            return []
        if isinstance(event, BecameReady):
            return self._ready(record, event.peer_address, now)
        if isinstance(event, Heard):
            return self._hear(record, now)
        if isinstance(event, RoleChanged):
            return self._change_role(record, event.role)
        return self._lose(record, event.reason, now, left=record.state is MemberState.DRAINING)

    def _join(self, event: Joined, now: float) -> list[Effect]:
        known = self._records.get(event.instance)
        if known is not None and event.incarnation <= known.incarnation:
            return []
        effects: list[Effect] = []
        if known is not None and not known.state.gone:
            effects = self._lose(known, f"replaced by incarnation {event.incarnation}", now)
        self._records[event.instance] = _Record(event.instance, event.incarnation, event.role, now, now)
        return effects

    def _ready(self, record: _Record, peer_address: str, now: float) -> list[Effect]:
        if record.state is not MemberState.JOINING:
            return []
        record.peer_address = peer_address
        record.heard_at = now
        record.enter(MemberState.READY, now)
        return [MemberReady(record.member)]

    def _hear(self, record: _Record, now: float) -> list[Effect]:
        record.heard_at = now
        if record.state is not MemberState.SUSPECT:
            return []
        record.enter(MemberState.READY, now)
        return [MemberRecovered(record.instance, record.incarnation)]

    def _change_role(self, record: _Record, role: Role) -> list[Effect]:
        if not record.state.serves or record.role is role:
            return []
        record.role = role
        return [MemberRoleChanged(record.member)]

    def _drain(self, record: _Record, now: float) -> list[Effect]:
        if record.state is MemberState.JOINING:
            return self._lose(record, "asked to leave before it was ready", now, left=True)
        if record.state is MemberState.DRAINING:
            return []
        record.enter(MemberState.DRAINING, now)
        return [MemberDraining(record.instance, record.incarnation)]

    def _lose(self, record: _Record, reason: str, now: float, *, left: bool = False) -> list[Effect]:
        record.reason = reason
        record.enter(MemberState.LEFT if left else MemberState.DEAD, now)
        return [MemberLost(record.instance, record.incarnation, reason, left)]

    def _tick(self, now: float) -> list[Effect]:
        self._forgive_own_stall(now)
        effects: list[Effect] = []
        for _, record in sorted(self._records.items()):
            effects += self._look_at(record, now)
        return effects

    def _look_at(self, record: _Record, now: float) -> list[Effect]:
        if record.state is MemberState.JOINING:
            late = now - record.since > self._start_timeout
            return self._lose(record, f"not ready within {self._start_timeout:g} s", now) if late else []
        silent = now - record.heard_at
        if record.state.serves and silent > self._dead_after:
            return self._lose(record, f"no heartbeat for {silent:.2f} s", now)
        if record.state is MemberState.READY and silent > SUSPECT_BEATS * self._beat:
            record.enter(MemberState.SUSPECT, now)
            return [MemberSuspected(record.instance, record.incarnation)]
        return []

    def _forgive_own_stall(self, now: float) -> None:
        # A late tick means that we were frozen and heartbeats may wait unread: the gap beyond one interval
        # is nobody's silence. Without this a stalled server would declare everyone dead.
        last, self._ticked_at = self._ticked_at, now
        if last is None or now - last <= SUSPECT_BEATS * self._beat:
            return
        stalled = now - last - self._beat
        for record in self._records.values():
            record.heard_at = min(now, record.heard_at + stalled)
