"""``memserve role``: another kind of work for an instance, while it serves."""

from __future__ import annotations

from typing import Annotated

import typer

from memserve.cli.chat import DEFAULT_URL
from memserve.cli.failure import BAD_USAGE, CANNOT, fail


def role(
    instance: Annotated[str, typer.Argument(help="The instance, as `memserve status` names it.")],
    role: Annotated[str, typer.Argument(help="What it shall do: prefill, decode or colocated.")],
    url: Annotated[str, typer.Option(help="Where the server listens.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option(envvar="MEMSERVE_API_KEY", help="Key that the server asks for.")
    ] = None,
) -> None:
    """Prefill, decode or both: change it for one of the instances. Requests go on, caches stay.

    Requests that it has begun under its old role it finishes.
    """
    from memserve.cli.client import ServerClient, ServerError
    from memserve.core.types import Role

    if role not in tuple(Role):
        fail(f"role is {role!r}; accepted: {', '.join(Role)}", BAD_USAGE)
    try:
        with ServerClient(url, api_key) as client:
            answer = client.set_role(instance, role)
    except ServerError as error:
        fail(error, CANNOT)
    was = "as before" if answer.before == answer.role else f"was {answer.before}"
    typer.echo(f"{answer.instance}: {answer.role} ({was})")
