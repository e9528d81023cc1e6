"""How a command ends when it cannot do what was asked: one line on standard error, and an exit code."""

from __future__ import annotations

from typing import NoReturn

import typer

BAD_USAGE = 2
CANNOT = 1


def fail(message: object, code: int) -> NoReturn:
    """Print one line and end the command."""
    typer.echo(f"memserve: {message}", err=True)
    raise typer.Exit(code)
