"""``memserve why``: where a request went, what else there was, and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memserve.cli.chat import DEFAULT_URL
from memserve.cli.failure import CANNOT, fail

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from memserve.scheduler.hindsight import Hindsight, Outcome
    from memserve.scheduler.history import Explanation
    from memserve.scheduler.record import Candidate
    from memserve.server.why import WhyBody


def why(
    request_id: Annotated[str, typer.Argument(help="The answer's id, or the x-request-id of its request.")],
    url: Annotated[str, typer.Option(help="Where the server listens.")] = DEFAULT_URL,
    json: Annotated[bool, typer.Option("--json", help="Print what /v1/cluster/why/ID says.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="MEMSERVE_API_KEY", help="Key that the server asks for.")
    ] = None,
) -> None:
    """Explain where a recent request ran: every place it could have gone to, and what that would have cost.

    Tokens and seconds are those known at the decision; the last columns, **waited**, **found** and **ttft**,
    those known at the first token. **Regret** is how much sooner it would have come from the best place.
    """
    import msgspec
    from rich.console import Console

    from memserve.cli.client import ServerClient, ServerError

    try:
        with ServerClient(url, api_key) as client:
            body = client.why(request_id)
    except ServerError as error:
        fail(error, CANNOT)
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(body)).decode())
        return
    console = Console(highlight=False)
    for line in show_why(body):
        console.print(line)


def show_why(body: WhyBody) -> list[RenderableType]:
    """What to print: per attempt the reason, the places of both legs, and the outcome."""
    from rich.markup import escape

    shown: list[RenderableType] = []
    for number, attempt in enumerate(body.attempts, 1):
        decision = attempt.decision
        of = f", attempt {number} of {len(body.attempts)}" if len(body.attempts) > 1 else ""
        shown.append(
            f"[bold]{escape(decision.request)}[/]{of} · {escape(decision.policy)} · "
            f"{decision.prompt_tokens:,} prompt tokens"
        )
        shown.append(escape(decision.reason))
        if attempt.prefill_candidates:
            shown.append(_prefill_table(attempt))
        if attempt.decode_candidates:
            shown.append(_decode_table(attempt.decode_candidates))
        shown += _tell(attempt)
    return shown


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(columns[0])
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table


def _prefill_table(attempt: Explanation) -> Table:
    """Narrow enough for 80 columns, but where KV is swapped in."""
    swaps = any(one.swap for one in attempt.prefill_candidates)
    columns = ("wait", "fetch", *(("swap",) if swaps else ()), "prefill", "total")
    table = _table("prefill", "cached", "ahead", *columns)
    later = {} if attempt.outcome is None else {place.instance: place for place in attempt.outcome.places}
    if later:
        for name in ("waited", "found", "ttft"):
            table.add_column(name, justify="right", style="cyan")
    for one in attempt.prefill_candidates:
        cells = [_seconds(getattr(one, name)) for name in columns]
        hindsight = _hindsight(later.get(one.instance)) if later else ()
        table.add_row(_name(one), *_load(one)[:2], *cells, *hindsight)
    return table


def _decode_table(candidates: tuple[Candidate, ...]) -> Table:
    table = _table("decode", "cached", "ahead", "run", "move", "total")
    for one in candidates:
        table.add_row(_name(one), *_load(one), _seconds(one.fetch), _seconds(one.total))
    return table


def _name(one: Candidate) -> str:
    from rich.markup import escape

    role = "" if one.instance.startswith(one.role) else f" ({one.role})"
    return f"[bold green]{escape(one.instance)}[/]{role}" if one.chosen else escape(one.instance) + role


def _load(one: Candidate) -> tuple[str, str, str]:
    return f"{one.matched_tokens:,}", f"{one.queued_tokens:,}", f"{one.running:,}"


def _hindsight(place: Hindsight | None) -> tuple[str, str, str]:
    if place is None:
        return "lost", "", ""
    least = ">" if place.still_busy and not place.chosen else ""
    return least + _seconds(place.waited), f"{place.cached_tokens:,}", least + _seconds(place.ttft)


def _tell(attempt: Explanation) -> list[str]:
    decision, outcome = attempt.decision, attempt.outcome
    if outcome is None:
        return [
            f"first token: predicted after {decision.predicted_ttft:.3f} s, not there yet or not recorded"
        ]
    found = "unknown" if outcome.cached_tokens is None else f"{outcome.cached_tokens:,}"
    return [
        f"first token: after {outcome.ttft:.3f} s, predicted {decision.predicted_ttft:.3f} s "
        f"({outcome.error:.0%} off); not explained {outcome.unexplained:.3f} s",
        f"cached: {found} of {decision.prompt_tokens:,} prompt tokens, believed {decision.believed:,}",
        _regret(decision.prefill, outcome),
    ]


def _regret(chosen: str, outcome: Outcome) -> str:
    from rich.markup import escape

    if outcome.regret > 0:
        said = f"{outcome.regret:.3f} s; {escape(outcome.best)} would have been the best place"
    else:
        said = f"none; no place looked at would have been sooner than {escape(chosen)}"
    total = outcome.regret_total
    return f"regret: {said}" + ("" if total is None else f"; {total:.3f} s of the total that was compared")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
