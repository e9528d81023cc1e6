"""``memserve replay``: a decision log decided again, by the same policy or by another one."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memserve.cli.failure import BAD_USAGE, CANNOT, fail
from memserve.core.config import POLICIES
from memserve.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from memserve.scheduler.decision import Decision
    from memserve.scheduler.decision_log import News
    from memserve.scheduler.replay import Replayed

DIFFERENT = 1


def replay(
    file: Annotated[Path, typer.Argument(help="What `memserve serve --decision-log FILE` wrote.")],
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"Decide by this policy instead, and show where it differs: {', '.join(POLICIES)}.",
            metavar="NAME",
        ),
    ] = None,
    show: Annotated[int, typer.Option(help="Differences to show.", min=0)] = 3,
) -> None:
    """Decide everything in a decision log again.

    Without **--policy** every decision must come out as it was, to the last digit; the first that does not is
    shown, and the exit status is 1. With it, one sees what else would have been chosen, each time in the
    situation that the real decisions had led to: not what would have become of the cluster.
    """
    if policy is not None and policy not in POLICIES:
        fail(f"--policy is {policy!r}; accepted: {', '.join(POLICIES)}", BAD_USAGE)
    try:
        total, differing, examples = _compare(file, policy, show)
    except ConfigError as error:
        fail(error, CANNOT)
    for one in examples:
        _show(one)
    if policy is not None:
        typer.echo(f"{total:,} requests; {policy} places {differing:,} of them elsewhere")
    elif differing:
        typer.echo(f"{differing:,} of {total:,} decisions come out differently")
        raise typer.Exit(DIFFERENT)
    else:
        typer.echo(f"all {total:,} decisions come out as they were")


def _compare(file: Path, policy: str | None, show: int) -> tuple[int, int, list[Replayed]]:
    """How many requests there are, how many come out differently, and some of those."""
    total = differing = 0
    examples: list[Replayed] = []
    for one in _decide_again(file, policy):
        total += 1
        if _differs(one, whole=policy is None):
            differing += 1
            examples += [one] if len(examples) < show else []
    return total, differing, examples


def _decide_again(file: Path, policy: str | None) -> Iterator[Replayed]:
    from memserve.scheduler.policies import policy_by_name
    from memserve.scheduler.replay import read_log, replay

    try:
        with file.open("rb") as lines:
            opened, news = read_log(lines, str(file))
            yield from replay(opened, _tell_of_end(news), policy_by_name(policy or opened.policy))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error


def _tell_of_end(news: Iterable[tuple[int, News]]) -> Iterator[tuple[int, News]]:
    """All of it; where the log ended before its scheduler did, the user hears of that."""
    from memserve.scheduler.decision_log import Closed

    for line, entry in news:
        if isinstance(entry, Closed):
            typer.echo(f"the log ends at line {line}: {entry.reason}", err=True)
        yield line, entry


def _differs(one: Replayed, *, whole: bool) -> bool:
    if whole or isinstance(one.then, str) or isinstance(one.now, str):
        return one.then != one.now
    return _places(one.then) != _places(one.now)


def _places(decision: Decision) -> tuple[object, ...]:
    return decision.prefill, decision.decode or decision.prefill, decision.fetch_from


def _show(one: Replayed) -> None:
    typer.echo(f"line {one.line}: {one.request.request}, {len(one.request.tokens):,} prompt tokens")
    for when, outcome in (("then", one.then), ("now", one.now)):
        typer.echo(f"  {when:4s} {outcome if isinstance(outcome, str) else outcome.reason}")
    for line in islice(_fields(one), 8):
        typer.echo(f"       {line}")


def _fields(one: Replayed) -> Iterator[str]:
    """What is not the same, the reason apart."""
    from msgspec.structs import asdict

    if isinstance(one.then, str) or isinstance(one.now, str):
        return
    then, now = asdict(one.then), asdict(one.now)
    for name, value in then.items():
        if value != now[name] and name not in ("reason", "policy"):
            yield f"{name}: {value} then, {now[name]} now"
