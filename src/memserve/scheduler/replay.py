"""Decides again what a decision log tells of. Pure: lines in, decisions out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from memserve.core.errors import ConfigError, LayoutMismatch, NoInstance
from memserve.core.types import unpack_tokens
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.decision_log import (
    VERSION,
    Answered,
    AnswerLearnt,
    Beat,
    BecameReady,
    Closed,
    Draining,
    Finished,
    FirstToken,
    Foreseen,
    Linked,
    Listed,
    Lost,
    News,
    Opened,
    Recovered,
    RoleChanged,
    Routed,
    Stored,
    Suspected,
    Transferred,
)
from memserve.scheduler.policies import Policy
from memserve.scheduler.service import GlobalScheduler


class _Told:
    """A clock that shows what it is told."""

    def __init__(self, at: float) -> None:
        self.at = at

    def now(self) -> float:
        return self.at


@dataclass(frozen=True, slots=True)
class Replayed:
    """A request on line ``line`` of a log: what was decided then, and now.

    Where nobody could take it, the error's text is in the decision's place.
    """

    line: int
    request: RouteRequest
    then: Decision | str
    now: Decision | str


def read_log(lines: Iterable[bytes], name: str) -> tuple[Opened, Iterator[tuple[int, News]]]:
    """The head of a log and its other lines, numbered from 2.

    Raises ``ConfigError`` naming ``name`` and the line, at once or when that line is read. In the place of a
    last line that was cut off, where its writer died or the disk was full, comes a ``Closed`` that says so.
    """
    coming = iter(lines)
    first = next(coming, b"")
    try:
        opened = _HEAD.decode(first)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{name} is no decision log of `memserve serve --decision-log`: {error}") from error
    if opened.version != VERSION:
        raise ConfigError(
            f"{name} has version {opened.version}; this MemServe reads version {VERSION}: use the one that "
            f"wrote it"
        )
    return opened, _read_news(coming, name)


def replay(opened: Opened, news: Iterable[tuple[int, News]], policy: Policy) -> Iterator[Replayed]:
    """Tell a new scheduler all of it; what it decides, beside what was decided, request by request."""
    clock = _Told(opened.at)
    scheduler = GlobalScheduler(
        policy, clock, history=opened.history, block_tokens=opened.block_tokens, trees=opened.trees
    )
    for line, entry in news:
        clock.at = entry.at
        if isinstance(entry, Routed):
            request = _request_of(entry)
            then = entry.error if entry.decision is None else entry.decision
            yield Replayed(line, request, then, _route(scheduler, request))
        else:
            _tell(scheduler, entry)


def _request_of(entry: Routed | Foreseen) -> RouteRequest:
    tokens = unpack_tokens(entry.tokens)
    return RouteRequest(entry.request, entry.namespace, tokens, entry.session, entry.max_tokens, entry.behind)


def _route(scheduler: GlobalScheduler, request: RouteRequest) -> Decision | str:
    try:
        return scheduler.route(request)
    except NoInstance as error:
        return str(error)


def _tell(scheduler: GlobalScheduler, entry: News) -> None:
    match entry:
        case FirstToken():
            scheduler.first_token(entry.request, entry.cached)
        case Foreseen():
            with contextlib.suppress(NoInstance):
                scheduler.foresee(_request_of(entry))
        case Finished():
            scheduler.finish(entry.request)
        case Answered():
            scheduler.answered(entry.tokens)
        case AnswerLearnt():
            scheduler.learn_answer(entry.request, entry.namespace, unpack_tokens(entry.tokens))
        case Beat():
            scheduler.on_heartbeat(entry.heartbeat)
        case Transferred():
            scheduler.on_transfer(entry.bytes, entry.seconds)
        case Linked():
            scheduler.set_link(entry.wire)
        case Stored():
            scheduler.on_pool_events(entry.events)
        case Listed():
            scheduler.on_snapshot(entry.snapshot)
        case _:
            _tell_of_member(scheduler, entry)


def _tell_of_member(scheduler: GlobalScheduler, entry: News) -> None:
    match entry:
        case BecameReady():
            with contextlib.suppress(LayoutMismatch):
                scheduler.member_ready(entry.member, entry.ready)
        case RoleChanged():
            scheduler.member_role_changed(entry.member)
        case Suspected():
            scheduler.member_suspected(entry.instance)
        case Recovered():
            scheduler.member_recovered(entry.instance)
        case Draining():
            scheduler.member_draining(entry.instance)
        case Lost():
            scheduler.member_lost(entry.instance)


def _read_news(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, News]]:
    at = 0.0
    for number, line in enumerate(lines, 2):
        if not line.endswith(b"\n"):
            yield number, Closed(at, f"{len(line)} bytes of a line whose end was not written")
            return
        try:
            entry = _NEWS.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{name}, line {number}, cannot be read: {error}") from error
        if isinstance(entry, Routed | Foreseen | AnswerLearnt) and len(entry.tokens) % 4:
            raise ConfigError(f"{name}, line {number}, cannot be read: {len(entry.tokens)} bytes of tokens")
        at = entry.at
        yield number, entry


_HEAD = msgspec.json.Decoder(Opened)
_NEWS: msgspec.json.Decoder[News] = msgspec.json.Decoder(News)
