"""``memserve instance``: one serving instance, started by ``serve`` and never by hand."""

from __future__ import annotations

import typer


def instance() -> None:
    """Run one instance; its settings come on standard input."""
    from memserve.engine.instance import run_from_stdin

    raise typer.Exit(run_from_stdin())
